"""Spectra of named matrices over a run, each started warm from the last time."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from redline.matrix_shards import block_of, matrix_shard, split_of
from redline.numerics.sharded_spectra import sharded_top_singular_values
from redline.numerics.spectra import SpectralEstimate, SpectralState, top_singular_values
from redline.parameters import MatrixLayer
from redline.ranks import Ranks
from redline.sharding import Layout, Sharding


class SpectrumTracker:
    """Keeps the warm start of each matrix between measurements.

    Of several ranks all measure together, and are told the same. What every rank holds whole one of them measures for
    all, always the same one; matrices of a stack that is dealt out, those who hold them; what lies in parts, all of
    them at once. Who measures keeps the warm start.
    """

    def __init__(self, seed: int) -> None:
        """``seed``: of its own random columns."""
        self._vectors: dict[str, Tensor] = {}
        self._seed = seed
        self._owners: dict[str, int] = {}  # the rank that measures a matrix which all hold
        self._work: dict[int, int] = {}  # what each rank owns, in elements
        self._agreed: set[str] = set()  # matrices in parts whose warm start is known to be the same on all ranks

    def measure(
        self,
        layers: Sequence[MatrixLayer],
        tensors: Mapping[str, Tensor],
        tolerance: float,
        layout: Layout | None = None,
    ) -> SpectralEstimate:
        """Top singular values of the layers' matrices.

        Args:
            layers: which; one that was not measured before starts cold.
            tensors: by parameter name, of the parameter's shape: the weights, or their updates. Of parameters that lie
                in parts this rank's part.
            tolerance: relative error of ``sigma_1`` to iterate to.
            layout: how they lie over the ranks, all of which ask for the same at once; None for one device.

        Returns:
            The estimates; of several ranks without a state, and with ``passes`` on the matrices' device.
        """
        if layout is not None and layout.ranks.size > 1:
            return self._measure_together(layers, tensors, tolerance, layout)
        matrices = [layer.of(tensors[layer.parameter]) for layer in layers]
        estimate = top_singular_values(matrices, self._warm(layers, self._seed), tolerance=tolerance)
        self._keep(layers, estimate.state)
        self._seed = estimate.state.seed
        return estimate

    def state_dict(self) -> dict[str, Any]:
        """The warm vectors, the layers they belong to, and the seed: of several ranks what this one keeps."""
        return {"vectors": list(self._vectors.values()), "seed": self._seed, "layers": list(self._vectors)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Start warm from vectors saved before, by as many ranks or not: where one lacks, a matrix starts cold.

        In the middle of a run all ranks load, or none.
        """
        self._vectors = dict(zip(state["layers"], state["vectors"], strict=True))
        self._seed = state["seed"]
        self._agreed = set()

    def _warm(self, layers: Sequence[MatrixLayer], seed: int) -> SpectralState:
        return SpectralState(tuple(self._vectors.get(layer.name) for layer in layers), seed)

    def _keep(self, layers: Sequence[MatrixLayer], state: SpectralState) -> None:
        for layer, vectors in zip(layers, state.vectors, strict=True):
            self._vectors.pop(layer.name, None)
            if vectors is not None:
                self._vectors[layer.name] = vectors

    # Several ranks --------------------------------------------------------------------------------------------------

    def _measure_together(
        self, layers: Sequence[MatrixLayer], tensors: Mapping[str, Tensor], tolerance: float, layout: Layout
    ) -> SpectralEstimate:
        whole: dict[int, _Held] = {}
        split: dict[int, _Held] = {}
        for place, layer in enumerate(layers):
            sharding = layout.shardings.get(layer.parameter)
            one = _Held(layer, tensors[layer.parameter], sharding)
            (whole if split_of(layer, sharding) is None else split)[place] = one
        numbers = []
        if split:  # first: what they agree on is the seed, too
            numbers.append(self._measure_split(list(split.values()), tolerance, layout.ranks))
        if whole:
            numbers.append(self._measure_whole(list(whole.values()), tolerance, layout.ranks))
        if not numbers:
            return top_singular_values([])
        together = torch.cat(numbers, dim=1)
        back = torch.tensor([*split, *whole]).argsort().to(together.device, non_blocking=True)
        sigma, residual, passes = together.index_select(1, back).unbind()
        double = any(tensors[layer.parameter].dtype == torch.float64 for layer in layers)
        dtype = torch.float64 if double else torch.float32
        return SpectralEstimate(sigma.to(dtype), residual.to(dtype), passes.round().long(), SpectralState())

    def _measure_split(self, held: Sequence[_Held], tolerance: float, ranks: Ranks) -> Tensor:
        """All of what lies in parts: sigma, residual and passes, ``(3, n)``, float64."""
        layers = [one.layer for one in held]
        self._agree(layers, held[0].part.device, ranks)
        shards = [matrix_shard(one.layer, one.part, one.sharding) for one in held if one.sharding is not None]
        warm = self._warm(layers, self._seed)
        estimate = sharded_top_singular_values(shards, ranks.total, warm, tolerance=tolerance)
        self._keep(layers, estimate.state)
        self._seed += len(held)
        return _as_rows(estimate)

    def _measure_whole(self, held: Sequence[_Held], tolerance: float, ranks: Ranks) -> Tensor:
        """The same of what is whole somewhere: each rank what is its own, and one message."""
        self._divide([one.layer for one in held if not one.is_dealt_out], ranks.size)
        counts = [self._count(one, ranks) for one in held]
        mine = [one for one, count in zip(held, counts, strict=True) if count]
        warm = self._warm([one.layer for one in mine], self._seed)
        try:
            estimate = top_singular_values([one.block for one in mine], warm, tolerance=tolerance)
        except Exception:
            ranks.total(torch.full((3, len(held)), math.nan, dtype=torch.float64, device=held[0].part.device))
            raise  # now that the others, who waited for it, know of none
        for one in held:
            self._vectors.pop(one.layer.name, None)  # loaded by a rank whose it is not
        self._keep([one.layer for one in mine], estimate.state)
        self._seed += len(held)
        device = held[0].part.device
        told = torch.zeros(3, len(held), dtype=torch.float64, device=device)
        if mine:
            places = torch.tensor([place for place, count in enumerate(counts) if count])
            shares = torch.tensor([count for count in counts if count], dtype=torch.float64)
            places, shares = (one.to(device, non_blocking=True) for one in (places, shares))
            told = told.index_copy(1, places, shares * _as_rows(estimate))
        return ranks.total(told)

    def _divide(self, layers: Sequence[MatrixLayer], size: int) -> None:
        """Give each new matrix an owner: the largest first, to whom has least to do."""
        new = [layer for layer in layers if layer.name not in self._owners]
        for layer in sorted(new, key=lambda layer: -layer.d_out * layer.d_in):
            rank = min(range(size), key=lambda rank: self._work.get(rank, 0))
            self._owners[layer.name] = rank
            self._work[rank] = self._work.get(rank, 0) + layer.d_out * layer.d_in

    def _count(self, one: _Held, ranks: Ranks) -> float:
        """What this rank's measurement counts for in the sum of all, 0 if it makes none."""
        if one.sharding is not None and one.is_dealt_out:
            return one.sharding.share if one.block.numel() else 0.0
        return float(self._owners[one.layer.name] == ranks.rank)

    def _agree(self, layers: Sequence[MatrixLayer], device: torch.device, ranks: Ranks) -> None:
        """Where all ranks multiply at once they start from the same: cold, if what some have loaded is different."""
        new = [layer.name for layer in layers if layer.name not in self._agreed]
        if not new:
            return
        seen = 0
        for name in new:
            vectors = self._vectors.get(name)
            seen = zlib.crc32(b"" if vectors is None else vectors.cpu().contiguous().numpy().tobytes(), seen)
        mine = torch.tensor([seen, self._seed], device=device)
        told = ranks.rows(mine).tolist()
        if any(row != told[0] for row in told):
            self._seed = max(seed for _, seed in told)
            for name in new:
                self._vectors.pop(name, None)
        self._agreed.update(new)


class _Held(NamedTuple):
    """What this rank holds of the parameter that a layer belongs to."""

    layer: MatrixLayer
    part: Tensor
    sharding: Sharding | None

    @property
    def is_dealt_out(self) -> bool:
        """Whether some ranks hold it whole, and others nothing."""
        return self.sharding is not None and any(map(self.sharding.splits, range(len(self.sharding.shape))))

    @property
    def block(self) -> Tensor:
        """What it holds of the matrix."""
        return block_of(*self)


def _as_rows(estimate: SpectralEstimate) -> Tensor:
    passes = estimate.passes.to(estimate.sigma.device, non_blocking=True)
    return torch.stack([estimate.sigma.double(), estimate.residual.double(), passes.double()])
