"""Top singular values of matrices that lie in parts over several ranks; none of them is ever gathered.

Iteration and stopping rule are those of ``spectra.py``. Each rank multiplies its own part ``A_l`` with the block ``X``
of ``b = rank + 2`` rows, and what the ranks send one another is small:

- where they hold other rows: ``X A^T A``, the sum of ``(X A_l^T) A_l`` over ranks, ``(b, n)``, once a round; which rows
  they are is of no account, and the iteration is over the columns even if those are the longer side;
- where they hold other columns: the same of the transpose, ``(b, m)``;
- where they hold blocks of both, or terms of a sum: ``Y = X A^T``, then ``Y A``, ``(b, m)`` and ``(b, n)``;
- where the side that nobody shares has no more than 128: half of ``A^T A``, ``n (n + 1) / 2``, once.

All matrices go their rounds together: what each has to send next goes in one message. With ``R`` rounds, two products
each, of the matrix that takes most, and ``e`` bytes a number (4; 8 if any matrix is float64), a call sends

    messages: 2 R - 1 watched, R + 1 unwatched; with a matrix in blocks of both 3 R - 1 and 2 R + 1; at least 2
    bytes:    e (k n + 4 max(1, R - 1)) a matrix watched, e (k n + 4) unwatched, with k = min(R b, n) rows in all;
              in blocks of both k (m + n) for k n, with n the shorter side.

The four numbers are what makes decisions and results the same on every rank, bit for bit: whether it would stop, which
all have to, and ``sigma_1`` and residual, of which the mean is told. All else after a message is done by each rank from
the same numbers, in float64: what rounding makes of it on different machines is far below what float32 keeps.
Matrices that would together hold more than ``_AT_ONCE`` numbers take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from redline.numerics.spectra import (
    _FRESH,
    _LEAST_ITERATIONS,
    _SMALL,
    SpectralEstimate,
    SpectralState,
    _by_columns,
    _by_rows,
    _extended,
    _Found,
    _gram,
    _has_settled,
    _most_iterations,
    _precision,
    _ritz_pairs,
    _starting_block,
    _told,
    _top_and_residual,
)

_AT_ONCE = 1 << 26  # numbers of Krylov spaces and their images: a quarter of a gigabyte

_Rounds: TypeAlias = Generator[Tensor, Tensor, _Found]
"""The measurement of one matrix: yields what this rank adds to a sum, and is sent the sum."""


@dataclass(frozen=True)
class MatrixShard:
    """What one rank holds of a matrix.

    Attributes:
        block: ``(rows, columns)``, maybe empty.
        shape: ``(m, n)``, of the whole matrix.
        split: what other ranks hold others of. "both": blocks of rows and columns, or terms that are summed up.
        first_row: place of the block; looked at only if both are split.
        first_column: the same.
        share: what the block counts for in a sum over ranks: 1 / how many of them hold the same.
    """

    block: Tensor
    shape: tuple[int, int]
    split: Literal["rows", "columns", "both"]
    first_row: int = 0
    first_column: int = 0
    share: float = 1.0

    @property
    def over_columns(self) -> bool:
        """Whether the iteration is over the space of the columns: the side that is whole, or the shorter one."""
        return self.split == "rows" or (self.split == "both" and self.shape[1] <= self.shape[0])

    @property
    def side(self) -> int:
        """The dimension of that space."""
        return self.shape[1] if self.over_columns else self.shape[0]


def sharded_top_singular_values(
    shards: Sequence[MatrixShard],
    total: Callable[[Tensor], Tensor],
    state: SpectralState | None = None,
    *,
    rank: int = 4,
    iterations: int | None = None,
    tolerance: float = 2e-5,
    watched: bool | None = None,
) -> SpectralEstimate:
    """Estimate the largest singular value of each matrix; every rank calls it with its parts, and is told the same.

    Args:
        shards: this rank's, on one device; any floating dtype; low precision is computed in float32.
        total: the sum over ranks of a tensor that all give in one shape and dtype.
        state: of the last call over the same matrices, the same on all ranks.
        rank: as in ``top_singular_values``, and so are the rest.
        iterations: the most rounds.
        tolerance: relative error of ``sigma_1`` at which a watched matrix is done.
        watched: whether to ask for convergence after each round.

    Returns:
        Estimates on the shards' device; the vectors of the state are whole, ``(side, rank)``.
    """
    state = state or SpectralState()
    if not shards:
        return SpectralEstimate(torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.int64), state)
    warm = state.vectors if len(state.vectors) == len(shards) else (None,) * len(shards)
    device = shards[0].block.device
    watched = device.type == "cpu" if watched is None else watched
    tasks: list[tuple[_Rounds, int]] = []
    for index, (shard, vectors) in enumerate(zip(shards, warm, strict=True)):
        if shard.split != "both" and shard.side <= _SMALL:
            tasks.append((_at_once(shard, watched), shard.side**2))
            continue
        start = vectors if vectors is not None and vectors.shape == (shard.side, rank) else None
        most = _most_iterations(iterations, start is not None, watched)
        held = 2 * shard.side * min(shard.side, most * (rank + _FRESH))
        tasks.append((_in_rounds(shard, start, state.seed + index, rank, most, tolerance, watched), held))
    results: list[_Found] = []
    with torch.autocast(device.type, enabled=False):
        for group in _groups(tasks):
            results += _together(group, total)
    sigma, residual, passes, kept = zip(*results, strict=True)
    return SpectralEstimate(
        torch.stack(sigma),
        torch.stack(residual),
        torch.tensor(passes),
        SpectralState(kept, state.seed + len(shards)),
    )


def _groups(tasks: Sequence[tuple[_Rounds, int]]) -> Iterator[list[_Rounds]]:
    """The tasks in order, as many at once as may be held."""
    group: list[_Rounds] = []
    holds = 0
    for task, held in tasks:
        if group and holds + held > _AT_ONCE:
            yield group
            group, holds = [], 0
        group.append(task)
        holds += held
    yield group


def _together(tasks: Sequence[_Rounds], total: Callable[[Tensor], Tensor]) -> list[_Found]:
    """What comes of the tasks; what those that are not done have to send next goes in one message."""
    sends = {place: next(task) for place, task in enumerate(tasks)}
    found: dict[int, _Found] = {}
    while sends:
        sums = total(torch.cat([sent.reshape(-1) for sent in sends.values()]))
        parts = sums.split([sent.numel() for sent in sends.values()])
        answers = {
            place: part.view(sent.shape).to(sent.dtype)
            for (place, sent), part in zip(sends.items(), parts, strict=True)
        }
        sends = {}
        for place, answer in answers.items():
            try:
                sends[place] = tasks[place].send(answer)
            except StopIteration as end:
                found[place] = end.value
    return [found[place] for place in range(len(tasks))]


def _at_once(shard: MatrixShard, watched: bool) -> _Rounds:
    """One of a short side: from its Gram matrix."""
    dtype = _precision(shard.block)
    part = shard.share * _gram(shard.block if shard.over_columns else shard.block.mT, dtype)
    above = torch.triu_indices(shard.side, shard.side, device=part.device).unbind()
    half = yield part[above].to(dtype)
    gram = torch.zeros_like(part).index_put(above, half.double())
    gram = gram + gram.triu(1).mT
    _, sigma, residual = yield from _agreed(*_top_and_residual(gram, watched), True, dtype)
    return sigma, residual, 2, None


def _in_rounds(
    shard: MatrixShard, start: Tensor | None, seed: int, rank: int, most: int, tolerance: float, watched: bool
) -> _Rounds:
    """The block Krylov iteration of ``spectra.py``."""
    n, device, dtype = shard.side, shard.block.device, _precision(shard.block)
    generator = torch.Generator(device).manual_seed(seed)
    start = None if start is None else start.mT.to(device, torch.float64)
    basis = newest = _starting_block(start, (min(n, rank + _FRESH), n), generator, torch.float64).to(dtype)
    returns, rounds = basis[:0], 0
    while True:
        back = yield from _there_and_back(shard, newest)
        returns = torch.cat([returns, back])
        rounds += 1
        last = rounds == most or len(basis) >= n
        if last or (watched and rounds >= _LEAST_ITERATIONS):
            theta, coefficients, residuals = _ritz_pairs(basis.double(), returns.double(), rank, watched)
            stop = last or bool(_has_settled(theta, residuals, tolerance))
            off = torch.linalg.vector_norm(residuals[0])
            all_stop, sigma, residual = yield from _agreed(theta[0], off, stop, dtype)
            if last or bool(all_stop):
                break
        whole = _extended(basis.double(), back[: n - len(basis)].double(), generator, dtype).to(dtype)
        newest, basis = whole[len(basis) :], whole
    vectors = coefficients[:, : min(n, rank)].mT @ basis.double()
    # A matrix that is not finite for one step must not take the warm start with it.
    vectors = torch.where(torch.isfinite(vectors).all(), vectors, basis[:rank].double())
    return sigma, residual, 2 * rounds, vectors.mT.to(dtype)


def _agreed(
    theta: Tensor, residual: Tensor, stop: bool, dtype: torch.dtype
) -> Generator[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Whether all would stop, ``sigma`` and its relative residual: the same on every rank, to the last bit."""
    sigma, residual = _told(theta, residual, dtype)
    stops, ranks = sigma.new_full((), float(stop)), sigma.new_ones(())
    stopping, sigmas, residuals, ranks = (yield torch.stack([stops, sigma, residual, ranks])).unbind()
    return stopping == ranks, sigmas / ranks, residuals / ranks


def _there_and_back(shard: MatrixShard, x: Tensor) -> Generator[Tensor, Tensor, Tensor]:
    """``x A^T A``, or ``x A A^T``, of the whole matrix."""
    block, share = shard.block, shard.share
    (m, n), (rows, columns) = shard.shape, block.shape
    if shard.split == "rows":
        return (yield share * _by_columns(block, _by_rows(block, x)))
    if shard.split == "columns":
        return (yield share * _by_rows(block, _by_columns(block, x)))
    over_rows, over_columns = (shard.first_row, rows, m), (shard.first_column, columns, n)
    if shard.over_columns:
        y = yield _placed(share * _by_rows(block, _here(x, *over_columns)), *over_rows)
        return (yield _placed(share * _by_columns(block, _here(y, *over_rows)), *over_columns))
    y = yield _placed(share * _by_columns(block, _here(x, *over_rows)), *over_columns)
    return (yield _placed(share * _by_rows(block, _here(y, *over_columns)), *over_rows))


def _here(whole: Tensor, first: int, count: int, _: int) -> Tensor:
    return whole.narrow(1, first, count) if count else whole[:, :0]


def _placed(part: Tensor, first: int, count: int, length: int) -> Tensor:
    """A part of rows that are 0 everywhere else."""
    return (
        torch.nn.functional.pad(part, (first, length - first - count)) if count else part.new_zeros(len(part), length)
    )
