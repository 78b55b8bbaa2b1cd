"""Spectra of named matrices over a run, each started warm from the last time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from redline.numerics.spectra import SpectralEstimate, SpectralState, top_singular_values
from redline.parameters import MatrixLayer


class SpectrumTracker:
    """Keeps the warm start of each matrix between measurements."""

    def __init__(self, seed: int) -> None:
        """``seed``: of its own random columns."""
        self._vectors: dict[str, Tensor] = {}
        self._seed = seed

    def measure(
        self, layers: Sequence[MatrixLayer], tensors: Mapping[str, Tensor], tolerance: float, layout: object = None
    ) -> SpectralEstimate:
        """Top singular values of the layers' matrices.

        Args:
            layers: which; one that was not measured before starts cold.
            tensors: by parameter name, of the parameter's shape: the weights, or their updates.
            tolerance: relative error of ``sigma_1`` to iterate to.
        """
        warm = SpectralState(tuple(self._vectors.get(layer.name) for layer in layers), self._seed)
        matrices = [layer.of(tensors[layer.parameter]) for layer in layers]
        estimate = top_singular_values(matrices, warm, tolerance=tolerance)
        for layer, vectors in zip(layers, estimate.state.vectors, strict=True):
            self._vectors.pop(layer.name, None)
            if vectors is not None:
                self._vectors[layer.name] = vectors
        self._seed = estimate.state.seed
        return estimate

    def state_dict(self) -> dict[str, Any]:
        """The warm vectors, the layers they belong to, and the seed."""
        return {"vectors": list(self._vectors.values()), "seed": self._seed, "layers": list(self._vectors)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Start warm from vectors saved before."""
        self._vectors = dict(zip(state["layers"], state["vectors"], strict=True))
        self._seed = state["seed"]
