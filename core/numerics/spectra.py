"""Top singular values by a warm-started block Krylov iteration.

For a matrix ``A`` of shape ``(m, n)``, ``m >= n`` (wide ones are transposed), the block Krylov space of ``A^T A`` from
a starting block ``X`` is grown one product with ``A`` and one with ``A^T`` at a time; Rayleigh-Ritz on it gives the top
Ritz value ``theta``, an estimate of ``sigma_1^2`` from below, with its vector ``v`` and the residual
``||A^T A v - theta v|| / theta``. The block starts from the top vectors of the last call (warm) and two random ones,
because a small residual proves *a* singular value, not the largest: they notice when another has grown past it. Vectors
are kept as rows: products with a few of them at once then take little longer than with one. Where the shorter side is
short, the Gram matrix is decomposed instead.

Source: Musco & Musco, *Randomized Block Krylov Methods* (arXiv 1504.05477); Kato (1949) and Temple (1928) for
the bound that stops it; the warm start and the fresh vectors are Redline's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

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
            or whose entries' squares are not (in float32 beyond 1e19).
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
    """
    state = state or SpectralState()
    warm = state.vectors if len(state.vectors) == len(matrices) else (None,) * len(matrices)
    results = []
    for index, (matrix, start) in enumerate(zip(matrices, warm, strict=True)):
        with torch.autocast(matrix.device.type, enabled=False):  # the caller's would round the products
            found = _top_singular_value(
                matrix.detach(), start, state.seed + index, rank, iterations, tolerance, watched
            )
        results.append(found)
    if not results:
        return SpectralEstimate(torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.int64), state)
    sigma, residual, passes, vectors = zip(*results, strict=True)
    return SpectralEstimate(
        torch.stack(sigma),
        torch.stack(residual),
        torch.tensor(passes),
        SpectralState(vectors, state.seed + len(matrices)),
    )


def _top_singular_value(
    matrix: Tensor,
    start: Tensor | None,
    seed: int,
    rank: int,
    iterations: int | None,
    tolerance: float,
    watched: bool | None,
) -> tuple[Tensor, Tensor, int, Tensor | None]:
    dtype = matrix.dtype if matrix.dtype in (torch.float32, torch.float64) else torch.float32
    n = min(matrix.shape)
    watched = matrix.device.type == "cpu" if watched is None else watched
    if n <= _SMALL:
        gram = _gram(matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT, dtype)
        theta, vectors = _eigenpairs(gram, 1, watched)
        off = torch.linalg.vector_norm(gram @ vectors[:, 0] - theta[0] * vectors[:, 0])
        return *_told(theta[0], off, dtype), 2, None

    generator = torch.Generator(matrix.device).manual_seed(seed)
    start = start.mT.to(matrix.device, dtype) if start is not None and start.shape == (n, rank) else None
    iterations = _most_iterations(iterations, start is not None, watched)
    like = torch.empty(0, dtype=dtype, device=matrix.device)
    basis = newest = _starting_block(n, start, rank, generator, like)
    images: list[Tensor] = []  # (A q)^T for the rows q of the basis, block by block
    returns: list[Tensor] = []  # (A^T A q)^T
    while True:
        image, back = _there_and_back(matrix, newest)
        images.append(image)
        returns.append(back)
        y, z = torch.cat(images), torch.cat(returns)
        theta, coefficients = _eigenpairs((y @ y.mT).double(), rank, watched)
        residuals = _residuals(theta, coefficients, basis, z)
        if len(images) == iterations or len(basis) + len(newest) > n:
            break
        if watched and len(images) >= _LEAST_ITERATIONS and _has_settled(theta, residuals, tolerance):
            break
        newest = _next_block(back, basis, generator)
        basis = torch.cat([basis, newest])
    vectors = (coefficients[:, :rank].to(dtype).mT @ basis).mT
    # A matrix that is not finite for one step must not take the warm start with it.
    keep = _starting_block(n, start, rank, generator, like).mT[:, :rank]
    vectors = torch.where(torch.isfinite(vectors).all(), vectors, keep)
    return *_told(theta[0], torch.linalg.vector_norm(residuals[0]), dtype), 2 * len(images), vectors


def _most_iterations(asked: int | None, warm: bool, watched: bool) -> int:
    if asked is not None:
        return asked
    return _MOST_ITERATIONS if watched else _UNWATCHED_ITERATIONS["warm" if warm else "cold"]


def _told(theta: Tensor, off: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``sigma`` and its relative residual."""
    return theta.sqrt().to(dtype), torch.where(theta == 0, 0.0, off / theta).to(dtype)


def _gram(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """``A^T A``, computed in ``dtype``, in float64."""
    gram = torch.zeros(matrix.shape[1], matrix.shape[1], dtype=dtype, device=matrix.device)
    for tile in _tiles(matrix):
        rows = tile.to(dtype)
        gram.addmm_(rows.mT, rows)
    return gram.double()


def _starting_block(n: int, start: Tensor | None, rank: int, generator: torch.Generator, like: Tensor) -> Tensor:
    fresh = torch.randn(
        rank + _FRESH if start is None else _FRESH, n, generator=generator, dtype=like.dtype, device=like.device
    )
    return _orthonormal(fresh if start is None else torch.cat([start, fresh]))


def _orthonormal(rows: Tensor) -> Tensor:
    return torch.linalg.qr(rows.mT).Q.mT


def _there_and_back(matrix: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """``(A q)^T`` and ``(A^T A q)^T`` for the rows ``q`` of ``x``; ``A`` is the matrix with its longer side first."""
    if matrix.shape[0] < matrix.shape[1]:
        y = _by_columns(matrix, x)
        return y, _by_rows(matrix, y)
    y = _by_rows(matrix, x)
    return y, _by_columns(matrix, y)


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


def _next_block(
    block: Tensor, basis: Tensor, generator: torch.Generator, precision: torch.dtype | None = None
) -> Tensor:
    """An orthonormal basis of what the block's rows add to the basis; ``precision``: that the block was computed in.

    Rows that add nothing but rounding (the space is invariant, the rank is exhausted) are drawn anew. One that adds
    hardly more lies mostly within the basis again once it is normalized, so "twice is enough" (Kahan, Parlett) is
    counted from there: were the basis not orthogonal, the Ritz value would exceed the singular value.
    """
    tiny = torch.finfo(block.dtype).tiny
    block = block / block.abs().amax().clamp_min(tiny)  # the squares of large entries would overflow
    block = block / torch.linalg.vector_norm(block, dim=1).amax().clamp_min(tiny)
    q, triangle = torch.linalg.qr((block - (block @ basis.mT) @ basis).mT)
    noise = triangle.diagonal().abs() <= 100 * torch.finfo(precision or block.dtype).eps
    fresh = torch.randn(block.shape, generator=generator, dtype=block.dtype, device=block.device)
    block = torch.where(noise[:, None], fresh, q.mT)
    for _ in range(2):
        block = _orthonormal(block - (block @ basis.mT) @ basis)
    return block


def _eigenpairs(gram: Tensor, rank: int, watched: bool) -> tuple[Tensor, Tensor]:
    """Eigenvalues of a Gram matrix, largest first, and their vectors as columns.

    All of them; unwatched, ``rank``.
    """
    if not watched:
        vectors = _top_vectors_by_squaring(gram, rank)
    elif bool(gram.isfinite().all()):
        vectors = torch.linalg.eigh(gram).eigenvectors.flip(1)
    else:
        vectors = torch.full_like(gram, math.nan)
    return (vectors * (gram @ vectors)).sum(0), vectors


def _residuals(theta: Tensor, coefficients: Tensor, basis: Tensor, z: Tensor) -> Tensor:
    """``A^T A v - theta v`` of the Ritz vectors, as rows; in float64, since squares of small matrices would vanish."""
    narrow = coefficients.mT.to(z.dtype)
    return (narrow @ z).double() - theta[:, None] * (narrow @ basis).double()


def _top_vectors_by_squaring(gram: Tensor, rank: int) -> Tensor:
    """The same by repeated squaring, where LAPACK would wait for the device, or raise on a NaN."""
    rest, vectors = gram, []
    tiny = torch.finfo(gram.dtype).tiny
    for _ in range(rank):
        power = rest
        for _ in range(_SQUARINGS):
            power = power / torch.linalg.vector_norm(power).clamp_min(tiny)  # not the trace: noise has any
            power = power @ power
        column = power.index_select(1, power.diagonal().argmax().reshape(1)).squeeze(1)
        vectors.append(column / torch.linalg.vector_norm(column).clamp_min(tiny))
        # Deflate on both sides: the next top vector is that of what is left.
        rest = rest - torch.outer(rest @ vectors[-1], vectors[-1])
        rest = rest - torch.outer(vectors[-1], vectors[-1] @ rest)
    return torch.stack(vectors, dim=1)


def _has_settled(theta: Tensor, residuals: Tensor, tolerance: float) -> bool:
    """Whether what the top Ritz value may still gain is below the tolerance.

    With ``Theta`` the values of the leading ``k`` Ritz vectors, ``R`` their residuals, and ``c < theta_1`` above all
    eigenvalues of what is orthogonal to them, ``lambda_1 <= lambda_max(Theta + R R^T / (theta_1 - c))``: for ``k = 1``
    the bound of Kato and Temple. ``c`` is taken from the other Ritz values and their residuals, those of the fresh
    vectors among them, and the best ``k`` counts: ``c`` is estimated, not proven, since a direction that the basis
    hardly touches can hide, so this is a stopping rule and no certificate. sigma errs by half of what theta does.
    """
    top = theta[0]
    if top == 0 or not bool(top.isfinite()):
        return True
    overlap = residuals @ residuals.mT
    ceilings = (theta + overlap.diagonal().sqrt()).flip(0).cummax(0).values.flip(0)
    for k in range(min(len(residuals) - 1, _LEADING), 0, -1):
        gap = top - ceilings[k]
        if gap > 0:
            bound = torch.linalg.eigvalsh(theta[:k].diag() + overlap[:k, :k] / gap)[-1]
            if bound - top < _MARGIN * 2 * tolerance * top:
                return True
    return False
