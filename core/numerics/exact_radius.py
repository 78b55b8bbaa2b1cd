"""Exact ghost radii: the nearest complex zero of ``F(t) = sum_k exp(z_k + a_k t)``, found and certified.

Rings are searched outward from a radius within which there is provably no zero. On each, zeros are counted by the
argument principle and looked for by Newton's iteration; one found at ``rho`` is the nearest if none is counted within
``(1 - 5e-7) rho``. The method is Redline's own: the paper (*Ghosts of Softmax*, arXiv 2603.13552, section 4) defines the
radius for any number of classes, and gives it for two.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from redline.numerics.exponential_sums import ExponentialSums
from redline.numerics.zeros import count_zeros, find_zeros

_TOLERANCE = 1e-6  # relative, of an interval that counts as closed
_GROWTH = 1.5  # from ring to ring while no zero is in sight
_REACH = 16.0  # of the first sums, in units of 1 / spread: most nearest zeros lie within it
_FARTHEST = 2e4  # in these units; farther out an interval stays open above
_ROUNDS = 64  # of rings, until an interval is left as wide as it is
_AT_A_TIME = 1 << 22  # logits worked on at a time, to bound memory


class RadiusInterval(NamedTuple):
    """Certified intervals of exact ghost radii, float64.

    Attributes:
        lower: no zero lies nearer; NaN where an entry of the row was.
        upper: a zero lies within it; infinite where none was found. Wider than 1e-6 the interval is only at zeros of
            higher multiplicity, at such as lie farther than 16,000 / spread, and where a budget was spent.
    """

    lower: Tensor
    upper: Tensor


def exact_ghost_radius(logits: Tensor, tangent: Tensor) -> Tensor:
    """Exact ghost radius ``rho*``: modulus of the nearest complex zero of ``sum_k exp(z_k + a_k t)``.

    It is never below ``ghost_radius(tangent)``. Computing it waits for the device.

    Args:
        logits: ``(..., classes)``, floating. One class stands for the two logits ``(z, 0)`` of a binary classifier; a
            logit of -inf is a class that is not there.
        tangent: ``(..., classes)``, floating, ``J p``.

    Returns:
        ``(...)``, in units of the vector that the tangent was taken along, in the wider of the two dtypes, float32 at
        least; infinite where the spread is 0, NaN where an entry is. Relative error 1e-6 in float64; at a zero of
        multiplicity m about the m-th root of machine precision. Where only an interval is known, its safe lower end.
    """
    lower, upper = ghost_radius_interval(logits, tangent)
    dtype = torch.promote_types(torch.promote_types(logits.dtype, tangent.dtype), torch.float32)
    return torch.where(lower >= 0.99 * upper, upper, lower).to(dtype)


def ghost_radius_interval(logits: Tensor, tangent: Tensor) -> RadiusInterval:
    """Certified interval of each exact ghost radius, ``(...)``; arguments as of ``exact_ghost_radius``."""
    shape = torch.broadcast_shapes(logits.shape, tangent.shape)
    z, a = (one.expand(shape).reshape(-1, shape[-1]) for one in (logits, tangent))
    step = max(_AT_A_TIME // shape[-1], 1)
    parts = [_intervals(*part) for part in zip(z.split(step), a.split(step), strict=True)]
    return RadiusInterval(*(torch.cat(column).reshape(shape[:-1]) for column in zip(*parts, strict=True)))


def _intervals(z: Tensor, a: Tensor) -> RadiusInterval:
    """Rows ``(n, classes)``."""
    z, a = z.double(), a.double()
    if z.shape[1] == 1:
        z, a = (torch.cat([one, torch.zeros_like(one)], dim=1) for one in (z, a))
    there = z != -math.inf
    top, bottom = torch.where(there, a, -math.inf).amax(1), torch.where(there, a, math.inf).amin(1)
    spread, middle = top - bottom, (top + bottom) / 2
    lower = torch.full_like(spread, math.nan)
    lower[spread == 0] = math.inf
    lower[~(z < math.inf).all(1)] = math.nan
    upper = lower.clone()
    rows = ((spread > 0) & (spread < math.inf) & (z < math.inf).all(1)).nonzero().squeeze(1)
    if len(rows):
        scaled = torch.where(there, (a - middle[:, None]) / spread[:, None], 0.0)[rows]
        found = _search(z[rows].log_softmax(1), scaled, torch.full_like(spread[rows], math.inf))
        lower[rows], upper[rows] = (one / spread[rows] for one in found)
    return RadiusInterval(lower, upper)


def _search(log_p: Tensor, a: Tensor, limit: Tensor) -> RadiusInterval:
    """Rows ``(n, classes)`` of log-probabilities, and of tangents in [-1/2, 1/2]; no farther than ``limit``, ``(n,)``."""
    lower = torch.full_like(limit, math.pi)
    zero = limit.clone()  # modulus of the nearest zero found; where none is, the limit stands for it
    ceiling = torch.full_like(limit, math.inf)  # a circle within which zeros were counted
    slack = torch.full_like(limit, _TOLERANCE / 2)
    reach = float(limit.max()) * (1 + _TOLERANCE) if bool((limit < math.inf).all()) else _REACH
    rows = torch.arange(len(a), device=a.device)
    while len(rows) and reach <= _FARTHEST:
        sums = ExponentialSums(log_p[rows], a[rows], reach)
        lower[rows] = torch.maximum(lower[rows], sums.certified_radius())
        place = torch.arange(len(rows), device=a.device)  # in ``rows``, of those still searched
        for _ in range(_ROUNDS):
            row = rows[place]
            known = (zero[row] <= ceiling[row]) & (zero[row] < math.inf)
            radius = torch.where(ceiling[row] < math.inf, (lower[row] * ceiling[row]).sqrt(), lower[row] * _GROWTH)
            radius = torch.where(known, zero[row] * (1 - slack[row]), radius)
            going = _is_open(lower[row], zero[row], ceiling[row], slack[row]) & (radius < reach)
            if not bool(going.any()):
                break
            place, row, radius, known = place[going], row[going], radius[going], known[going]
            ring = count_zeros(sums, place, radius)
            empty, full = ring.decided & (ring.zeros == 0), ring.decided & (ring.zeros > 0)
            lower[row[empty]] = torch.maximum(lower[row[empty]], radius[empty])
            ceiling[row[full]] = torch.minimum(ceiling[row[full]], radius[full])
            slack[row[known & ~ring.decided]] *= 10  # zeros of higher multiplicity: a circle so near cannot be judged
            of, points = ring.starts
            found = find_zeros(sums, place[of], points).abs()
            genuine = found >= lower[row[of]] * (1 - _TOLERANCE)
            zero.scatter_reduce_(0, row[of][genuine], found[genuine], "amin")
        rows = rows[_is_open(lower[rows], zero[rows], ceiling[rows], slack[rows])]
        reach *= 4
    return RadiusInterval(lower, torch.minimum(zero, ceiling))


def _is_open(lower: Tensor, zero: Tensor, ceiling: Tensor, slack: Tensor) -> Tensor:
    """Whether an interval is still to be narrowed."""
    return (lower < torch.minimum(zero, ceiling) * (1 - 2 * slack)) & (slack < 1e-2)
