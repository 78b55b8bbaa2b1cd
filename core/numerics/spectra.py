"""Top singular values by a warm-started block Krylov iteration.

For a matrix ``A`` of shape ``(m, n)``, ``m >= n`` (wide ones are transposed), the block Krylov space of ``A^T A`` from
a starting block ``X`` is grown one product with ``A`` and one with ``A^T`` at a time; Rayleigh-Ritz on it gives the top
Ritz value ``theta``, an estimate of ``sigma_1^2`` from below, with its vector ``v`` and the residual
``||A^T A v - theta v|| / theta``. The block starts from the top vectors of the last call (warm) and one fresh random
column, because a small residual proves *a* singular value, not the largest: the random column notices when another has
grown past it.

Source: Musco & Musco, *Randomized Block Krylov Methods* (arXiv 1504.05477); the warm start, the fresh column and the
stopping rule are Redline's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

_SQUARINGS = 24  # G^(2^24): two Ritz values 1e-6 apart are told from one another
_SMALL = 64  # up to this side the Gram matrix itself is cheaper than an iteration, and exact
_LEAST_ITERATIONS = 2  # before the stopping rule is asked: it needs two increments
_MOST_ITERATIONS = 24  # 48 products: what a cold start on a flat spectrum takes
_UNWATCHED_ITERATIONS = {"cold": 16, "warm": 6}  # where asking for convergence would wait for the device
_SETTLED_RESIDUAL = 0.05  # above it a Ritz value that has stopped growing may only be resting


@dataclass(frozen=True)
class SpectralState:
    """What a call leaves for the next one to start warm from.

    Attributes:
        vectors: for each matrix its top Ritz vectors, ``(min(m, n), rank)`` at most, float32 or float64; None for one
            that is to start cold.
        seed: of the fresh random columns; counts up, so that each call draws others.
    """

    vectors: tuple[Tensor | None, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class SpectralEstimate:
    """Top singular values of ``n`` matrices.

    Attributes:
        sigma: ``(n,)``, float32 (float64 if a matrix is): ``sigma_1``, NaN for a matrix that is not finite.
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
    rank: int = 2,
    iterations: int | None = None,
    tolerance: float = 2e-5,
    watched: bool | None = None,
) -> SpectralEstimate:
    """Estimate the largest singular value of each matrix.

    Args:
        matrices: 2-D, any floating dtype; low precision is computed in float32.
        state: of the last call over the same matrices, to start warm; one that does not fit them is not used.
        rank: warm vectors kept per matrix; the block has one column more. 2 is Redline's choice: a close runner-up
            stays at hand when it overtakes.
        iterations: the most block iterations, two products each; by default 24, and unwatched 16 cold and 6 warm.
        tolerance: relative error of ``sigma_1`` at which a watched matrix is done, as estimated from the geometric
            decay of the Ritz value's increments.
        watched: whether to ask for convergence after each iteration, which waits for an accelerator; by default on the
            CPU only. Unwatched, exactly ``iterations`` are made, and a matrix that was zero or not finite the last time
            takes a few calls to be warm: its residual says so.

    Returns:
        Estimates on the matrices' device. The random columns come from a generator of this function's own.
    """
    state = state or SpectralState()
    warm = state.vectors if len(state.vectors) == len(matrices) else (None,) * len(matrices)
    results = [
        _top_singular_value(matrix.detach(), start, state.seed + index, rank, iterations, tolerance, watched)
        for index, (matrix, start) in enumerate(zip(matrices, warm, strict=True))
    ]
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
) -> tuple[Tensor, Tensor, int, Tensor]:
    a = matrix if matrix.dtype in (torch.float32, torch.float64) else matrix.float()
    a = a.mT if a.shape[0] < a.shape[1] else a
    n = a.shape[1]
    generator = torch.Generator(a.device).manual_seed(seed)
    start = start if start is not None and start.shape == (n, min(rank, n)) else None
    watched = a.device.type == "cpu" if watched is None else watched
    if iterations is None:
        iterations = _MOST_ITERATIONS if watched else _UNWATCHED_ITERATIONS["cold" if start is None else "warm"]

    basis = newest = (
        torch.eye(n, dtype=a.dtype, device=a.device) if n <= _SMALL else _starting_block(a, start, rank, generator)
    )
    images: list[Tensor] = []  # A q for the columns q of the basis, block by block
    returns: list[Tensor] = []  # A^T A q
    ritz_values: list[float] = []
    while True:
        images.append(a @ newest)
        returns.append(a.mT @ images[-1])
        y, z = torch.cat(images, dim=1), torch.cat(returns, dim=1)
        coefficients, theta = _top_ritz_vectors(y, rank, watched)
        top = coefficients[:, 0]
        # In float64: the squares of a matrix of 1e-12 would vanish.
        residual = torch.linalg.vector_norm((z @ top).double() - theta * (basis @ top).double()) / theta
        if len(images) == iterations or basis.shape[1] + newest.shape[1] > n:
            break
        if watched:
            ritz_values.append(float(theta))
            if _has_settled(ritz_values, float(residual), tolerance):
                break
        newest = _next_block(returns[-1], basis, generator)
        basis = torch.cat([basis, newest], dim=1)
    vectors = basis @ coefficients
    # A matrix that is not finite for one step must not take the warm start with it.
    keep = _starting_block(a, start, rank, generator)[:, : vectors.shape[1]]
    vectors = torch.where(torch.isfinite(vectors).all(), vectors, keep)
    return theta.sqrt().to(a.dtype), torch.where(theta == 0, 0.0, residual).to(a.dtype), 2 * len(images), vectors


def _starting_block(a: Tensor, start: Tensor | None, rank: int, generator: torch.Generator) -> Tensor:
    n = a.shape[1]
    columns = min(rank + 1 if start is None else 1, n)
    fresh = torch.randn(n, columns, generator=generator, dtype=a.dtype, device=a.device)
    block = fresh if start is None else torch.cat([start.to(a), fresh], dim=1)
    return torch.linalg.qr(block).Q


def _next_block(block: Tensor, basis: Tensor, generator: torch.Generator) -> Tensor:
    """An orthonormal basis of what the block's columns add to the basis.

    Columns that add nothing but rounding (the space is invariant, the rank is exhausted) are drawn anew. One that adds
    hardly more lies mostly within the basis again once it is normalized, so "twice is enough" (Kahan, Parlett) is
    counted from there: were the basis not orthogonal, the Ritz value would exceed the singular value.
    """
    tiny = torch.finfo(block.dtype).tiny
    block = block / block.abs().amax().clamp_min(tiny)  # the squares of large entries would overflow
    block = block / torch.linalg.vector_norm(block, dim=0).amax().clamp_min(tiny)
    block, triangle = torch.linalg.qr(block - basis @ (basis.mT @ block))
    noise = triangle.diagonal().abs() <= 100 * torch.finfo(block.dtype).eps
    fresh = torch.randn(block.shape, generator=generator, dtype=block.dtype, device=block.device)
    block = torch.where(noise, fresh, block)
    for _ in range(2):
        block = torch.linalg.qr(block - basis @ (basis.mT @ block)).Q
    return block


def _top_ritz_vectors(y: Tensor, rank: int, watched: bool) -> tuple[Tensor, Tensor]:
    """Top eigenvectors of ``G = Y^T Y`` as columns, and the first one's eigenvalue in float64."""
    gram = (y.mT @ y).double()
    rank = min(rank, gram.shape[0])
    if not watched:
        vectors = _top_vectors_by_squaring(gram, rank)
    elif bool(gram.isfinite().all()):
        vectors = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :rank]
    else:
        vectors = gram.new_full((gram.shape[0], rank), math.nan)
    top = vectors[:, 0]
    return vectors.to(y.dtype), top @ gram @ top


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


def _has_settled(ritz_values: list[float], residual: float, tolerance: float) -> bool:
    """Whether what the Ritz value may still gain is below the tolerance.

    Increments of a Krylov iteration fall geometrically or faster, so what is still to come is at most the last one
    times ``rho / (1 - rho)``, with ``rho`` the ratio of the last two. sigma errs by half of what theta does.
    """
    if ritz_values[-1] == 0 or not math.isfinite(ritz_values[-1]):
        return True
    if len(ritz_values) <= _LEAST_ITERATIONS or residual > _SETTLED_RESIDUAL:
        return False
    last, previous = ritz_values[-1] - ritz_values[-2], ritz_values[-2] - ritz_values[-3]
    if last <= 0:
        return True
    decay = min(last / previous, 0.95) if previous > 0 else 0.95
    return last * max(decay, 0.5) / (1 - decay) / 2 < tolerance * ritz_values[-1]
