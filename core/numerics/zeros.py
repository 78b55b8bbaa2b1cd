"""Zeros of exponential sums: counted inside a circle by the argument principle, and found by Newton's iteration."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from redline.numerics.exponential_sums import ROUNDING, ExponentialSums

_DEPTH = 40  # the most halvings of an arc
_STEPS = 30  # of Newton's iteration
_STARTS = 4  # of it, a row
_CONVERGED = 1e-7  # relative length of the last step: zeros of higher multiplicity are found to no more
_POLISHED = 1e-12  # relative length of a step after which there is no other


class Ring(NamedTuple):
    """What was learned on one circle a row.

    Attributes:
        zeros: ``(n,)``, in the upper half of the disc; those of the lower half mirror them.
        decided: ``(n,)``, bool: whether the count is proven; it is not where a zero lies on the circle itself.
        starts: rows ``(m,)`` and points ``(m,)`` near which a zero may lie, at most four a row.
    """

    zeros: Tensor
    decided: Tensor
    starts: tuple[Tensor, Tensor]


def count_zeros(sums: ExponentialSums, rows: Tensor, radius: Tensor) -> Ring:
    """Count the zeros of ``G`` within ``|t| < radius`` of some rows, ``(n,)`` each.

    ``G`` winds round the origin once for every zero. Half the circle is enough: ``G`` is real and positive on the real
    line, and mirrored beneath it. It is cut into arcs, until on each ``G`` provably stays within a half-plane: with
    ``m`` the arc's middle and ``h`` its half length, ``mu``, ``S``, ``V`` as in ``Evaluation``, ``d = max |a_k - mu|``,

        |exp(-mu s) G(m + s) - G(m) - (G'(m) - mu G(m)) s|  <=  S V (exp(d h) - 1 - d h) / d^2    for |s| <= h.
    """
    of, begin, end = _arcs(radius)
    turned = torch.zeros_like(radius)
    decided = torch.ones_like(radius, dtype=torch.bool)
    near: list[tuple[Tensor, Tensor, Tensor]] = []
    ends = torch.polar(radius[of].repeat(2), torch.cat([begin, end]))
    at_begin, at_end = sums(rows[of].repeat(2), ends).value.chunk(2)
    for _ in range(_DEPTH):
        middle, half = (begin + end) / 2, radius[of] * (end - begin) / 2
        m = torch.polar(radius[of], middle)
        at = sums(rows[of], m)
        d = 0.5 + at.mean.abs()
        curved = at.size * at.variance * (torch.expm1(d * half) - d * half) / d**2
        tame = at.value.abs() - (at.slope - at.mean * at.value).abs() * half > curved + ROUNDING * at.size
        for sign, theta, value in ((-1.0, begin, at_begin), (1.0, end, at_end)):
            turn = -at.mean * (torch.polar(radius[of], theta) - m).imag
            angle = torch.angle(value / at.value * torch.polar(torch.ones_like(turn), turn)) - turn
            turned.index_add_(0, of[tame], (sign * angle)[tame])
        near.append((of[tame], m[tame], (at.value / at.slope).abs()[tame]))
        # Where rounding hides the sum itself, as about a zero of higher multiplicity, no arc is ever short enough.
        decided[of[at.value.abs() <= 2 * ROUNDING * at.size]] = False
        rest = ~tame & decided[of]
        of, begin, middle, end = of[rest].repeat(2), begin[rest], middle[rest], end[rest]
        if not len(of):
            break
        begin, end = torch.cat([begin, middle]), torch.cat([middle, end])
        at_begin, at_end = torch.cat([at_begin[rest], at.value[rest]]), torch.cat([at.value[rest], at_end[rest]])
    decided[of] = False
    zeros = (turned / (2 * math.pi)).round().long()
    of, points, distance = (torch.cat(column) for column in zip(*near, strict=True))
    return Ring(zeros, decided, _nearest(of, points, distance, len(rows)))


def _arcs(radius: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Upper half-circles in arcs of length 32 at most: the circle of each, its beginning and its end in radians."""
    arcs = (radius * math.pi / 32).ceil().clamp(min=4).long()
    of = torch.repeat_interleave(torch.arange(len(radius), device=radius.device), arcs)
    place = torch.arange(len(of), dtype=radius.dtype, device=radius.device) - (arcs.cumsum(0) - arcs)[of]
    return of, place / arcs[of] * math.pi, (place + 1) / arcs[of] * math.pi


def _nearest(of: Tensor, points: Tensor, distance: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Of each of n circles the points of least distance."""
    order = distance.argsort()
    order = order[of[order].argsort(stable=True)]
    of, points = of[order], points[order]
    first = torch.searchsorted(of, torch.arange(n, device=of.device))
    nearest = torch.arange(len(of), device=of.device) - first[of] < _STARTS
    return of[nearest], points[nearest]


def find_zeros(sums: ExponentialSums, rows: Tensor, start: Tensor) -> Tensor:
    """Newton's iteration from ``start``, ``(points,)`` complex: zeros in the upper half-plane, NaN for want of one."""
    t = start
    step = torch.full_like(t, math.inf)
    for _ in range(_STEPS):
        at = sums(rows, t)
        step = at.value / at.slope
        step = step * (1.0 / step.abs()).clamp(max=1.0)  # zeros lie some 2 pi apart: never farther than 1
        t = t - step
        if bool((step.abs() < _POLISHED * t.abs()).all()):
            break
    t = torch.complex(t.real, t.imag.abs())
    found = (step.abs() < _CONVERGED * t.abs()) & (t.abs() < sums.reach)
    return torch.where(found, t, math.nan)
