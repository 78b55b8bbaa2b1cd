"""Top singular values by a warm-started block Krylov iteration.

For a matrix ``A`` of shape ``(m, n)``, ``m >= n`` (wide ones are transposed), the block Krylov space of ``A^T A`` from
a starting block ``X`` is grown one product with ``A`` and one with ``A^T`` at a time; Rayleigh-Ritz on it gives the top
Ritz value ``theta``, an estimate of ``sigma_1^2`` from below, with its vector ``v`` and the residual
``||A^T A v - theta v|| / theta``. The block starts from the top vectors of the last call (warm) and two random ones,
because a small residual proves *a* singular value, not the largest: they notice when another has grown past it. Vectors
are kept as rows: products with a few of them at once then take little longer than with one. Where the shorter side is
short, the Gram matrix is decomposed instead. Matrices of one shorter side go together: the products are each one's own,
and everything else, which is small, is done for all of them at once.

Source: Musco & Musco, *Randomized Block Krylov Methods* (arXiv 1504.05477); Kato (1949) and Temple (1928) for
the bound that stops it; the warm start and the fresh vectors are Redline's own.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

_SQUARINGS = 24  # G^(2^24): two Ritz values 1e-6 apart are told from one another
_SMALL = 128  # up to this side the Gram matrix itself is cheaper than an iteration, and exact
_LEAST_ITERATIONS = 2  # before the stopping rule is asked: in one, a fresh row shows nothing
_MOST_ITERATIONS = 24  # 48 products: what a cold start on a flat spectrum takes
_UNWATCHED_ITERATIONS = {"cold": 16, "warm": 6}  # where asking for convergence would wait for the device
_FRESH = 2  # random vectors in the block
_LEADING = 8  # Ritz vectors that the stopping rule takes together at most
_MARGIN = 0.5  # of the tolerance is asked for: the bound that tells it rests on an estimate
_TILE = 1 << 20  # elements of a low-precision matrix that are converted at a time
_AT_ONCE = 1 << 18  # numbers in the blocks, or the Gram matrices, of those that go together: 30 bytes of each a round

_Found: TypeAlias = tuple[Tensor, Tensor, int, Tensor | None]  # sigma, residual, passes, vectors


@dataclass(frozen=True)
class SpectralState:
    """What a call leaves for the next one to start warm from.

    Attributes:
        vectors: for each matrix its top Ritz vectors, ``(min(m, n), rank)``, float32 or float64; None for one that is
            to start cold, or too small to be iterated on.
        seed: of the fresh random vectors; counts up, so that each call draws others.
    """

    vectors: tuple[Tensor | None, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class SpectralEstimate:
    """Top singular values of ``n`` matrices.

    Attributes:
        sigma: ``(n,)``, float32 (float64 if a matrix is): ``sigma_1``, NaN for a matrix that is not finite,
            or whose squares are not (in float32 beyond 1e19; below 1e-19 they fade, and it is rough).
        residual: ``(n,)``, ``||A^T A v - sigma^2 v|| / sigma^2``, 0 for a zero matrix.
        passes: ``(n,)``, int64 on the CPU: products with the matrix or its transpose.
        state: pass it to the next call.
    """

    sigma: Tensor
    residual: Tensor
    passes: Tensor
    state: SpectralState = field(repr=False)


def top_singular_values(
    matrices: Sequence[Tensor],
    state: SpectralState | None = None,
    *,
    rank: int = 4,
    iterations: int | None = None,
    tolerance: float = 2e-5,
    watched: bool | None = None,
) -> SpectralEstimate:
    """Estimate the largest singular value of each matrix.

    Args:
        matrices: 2-D, any floating dtype; low precision is computed in float32.
        state: of the last call over the same matrices, to start warm; one that does not fit them is not used.
        rank: warm vectors kept per matrix; the block has two random ones more. 4 is Redline's choice: close runners-up
            stay at hand when they overtake, and products with 6 vectors at once cost little more than with one.
        iterations: the most block iterations, two products each; by default 24, and unwatched 16 cold and 6 warm.
        tolerance: relative error of ``sigma_1`` at which a watched matrix is done, by a bound of Kato and Temple's kind
            on what the Ritz value may still gain. No certificate: a new top that the random vectors hardly touch may
            take several calls to be found.
        watched: whether to ask for convergence after each iteration, which waits for an accelerator; by default on the
            CPU only. Unwatched, exactly ``iterations`` are made, and a matrix that was zero or not finite the last time
            takes a few calls to be warm: its residual says so.

    Returns:
        Estimates on the matrices' device. The random vectors come from a generator of this function's own.

    Raises:
        ValueError: if ``rank`` is not from 1 to 127.
    """
    if not 0 < rank < _SMALL:  # a block of rank + 2 rows must fit the shortest side that is iterated on
        raise ValueError(f"rank must be from 1 to {_SMALL - 1}, got {rank}: it is how many warm vectors are kept")
    state = state or SpectralState()
    if not matrices:
        return SpectralEstimate(torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.int64), state)
    starts = _fitting(state.vectors, matrices, rank)
    found: dict[int, _Found] = {}
    for places in _groups(matrices, starts, rank):
        group = [matrices[place].detach() for place in places]
        device = group[0].device
        asks = device.type == "cpu" if watched is None else watched
        with torch.autocast(device.type, enabled=False):  # the caller's would round the products
            if min(group[0].shape) <= _SMALL:
                results = _decomposed(group, asks)
            else:
                warm = [start for place in places if (start := starts[place]) is not None]
                generator = torch.Generator(device).manual_seed(state.seed + places[0])
                results = _iterated(group, warm, generator, rank, iterations, tolerance, asks)
        found.update(zip(places, results, strict=True))
    sigma, residual, passes, vectors = zip(*(found[place] for place in range(len(matrices))), strict=True)
    return SpectralEstimate(
        torch.stack(sigma),
        torch.stack(residual),
        torch.tensor(passes),
        SpectralState(vectors, state.seed + len(matrices)),
    )


def _fitting(vectors: Sequence[Tensor | None], matrices: Sequence[Tensor], rank: int) -> list[Tensor | None]:
    """The warm start of each matrix; None where there is none, where it does not fit, and where none is needed."""
    if len(vectors) != len(matrices):
        return [None] * len(matrices)
    sides = [min(matrix.shape) for matrix in matrices]
    return [
        start if side > _SMALL and start is not None and start.shape == (side, rank) else None
        for side, start in zip(sides, vectors, strict=True)
    ]


def _groups(matrices: Sequence[Tensor], starts: Sequence[Tensor | None], rank: int) -> Iterator[list[int]]:
    """Places of those that go together: of one shorter side and precision, all warm or all cold."""
    alike: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for place, (matrix, start) in enumerate(zip(matrices, starts, strict=True)):
        alike[min(matrix.shape), start is None, _precision(matrix), matrix.device].append(place)
    for places in alike.values():
        n = min(matrices[places[0]].shape)
        most = max(1, _AT_ONCE // (n * (n if n <= _SMALL else rank + _FRESH)))
        for first in range(0, len(places), most):
            yield places[first : first + most]


def _decomposed(matrices: Sequence[Tensor], watched: bool) -> list[_Found]:
    """Those of one short side, by their Gram matrices."""
    dtype = _precision(matrices[0])
    gram = torch.stack([_gram(one if one.shape[0] >= one.shape[1] else one.mT, dtype) for one in matrices])
    told = _told(*_top_and_residual(gram, watched), dtype)
    return [(sigma, residual, 2, None) for sigma, residual in zip(*told, strict=True)]


def _top_and_residual(gram: Tensor, watched: bool) -> tuple[Tensor, Tensor]:
    """The largest eigenvalue of Gram matrices, ``(..., n, n)``, and its relative residual."""
    theta, vectors = _eigenpairs(gram, 1, watched)
    top, vector = theta[..., 0], vectors[..., :1]
    off = gram @ vector - top[..., None, None] * vector
    return top, torch.linalg.vector_norm(off, dim=(-2, -1)) / top


def _iterated(
    matrices: Sequence[Tensor],
    warm: Sequence[Tensor],
    generator: torch.Generator,
    rank: int,
    iterations: int | None,
    tolerance: float,
    watched: bool,
) -> list[_Found]:
    """Those of one longer side ``n``: each its own products, and all together what is small.

    ``warm``: their starts, or none. Which of them go on after a round is asked for watched alone.
    """
    n, dtype = min(matrices[0].shape), _precision(matrices[0])
    start = torch.stack([one.mT.to(generator.device, dtype) for one in warm]) if warm else None
    iterations = _most_iterations(iterations, start is not None, watched)
    going = list(range(len(matrices)))
    found: dict[int, _Found] = {}
    basis = newest = _starting_block(start, (len(matrices), rank + _FRESH, n), generator, dtype)
    returns = basis[:, :0]  # A^T A q for the rows q of the basis: both (matrices that go on, rows, n)
    while True:
        back = torch.stack([_there_and_back(matrices[place], x) for place, x in zip(going, newest, strict=True)])
        returns = torch.cat([returns, back], dim=1)
        rounds = returns.shape[1] // back.shape[1]
        last = rounds == iterations or basis.shape[1] + newest.shape[1] > n
        if last or (watched and rounds >= _LEAST_ITERATIONS):
            theta, coefficients, residuals = _ritz_pairs(basis, returns, rank, watched)
            ends = [True] * len(going) if last else _has_settled(theta, residuals, tolerance).tolist()
            vectors = coefficients[:, :, :rank].mT.to(dtype) @ basis
            # A matrix that is not finite for one step must not take the warm start with it.
            vectors = torch.where(torch.isfinite(vectors).all((1, 2), keepdim=True), vectors, basis[:, :rank])
            sigma, residual = _told(theta[:, 0], torch.linalg.vector_norm(residuals[:, 0], dim=1), dtype)
            for index, place in enumerate(going):
                if ends[index]:
                    found[place] = sigma[index], residual[index], 2 * rounds, vectors[index].mT.clone()
            on = [index for index, end in enumerate(ends) if not end]
            if not on:
                return [found[place] for place in range(len(matrices))]
            if len(on) < len(going):
                going, basis, returns, back = [going[index] for index in on], basis[on], returns[on], back[on]
        basis = _extended(basis, back, generator)
        newest = basis[:, -back.shape[1] :]


def _precision(matrix: Tensor) -> torch.dtype:
    """What a matrix is computed in."""
    return matrix.dtype if matrix.dtype in (torch.float32, torch.float64) else torch.float32


def _most_iterations(asked: int | None, warm: bool, watched: bool) -> int:
    if asked is not None:
        return asked
    return _MOST_ITERATIONS if watched else _UNWATCHED_ITERATIONS["warm" if warm else "cold"]


def _told(theta: Tensor, residual: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``sigma`` and its relative residual, that of a zero matrix being 0."""
    theta = theta.clamp_min(0.0)  # of nothing but rounding
    return theta.sqrt().to(dtype), torch.where(theta == 0, 0.0, residual).to(dtype)


def _gram(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """``A^T A``, computed in ``dtype``, in float64."""
    gram = torch.zeros(matrix.shape[1], matrix.shape[1], dtype=dtype, device=matrix.device)
    for tile in _tiles(matrix):
        rows = tile.to(dtype)
        gram.addmm_(rows.mT, rows)
    return gram.double()


def _starting_block(
    start: Tensor | None, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype
) -> Tensor:
    """Orthonormal rows, ``(..., rows, n)``: those of the warm start, ``(..., rank, n)``, and random ones."""
    block = torch.randn(shape, generator=generator, dtype=dtype, device=generator.device)
    if start is not None:
        block[..., : start.shape[-2], :] = start
    return _extended(block[..., :0, :], block, generator)


def _there_and_back(matrix: Tensor, x: Tensor) -> Tensor:
    """``A^T A q`` for the rows ``q`` of ``x``, ``(b, n)``; ``A`` is the matrix with its longer side first."""
    if matrix.shape[0] < matrix.shape[1]:
        return _by_rows(matrix, _by_columns(matrix, x))
    return _by_columns(matrix, _by_rows(matrix, x))


def _by_rows(matrix: Tensor, x: Tensor) -> Tensor:
    """``x M^T``, ``(b, m)``; the order of the factors is what BLAS is quick at."""
    if matrix.dtype == x.dtype:
        return (matrix @ x.mT).mT
    return torch.cat([(tile.to(x.dtype) @ x.mT).mT for tile in _tiles(matrix)], dim=1)


def _by_columns(matrix: Tensor, y: Tensor) -> Tensor:
    """``y M``, ``(b, n)``."""
    if matrix.dtype == y.dtype:
        return y @ matrix
    found, first = y.new_zeros(len(y), matrix.shape[1]), 0
    for tile in _tiles(matrix):
        found.addmm_(y[:, first : first + len(tile)], tile.to(y.dtype))
        first += len(tile)
    return found


def _tiles(matrix: Tensor) -> tuple[Tensor, ...]:
    """Rows at a time, so that no more than a tile is ever copied into another precision."""
    return matrix.split(max(1, _TILE // max(1, matrix.shape[1])))


def _extended(basis: Tensor, block: Tensor, generator: torch.Generator, precision: torch.dtype | None = None) -> Tensor:
    """The basis, ``(..., k, n)``, and orthonormal rows for what those of the block add to it.

    By Gram and Schmidt, a row at a time: LAPACK's QR on accelerators takes one matrix after the other. Rows that add
    nothing but rounding (the space is invariant, the rank is exhausted) are drawn anew. What one that adds hardly more
    has within the basis, once it is normalized, is taken out again, and "twice is enough" (Kahan, Parlett): were the
    basis not orthogonal, the Ritz value would exceed the singular value.

    Args:
        precision: what the block was computed in, where that is not its own.
    """
    tiny = torch.finfo(block.dtype).tiny
    block = block / block.abs().amax((-2, -1), keepdim=True).clamp_min(tiny)  # squares of large entries would overflow
    block = block / torch.linalg.vector_norm(block, dim=-1, keepdim=True).amax(-2, keepdim=True).clamp_min(tiny)
    fresh = torch.randn(block.shape, generator=generator, dtype=block.dtype, device=block.device)
    noise = 100 * torch.finfo(precision or block.dtype).eps
    first = basis.shape[-2]
    whole = torch.cat([basis, block], dim=-2)
    for place, other in enumerate(fresh.split(1, dim=-2), start=first):
        before, row = whole[..., :place, :], whole[..., place : place + 1, :]
        row = row - (row @ before.mT) @ before
        row = torch.where(torch.linalg.vector_norm(row, dim=-1, keepdim=True) <= noise, other, row)
        row = row / torch.linalg.vector_norm(row, dim=-1, keepdim=True)
        row = row - (row @ before.mT) @ before
        whole[..., place : place + 1, :] = row / torch.linalg.vector_norm(row, dim=-1, keepdim=True)
    return whole


def _ritz_pairs(basis: Tensor, returns: Tensor, rank: int, watched: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Ritz values, largest first; their vectors' coefficients in the basis, as columns; their residuals, as rows.

    Residuals are relative to the top value: their squares, and those of a small matrix, would vanish otherwise.
    Unwatched, ``rank`` pairs. ``returns``: ``A^T A q`` for the rows ``q`` of the basis.
    """
    gram = (returns @ basis.mT).double()
    theta, coefficients = _eigenpairs((gram + gram.mT) / 2, rank, watched)
    rows = coefficients.mT / theta[..., :1, None].clamp_min(torch.finfo(basis.dtype).tiny)
    return theta, coefficients, rows.to(basis.dtype) @ returns - (theta[..., None] * rows).to(basis.dtype) @ basis


def _eigenpairs(gram: Tensor, rank: int, watched: bool) -> tuple[Tensor, Tensor]:
    """Eigenvalues of Gram matrices, ``(..., k, k)``, largest first, and their vectors as columns.

    All of them; unwatched, ``rank``.
    """
    if not watched:
        vectors = _top_vectors_by_squaring(gram, rank)
    else:
        finite = gram.isfinite().all((-2, -1), keepdim=True)
        vectors = torch.linalg.eigh(torch.where(finite, gram, 0.0)).eigenvectors.flip(-1)
        vectors = torch.where(finite, vectors, math.nan)
    return (vectors * (gram @ vectors)).sum(-2), vectors


def _top_vectors_by_squaring(gram: Tensor, rank: int) -> Tensor:
    """The same by repeated squaring, where LAPACK would wait for the device, or raise on a NaN."""
    tiny = torch.finfo(gram.dtype).tiny
    rest, vectors = gram / gram.abs().amax((-2, -1), keepdim=True).clamp_min(tiny), []
    for _ in range(rank):
        power = rest
        for _ in range(_SQUARINGS):
            size = torch.linalg.matrix_norm(power, keepdim=True)  # not the trace: noise has any
            power = power / size.clamp_min(tiny)
            power = power @ power
        largest = power.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None]
        column = power.take_along_dim(largest, dim=-1)
        vectors.append(column / torch.linalg.vector_norm(column, dim=-2, keepdim=True).clamp_min(tiny))
        # Deflate on both sides: the next top vector is that of what is left.
        rest = rest - (rest @ vectors[-1]) @ vectors[-1].mT
        rest = rest - vectors[-1] @ (vectors[-1].mT @ rest)
    return torch.cat(vectors, dim=-1)


def _has_settled(theta: Tensor, residuals: Tensor, tolerance: float) -> Tensor:
    """Whether what the top Ritz value may still gain is below the tolerance; the residuals are relative to it.

    With ``Theta`` the values of the leading ``k`` Ritz vectors, ``R`` their residuals, and ``c < theta_1`` above all
    eigenvalues of what is orthogonal to them, ``lambda_1 <= lambda_max(Theta + R R^T / (theta_1 - c))``: for ``k = 1``
    the bound of Kato and Temple. ``c`` is taken from the other Ritz values and their residuals, those of the fresh
    vectors among them, and the best ``k`` counts: ``c`` is estimated, not proven, since a direction that the basis
    hardly touches can hide, so this is a stopping rule and no certificate. sigma errs by half of what theta does.
    """
    top = theta[..., 0]
    settled = (top <= 0) | ~top.isfinite()
    theta = theta / top[..., None]
    overlap = (residuals @ residuals.mT).double()
    ceilings = theta + overlap.diagonal(dim1=-2, dim2=-1).sqrt()
    ceilings = ceilings.flip(-1).cummax(-1).values.flip(-1)
    for k in range(min(residuals.shape[-2] - 1, _LEADING), 0, -1):
        if bool(settled.all()):
            break
        gap = 1 - ceilings[..., k]
        bound = theta[..., :k].diag_embed() + overlap[..., :k, :k] / gap[..., None, None]
        told = (gap > 0) & bound.isfinite().all((-2, -1))
        most = torch.linalg.eigvalsh(torch.where(told[..., None, None], bound, 0.0))[..., -1]
        settled = settled | (told & (most - 1 < _MARGIN * 2 * tolerance))
    return settled
