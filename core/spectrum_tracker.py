"""Spectra of a fixed list of matrices over a run, each started warm from the last time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from redline.numerics.spectra import SpectralEstimate, SpectralState, top_singular_values
from redline.parameters import MatrixLayer


class SpectrumTracker:
    """Keeps the warm start between measurements."""

    def __init__(self, seed: int) -> None:
        """``seed``: of its own random columns."""
        self._state = SpectralState(seed=seed)
        self._layers: tuple[str, ...] = ()

    def measure(
        self, layers: Sequence[MatrixLayer], tensors: Mapping[str, Tensor], tolerance: float
    ) -> SpectralEstimate:
        """Top singular values of the layers' matrices.

        Args:
            layers: which; where they are others than last time, it starts cold.
            tensors: by parameter name, of the parameter's shape: the weights, or their updates.
            tolerance: relative error of ``sigma_1`` to iterate to.
        """
        names = tuple(layer.name for layer in layers)
        state = self._state if names == self._layers else SpectralState(seed=self._state.seed)
        estimate = top_singular_values(
            [layer.of(tensors[layer.parameter]) for layer in layers], state, tolerance=tolerance
        )
        self._state, self._layers = estimate.state, names
        return estimate

    def state_dict(self) -> dict[str, Any]:
        """The warm vectors, the layers they belong to, and the seed."""
        return {"vectors": list(self._state.vectors), "seed": self._state.seed, "layers": list(self._layers)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Start warm from vectors saved before."""
        self._state = SpectralState(tuple(state["vectors"]), state["seed"])
        self._layers = tuple(state["layers"])
