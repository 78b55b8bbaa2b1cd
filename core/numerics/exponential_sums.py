"""Sums ``G(t) = sum_k p_k exp(a_k t)`` of many rows, made cheap to evaluate within a given distance of 0.

Tangents ``a`` lie in ``[-1/2, 1/2]``; ``p`` are probabilities, kept as logarithms, since far from 0 classes matter
whose probability underflows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROUNDING = 1e-11
"""Relative to ``sum_k |p_k exp(a_k t)|``: what dropping, binning and rounding may come to, with room to spare."""

_DROP = 40.0  # log: classes below e^-40 of the sum wherever it is evaluated are dropped
_BIN_REACH = 1.0  # the most that (a - the bin's centre) t may come to; 16 terms of the series then err by 5e-14
_TERMS = 16
_AT_A_TIME = 1 << 20  # terms evaluated at a time, to bound memory


class Evaluation(NamedTuple):
    """The sums at some points, each over a positive factor of its own.

    Attributes:
        value: ``G``, complex.
        slope: ``G'``, complex.
        size: ``S = sum_k |p_k exp(a_k t)|``.
        mean: ``mu``, of the tangents under the weights ``|p_k exp(a_k t)|``.
        variance: ``V``, theirs.
    """

    value: Tensor
    slope: Tensor
    size: Tensor
    mean: Tensor
    variance: Tensor


class ExponentialSums:
    """The sums of n rows, good for ``|t| <= reach``.

    Classes that matter nowhere within reach are dropped. Of many classes those whose tangents lie close together enter
    as one bin with the moments of ``a`` about its centre: a class costs once, not at each evaluation.
    """

    def __init__(self, log_p: Tensor, a: Tensor, reach: float) -> None:
        """``log_p``, ``a``: ``(n, classes)``, float64."""
        self.reach = reach
        self._half_width = 0.0
        self._moments: Tensor | None = None
        top, where = log_p.max(dim=1, keepdim=True)
        matters = (
            log_p - top + (a - a.gather(1, where)).abs() * reach
        )  # log of a bound on a class's share of the sum, for |t| <= reach
        kept = int((matters > -_DROP).sum(dim=1).max())
        if kept < a.shape[1]:
            index = matters.topk(kept, dim=1).indices
            log_p, a = log_p.gather(1, index), a.gather(1, index)
        bins = int(reach / (2 * _BIN_REACH)) + 1
        if kept > _TERMS * bins:
            log_p, a, self._moments = _binned(log_p, a, bins)
            self._half_width = 0.5 / bins
        self._log_weight, self._centre = log_p, a

    def __call__(self, row: Tensor, t: Tensor) -> Evaluation:
        """Evaluate rows ``row``, ``(points,)``, at ``t``, ``(points,)`` complex."""
        step = max(_AT_A_TIME // self._centre.shape[1], 1)
        parts = [self._evaluate(*part) for part in zip(row.split(step), t.split(step), strict=True)]
        return Evaluation(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def certified_radius(self) -> Tensor:
        """Radius within which there is no zero, ``(n,)``, at most ``reach``; often above the bound ``pi``.

        With ``b_k = |a_k - E_p[a]|`` there is none within R while ``sum_k p_k (exp(b_k R) - 1 - b_k R) < 1``, which is
        at most ``|exp(-E_p[a] t) G(t) - 1|``.
        """
        p = self._log_weight.exp()
        mean = (p * self._centre).sum(1, keepdim=True) / p.sum(1, keepdim=True)
        b = (self._centre - mean).abs() + 2 * self._half_width
        low, high = torch.zeros_like(mean), torch.full_like(mean, self.reach)
        for _ in range(40):
            middle = (low + high) / 2
            far = ((self._log_weight + b * middle).exp() - p * (1 + b * middle)).sum(1, keepdim=True) < 1 - 1e-9
            low, high = torch.where(far, middle, low), torch.where(far, high, middle)
        return low.squeeze(1)

    def _evaluate(self, row: Tensor, t: Tensor) -> Evaluation:
        log_weight, a, x = self._log_weight[row], self._centre[row], t.real[:, None]
        exponent = log_weight + a * x
        weight = (exponent - exponent.amax(1, keepdim=True)).exp()
        term = torch.polar(weight, a * t.imag[:, None])
        if self._moments is None:
            value, slope = term.sum(1), (a * term).sum(1)
            size, first, second = ((weight * a**j).sum(1) for j in range(3))
        else:
            # Of each bin: P(t) = sum_j m_j t^j / j! and P'(t), as pairs of real numbers; P, P' and P'' at Re t.
            powers = torch.cat([torch.view_as_real(_powers(t, 2)).flatten(2), _powers(t.real, 3)], dim=2)
            at = self._moments[row] @ powers
            p, dp = torch.view_as_complex(at[..., 0:2].contiguous()), torch.view_as_complex(at[..., 2:4].contiguous())
            value, slope = (term * p).sum(1), (term * (a * p + dp)).sum(1)
            q, dq, ddq = at[..., 4:].unbind(2)
            size, first = (weight * q).sum(1), (weight * (a * q + dq)).sum(1)
            second = (weight * (a * a * q + 2 * a * dq + ddq)).sum(1)
        mean = first / size
        return Evaluation(value, slope, size, mean, second / size - mean**2 + 1e-12)  # rounding allowed for


def _powers(t: Tensor, derivatives: int) -> Tensor:
    """``t^j`` for the terms ``j`` and its derivatives, ``(points, terms, derivatives)``, the power itself first."""
    one = torch.ones_like(t)[:, None]
    columns = [torch.cat([one, t[:, None].expand(-1, _TERMS - 1)], dim=1).cumprod(1)]
    j = torch.arange(1, _TERMS, device=t.device)
    for _ in range(derivatives - 1):
        columns.append(torch.cat([0 * one, j * columns[-1][:, :-1]], dim=1))
    return torch.stack(columns, dim=2)


def _binned(log_p: Tensor, a: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logarithms of the bins' weights and their centres, ``(n, bins)``, and moments over j!, ``(n, bins, terms)``."""
    n = len(a)
    index = ((a + 0.5) * bins).long().clamp(0, bins - 1)
    centre = (torch.arange(bins, dtype=a.dtype, device=a.device) + 0.5) / bins - 0.5
    highest = torch.full((n, bins), -torch.inf, dtype=a.dtype, device=a.device)
    highest = highest.scatter_reduce(1, index, log_p, "amax")
    floor = torch.where(highest.isfinite(), highest, 0.0)  # an empty bin has a weight of 0
    weight = (log_p - floor.gather(1, index)).exp()
    offset = a - centre[index]
    moments = []
    for j in range(_TERMS):
        moments.append(torch.zeros_like(highest).scatter_add(1, index, weight))
        weight = weight * offset / (j + 1)
    total = moments[0]
    per_weight = torch.stack(moments, dim=2) / total.clamp(min=torch.finfo(a.dtype).tiny)[..., None]
    return highest + total.log(), centre.expand(n, bins), per_weight
