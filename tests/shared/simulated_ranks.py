"""Threads in place of ranks, the parts of a matrix that they hold, and what they estimate of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from spectral_matrices import gaussian
from torch import Tensor

from redline.numerics import SpectralEstimate, SpectralState
from redline.numerics.sharded_spectra import MatrixShard, sharded_top_singular_values


class Ranks:
    """Threads in place of ranks, and what they sent one another."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.messages: list[Tensor] = []  # as rank 0 sent them
        self._barrier = threading.Barrier(size, timeout=20)
        self._sent: list[Tensor | None] = [None] * size
        self._here = threading.local()

    @property
    def rank(self) -> int:
        return self._here.rank

    def total(self, tensor: Tensor) -> Tensor:
        self._sent[self.rank] = tensor
        if self.rank == 0:
            self.messages.append(tensor)
        self._barrier.wait()
        sent = [one for one in self._sent if one is not None]
        assert len({(one.shape, one.dtype) for one in sent}) == 1
        total = torch.stack(sent).sum(0)
        self._barrier.wait()
        return total

    def run(self, function: Callable[[int], SpectralEstimate]) -> list[SpectralEstimate]:
        def on(rank: int) -> SpectralEstimate:
            self._here.rank = rank
            try:
                return function(rank)
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self.size) as pool:
            running = [pool.submit(on, rank) for rank in range(self.size)]
        errors = [one.exception() for one in running if one.exception() is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error
        return [one.result() for one in running]

    def measure(
        self, matrices: Sequence[list[MatrixShard]], states: Sequence[SpectralState | None] | None = None, **how: object
    ) -> list[SpectralEstimate]:
        """The estimates of all ranks, of the ranks' parts of each matrix."""
        states = states or [None] * self.size
        return self.run(
            lambda rank: sharded_top_singular_values(
                [parts[rank] for parts in matrices], self.total, states[rank], **how
            )
        )


def the_same(estimates: Sequence[SpectralEstimate]) -> SpectralEstimate:
    """The estimate of all ranks, which must be one to the last bit."""
    first, *others = estimates
    for other in others:
        assert torch.equal(first.sigma.nan_to_num(-1), other.sigma.nan_to_num(-1))
        assert torch.equal(first.residual.nan_to_num(-1), other.residual.nan_to_num(-1))
        assert torch.equal(first.passes, other.passes)
        assert first.state.seed == other.state.seed
        for a, b in zip(first.state.vectors, other.state.vectors, strict=True):
            assert a is b is None or torch.equal(a, b)
    return first


def in_rows(matrix: Tensor, counts: Sequence[int]) -> list[MatrixShard]:
    return [MatrixShard(part, tuple(matrix.shape), "rows") for part in matrix.split(list(counts))]


def in_columns(matrix: Tensor, counts: Sequence[int]) -> list[MatrixShard]:
    return [MatrixShard(part, tuple(matrix.shape), "columns") for part in matrix.split(list(counts), dim=1)]


def in_blocks(matrix: Tensor, rows: Sequence[int], columns: Sequence[int]) -> list[MatrixShard]:
    parts, first_row = [], 0
    for band in matrix.split(list(rows)):
        first_column = 0
        for part in band.split(list(columns), dim=1):
            parts.append(MatrixShard(part, tuple(matrix.shape), "both", first_row, first_column))
            first_column += part.shape[1]
        first_row += len(band)
    return parts


def in_terms(matrix: Tensor, size: int) -> list[MatrixShard]:
    noise = [gaussian(*matrix.shape, seed=50 + k).to(matrix.dtype) for k in range(size - 1)]
    terms = [*noise, matrix - sum(noise, torch.zeros_like(matrix))]
    return [MatrixShard(term, tuple(matrix.shape), "both") for term in terms]


def even(length: int, parts: int) -> list[int]:
    """As ``torch.chunk`` would: the last may be short, or empty."""
    step = -(-length // parts)
    return [max(0, min(step, length - k * step)) for k in range(parts)]


def parts_of(matrix: Tensor, how: str) -> list[MatrixShard]:
    """A matrix on four ranks."""
    rows, columns = matrix.shape
    if how == "rows":
        return in_rows(matrix, even(rows, 4))
    if how == "uneven rows":
        return in_rows(matrix, [rows - rows // 3, 0, rows // 3, 0])
    if how == "columns":
        return in_columns(matrix, even(columns, 4))
    if how == "uneven columns":
        return in_columns(matrix, [0, columns // 5, 0, columns - columns // 5])
    if how == "blocks":
        return in_blocks(matrix, even(rows, 2), even(columns, 2))
    if how == "uneven blocks":
        return in_blocks(matrix, [rows, 0], [columns - columns // 4, columns // 4])
    if how == "terms":
        return in_terms(matrix, 4)
    assert how == "replicas", how
    half = in_rows(matrix, even(rows, 2))
    return [MatrixShard(one.block, one.shape, "rows", share=0.5) for one in half for _ in range(2)]


EVERY_WAY = [
    "rows", "uneven rows", "columns", "uneven columns", "blocks", "uneven blocks", "terms", "replicas"
]  # fmt: skip
every_way = pytest.mark.parametrize("how", EVERY_WAY)
