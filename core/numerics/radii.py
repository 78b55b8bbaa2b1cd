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
