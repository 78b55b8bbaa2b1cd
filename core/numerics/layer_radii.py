"""Radii of single layers: how far attention and activations follow their Taylor series along a step.

A layer's own input moves on a line, too, ``h + t dh``. Attention is a softmax over keys and has ghosts of its own. An
activation has singularities: the kinks of the ReLU family are real, those of smooth functions lie in the complex plane.
Symbols: ``S`` pre-softmax attention logits, ``A`` the attention weights, ``h`` an activation's input, ``s`` its nearest
singularity, ``d`` in front of each the tangent along the whole step. Lengths are in steps, as r is: 1 is the redline.

Source: *Ghosts of Softmax* (arXiv 2603.13552), appendix 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

QUANTILE = 0.01
"""Of an activation's radii, the one that counts: the paper's 1 %."""

MOST_INPUTS = 2**17
"""Inputs of one activation to take radii of: a 1 % quantile over so many is good to about 3 %. Redline's choice."""

# Scores so far below their row's highest are masked: softmax has underflowed long before, in any precision.
_MASKED = 1e4

Singularities: TypeAlias = tuple[complex, ...]


def attention_scores(
    query: tuple[Tensor, Tensor | None],
    key: tuple[Tensor, Tensor | None],
    mask: tuple[Tensor, Tensor | None] | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """Pre-softmax attention logits of ``F.scaled_dot_product_attention`` and their tangent.

    Args:
        query: ``(..., heads, queries, width)``, with its tangent or None where it does not move.
        key: ``(..., heads, keys, width)``, likewise.
        mask: broadcastable with ``(..., heads, queries, keys)``, likewise: bool, true for keys that count, or floating,
            added to the scores.
        is_causal: leave out keys that come after the query.
        scale: of the scores; None for ``1 / sqrt(width)``.
        enable_gqa: repeat the heads of the keys until there are as many as of the queries.

    Returns:
        ``S`` and ``dS = (dq k^T + q dk^T) * scale``, each ``(..., heads, queries, keys)``; ``S`` is -inf where masked.
    """
    (q, dq), (k, dk) = (_with_tangent(*query), _with_tangent(*key))
    if enable_gqa:
        k, dk = (one.repeat_interleave(q.shape[-3] // k.shape[-3], -3) for one in (k, dk))
    k, dk = k.transpose(-2, -1), dk.transpose(-2, -1)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    scores, tangent = q @ k * factor, (dq @ k + q @ dk) * factor
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    if mask is not None and mask[0].dtype == torch.bool:
        scores = scores.masked_fill(~mask[0], -math.inf)
    elif mask is not None:
        bias, moved = _with_tangent(*mask)
        scores, tangent = scores + bias, tangent + moved
    return scores, tangent


def attention_step_size(scores: Tensor, tangent: Tensor) -> Tensor:
    """Length of the step over the radius of attention: ``max spread_k(dS) / pi`` over samples, heads and queries.

    A constant added to a row of either changes nothing, so that ``log A`` and ``dA / A`` serve as well.

    Args:
        scores: ``(..., keys)``, floating, ``S``. Keys 10,000 or more below their row's highest are masked: left out.
        tangent: ``(..., keys)``, ``dS``.

    Returns:
        0-d; 0 where no row has two keys; NaN where a tangent that counts is. Source: arXiv 2603.13552, appendix 2.
    """
    masked = scores <= scores.amax(-1, keepdim=True) - _MASKED
    highest, lowest = tangent.masked_fill(masked, -math.inf).amax(-1), tangent.masked_fill(masked, math.inf).amin(-1)
    return (highest - lowest).clamp(min=0).amax() / math.pi  # a row that is masked altogether gives -inf


def activation_radius(inputs: Tensor, tangent: Tensor, singularities: Singularities) -> Tensor:
    """Radius of each input of an activation: ``|s - h| / |dh|``, in steps.

    Args:
        inputs: ``h``, any shape, floating, real.
        tangent: ``dh``, of the same shape.
        singularities: of the activation, those of the upper half-plane: it is real on the real line.

    Returns:
        Of the inputs' shape; infinite where ``dh`` is 0. Source: arXiv 2603.13552, appendix 2.
    """
    distance = torch.full_like(inputs, math.inf)
    for point in singularities:
        apart = inputs - point.real
        distance = torch.minimum(distance, torch.hypot(apart, torch.full_like(apart, point.imag)))
    return (distance / tangent.abs()).masked_fill(tangent == 0, math.inf)


def activation_step_size(radii: Tensor, quantile: float = QUANTILE) -> Tensor:
    """Length of the step over the radius of one activation: 1 over a low quantile of its inputs' radii.

    Args:
        radii: any shape, floating, in steps; at least one.
        quantile: in (0, 1]: the smallest radius that at least this share of the inputs do not exceed.

    Returns:
        0-d; 0 where that radius is infinite; NaN where a radius is. Source: arXiv 2603.13552, appendix 2, for 1 %.
    """
    rank = min(max(math.ceil(quantile * radii.numel() - 1e-9), 1), radii.numel())
    radius = radii.flatten().kthvalue(rank).values
    return 1 / torch.where(radii.isnan().any(), math.nan, radius)


def thinned(inputs: Tensor) -> Tensor:
    """At most ``MOST_INPUTS`` of the inputs, ``(n,)``: every so-many-th, at a stride that visits all columns."""
    stride = -(-inputs.numel() // MOST_INPUTS)
    while math.gcd(stride, inputs.numel()) > 1 and stride > 1:
        stride += 1
    return inputs.flatten()[::stride]


def _with_tangent(primal: Tensor, tangent: Tensor | None) -> tuple[Tensor, Tensor]:
    return primal, torch.zeros_like(primal) if tangent is None else tangent


@cache
def _tanh_gelu() -> Singularities:
    """Where the argument of GELU's tanh, ``sqrt(2 / pi) (x + 0.044715 x^3)``, is an odd multiple of ``i pi / 2``.

    The first eight multiples hold the nearest singularity of every input within 9 of 0; beyond, radii come out longer.
    """
    linear = math.sqrt(2 / math.pi)
    roots = np.concatenate(
        [np.roots([0.044715 * linear, 0, linear, -1j * math.pi / 2 * odd]) for odd in range(-15, 16, 2)]
    )
    return tuple(complex(root) for root in roots if root.imag > 0)


_KINK: Singularities = (0,)
_LOGISTIC: Singularities = (1j * math.pi,)  # of 1 / (1 + e^-x); the other poles are farther from every real input
_TANH: Singularities = (1j * math.pi / 2,)
_MISH: Singularities = (complex(math.log(2) / 2, 3 * math.pi / 4),)  # 1 + (1 + e^x)^2 = 0: e^x = -1 +- i


def _always(singularities: Singularities) -> Callable[..., Singularities]:
    return lambda *_, **__: singularities


def _gelu(_: Tensor, approximate: str = "none") -> Singularities:
    return _tanh_gelu() if approximate == "tanh" else ()  # x Phi(x) is entire


def _softplus(_: Tensor, beta: float = 1.0, *__: Any, **___: Any) -> Singularities:
    return (1j * math.pi / beta,)


def _hardtanh(_: Tensor, min_val: float = -1.0, max_val: float = 1.0, *__: Any, **___: Any) -> Singularities:
    return (min_val, max_val)


def _threshold(_: Tensor, threshold: float, *__: Any, **___: Any) -> Singularities:
    return (threshold,)


def _shrink(_: Tensor, lambd: float = 0.5) -> Singularities:
    return (-lambd, lambd)


def _under(entry: Callable[..., Singularities], *functions: Any) -> dict[Any, Callable[..., Singularities]]:
    return dict.fromkeys(functions, entry)


T = torch.Tensor
SINGULARITIES: Mapping[Any, Callable[..., Singularities]] = {
    **_under(
        _always(_KINK),
        F.relu, F.relu_, torch.relu, T.relu, T.relu_,
        F.leaky_relu, F.leaky_relu_, F.prelu, T.prelu, F.rrelu, F.rrelu_, torch.rrelu,
        F.elu, F.elu_, F.selu, F.selu_, torch.selu, F.celu, F.celu_, torch.celu, F.softsign,
    ),
    **_under(_always((0, 6)), F.relu6),
    **_under(_always((-3, 3)), F.hardswish, F.hardsigmoid),
    **_under(_hardtanh, F.hardtanh, F.hardtanh_),
    **_under(_threshold, F.threshold, torch.threshold, torch.threshold_),
    **_under(_shrink, F.softshrink, F.hardshrink, T.hardshrink),
    **_under(
        _always(_LOGISTIC),
        F.sigmoid, torch.sigmoid, torch.sigmoid_, T.sigmoid, T.sigmoid_, torch.special.expit,
        F.silu, F.logsigmoid, F.glu,
    ),
    **_under(_softplus, F.softplus),
    **_under(_always(_TANH), F.tanh, torch.tanh, torch.tanh_, T.tanh, T.tanh_, F.tanhshrink),
    **_under(_gelu, F.gelu),
    **_under(_always(_MISH), F.mish),
}  # fmt: skip
"""Of each activation, called with its own arguments: its singularities in the upper half-plane; none for an entire one.

``F.glu`` has them in the second half of its input.
"""
