"""Ghost radii: how far cross-entropy's Taylor series converges along a step.

For logits that move on a line, ``z + t a``, the softmax normalizer ``F(t) = sum_k exp(z_k + a_k t)`` has complex
zeros, the *ghosts*; the Taylor series of the loss in ``t`` converges up to the nearest one. Symbols: ``a`` the logit
tangent of one sample, ``Delta_a = max_k a_k - min_k a_k`` its spread, ``delta`` the gap between two logits.

Source: *Ghosts of Softmax* (arXiv 2603.13552), theorems 4.3 (two classes) and 4.6 (the bound).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def tangent_spread(tangent: Tensor) -> Tensor:
    """Spread of the logit tangent over the classes, ``Delta_a``.

    Args:
        tangent: ``(..., classes)``, floating. One class stands for the two logits ``(z, 0)`` of a binary classifier.

    Returns:
        ``(...)``: ``max_k a_k - min_k a_k``, in the tangent's dtype; NaN where an entry is NaN.
    """
    if tangent.shape[-1] == 1:
        return tangent.squeeze(-1).abs()
    return tangent.amax(dim=-1) - tangent.amin(dim=-1)


def ghost_radius(tangent: Tensor) -> Tensor:
    """Ghost radius bound ``rho_a = pi / Delta_a``: a lower bound on the convergence radius, whatever the logits.

    The radius comes in units of the vector that the tangent was taken along: with ``a = J p`` it counts steps ``p``, so
    that the normalized step size is ``r = 1 / ghost_radius(a)``.

    Args:
        tangent: ``(..., classes)``, floating.

    Returns:
        ``(...)``: infinite where the spread is 0. Source: arXiv 2603.13552, theorem 4.6.
    """
    return math.pi / tangent_spread(tangent)


def normalized_step_size(tangent: Tensor, mask: Tensor | None = None, quantile: float = 1.0) -> Tensor:
    """Normalized step size ``r = max_x spread_k(J_z(x) p) / pi`` of the step ``p`` that the tangent was taken along.

    Args:
        tangent: ``(..., classes)``, floating, ``J_z p``.
        mask: ``(...)``, bool, positions that count; None for all.
        quantile: in (0, 1]: the smallest spread that at least this share of the positions do not exceed stands for the
            maximum. 1 is the definition; below it the most fragile positions are given up.

    Returns:
        0-d, 0 if no position counts; NaN if a spread is, but for a quantile below all of these. Nobody waits for it.
        Source: arXiv 2603.13552, definition 5.1.
    """
    spread = tangent_spread(tangent)
    if mask is not None:
        spread = torch.where(mask, spread, 0.0)
    if not spread.numel():
        return spread.new_zeros(())
    if quantile == 1:
        return spread.amax() / math.pi
    ordered = spread.flatten().sort().values  # NaN comes last; positions that do not count are zeros, and come first
    positions = ordered.numel()
    counted = torch.tensor(positions) if mask is None else mask.sum()
    # In float32 q * n may round up past a whole number: a hair less is asked for.
    rank = torch.ceil(counted.double() * quantile - 1e-9).long().clamp(1)
    return (
        ordered.gather(0, (positions - counted + rank - 1).clamp(0, positions - 1).reshape(1).to(ordered.device))[0]
        / math.pi
    )


def binary_ghost_radius(margin: Tensor, gap: Tensor) -> Tensor:
    """Exact ghost radius for two classes: ``rho* = sqrt(delta^2 + pi^2) / |Delta_a|``.

    Args:
        margin: ``delta = z_1 - z_0``, the logit gap, any shape, floating.
        gap: ``a_1 - a_0``, the gap of the logit tangents, broadcastable with ``margin``.

    Returns:
        The radius, in units of the vector that the tangent was taken along; infinite where ``gap`` is 0.
        Source: arXiv 2603.13552, theorem 4.3.
    """
    return torch.hypot(margin, torch.full_like(margin, math.pi)) / gap.abs()
