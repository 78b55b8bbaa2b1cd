"""Exact ghost radii: the nearest complex zero of ``F(t) = sum_k exp(z_k + a_k t)``, found and certified.

Rings are searched outward from a radius within which there is provably no zero. On each, zeros are counted by the
argument principle and looked for by Newton's iteration; one found at ``rho`` is the nearest if none is counted within
``(1 - 5e-7) rho``. The method is Redline's own: the paper (*Ghosts of Softmax*, arXiv 2603.13552, section 4) defines
the radius for any number of classes, and gives it for two.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from redline.numerics.exponential_sums import ExponentialSums
from redline.numerics.radii import binary_ghost_radius, ghost_radius
from redline.numerics.zeros import count_zeros, find_zeros

_TOLERANCE = 1e-6  # relative, of an interval that counts as closed
_GROWTH = 1.5  # from ring to ring while no zero is in sight
_NEAR = 4.0  # from the certified radius a zero is at once taken for the nearest
_REACH = 16.0  # of the first sums, in units of 1 / spread: most nearest zeros lie within it
_FARTHEST = 1024.0  # in these units; farther out an interval stays open above, since rings get costly
_ROUNDS = 64  # of rings, until an interval is left as wide as it is
_CLEAR = 0.999  # below it a score clears a position, rounding in float32 allowed for
_AT_A_TIME = 1 << 22  # logits worked on at a time, to bound memory


class RadiusInterval(NamedTuple):
    """Certified intervals of exact ghost radii, float64.

    Attributes:
        lower: no zero lies nearer; NaN where an entry of the row was.
        upper: where the nearest zero was found, or a radius within which some were counted; infinite where there was
            none. The interval is wider than 1e-6 only at zeros of higher multiplicity, where ``upper`` is not certified
            but as good as Newton's iteration there, and at zeros farther than 1,000 / spread.
    """

    lower: Tensor
    upper: Tensor


@torch.no_grad()
def exact_ghost_radius(logits: Tensor, tangent: Tensor) -> Tensor:
    """Exact ghost radius ``rho*``: modulus of the nearest complex zero of ``sum_k exp(z_k + a_k t)``.

    It is never below ``ghost_radius(tangent)``. Computing it waits for the device.

    Args:
        logits: ``(..., classes)``, floating. One class stands for the two logits ``(z, 0)`` of a binary classifier; a
            logit of -inf is a class that is not there.
        tangent: ``(..., classes)``, floating, ``J p``.

    Returns:
        ``(...)``, in units of the vector that the tangent was taken along, in the wider of the two dtypes, float32 at
        least; infinite where the spread is 0, NaN where an entry is. Relative error 1e-6 in float64, at zeros of
        multiplicity 2 to 4 some 1e-7 to 1e-4. Where an interval is wider than 1 %, its safe lower end: of zeros of
        still higher multiplicity, and of such as lie farther than about 1,000 / spread (logits 1,000 apart).
    """
    lower, upper = ghost_radius_interval(logits, tangent)
    dtype = torch.promote_types(torch.promote_types(logits.dtype, tangent.dtype), torch.float32)
    return torch.where(lower >= 0.99 * upper, upper, lower).to(dtype)


@torch.no_grad()
def ghost_radius_interval(logits: Tensor, tangent: Tensor) -> RadiusInterval:
    """Certified interval of each exact ghost radius, ``(...)``; arguments as of ``exact_ghost_radius``."""
    shape = torch.broadcast_shapes(logits.shape, tangent.shape)
    z, a = _as_rows(logits, tangent)
    step = max(_AT_A_TIME // max(z.shape[1], 1024), 1)
    parts = [_intervals(*part) for part in zip(z.split(step), a.split(step), strict=True)]
    return RadiusInterval(*(torch.cat(column).reshape(shape[:-1]) for column in zip(*parts, strict=True)))


class LeastRadius(NamedTuple):
    """The least exact ghost radius of many positions.

    Attributes:
        lower: 0-d, float64, certified: no position has a zero nearer; NaN where an entry of one was.
        upper: 0-d, float64: equal to ``lower`` to 1e-6, but for a budget that was spent and for zeros of which
            ``RadiusInterval`` tells less; infinite where none lies ``within``.
        radii: ``(...)``, float64: of the positions of which one was found in looking for it, NaN elsewhere.
    """

    lower: Tensor
    upper: Tensor
    radii: Tensor


@torch.no_grad()
def least_ghost_radius(
    logits: Tensor, tangent: Tensor, mask: Tensor | None = None, *, within: float = math.inf, budget: int = 1024
) -> LeastRadius:
    """Least exact ghost radius over all positions, for the price of a few.

    A position is out of the question within a radius if its bound is not below it, or by a test that costs a pass over
    its logits (``ExponentialSums.certified_radius``). The radius is raised until some position fails both; that one is
    searched, then whatever fails within the least radius found so far, the likeliest first. Waits for the device.

    Args:
        logits: ``(..., classes)``, floating.
        tangent: ``(..., classes)``, floating.
        mask: ``(...)``, bool, positions that count; None for all.
        within: radii beyond it need not be told apart.
        budget: the most positions to search. Past it the interval reaches down to what is proven of the others.
    """
    shape = torch.broadcast_shapes(logits.shape, tangent.shape)[:-1]
    z, a = (one.to(torch.promote_types(one.dtype, torch.float32)) for one in _as_rows(logits, tangent))
    bound = torch.where(z.amax(1) < math.inf, ghost_radius(a), math.nan)  # infinite once it was searched
    if mask is not None:
        bound = torch.where(mask.reshape(-1), bound, math.inf)
    radii = torch.full_like(bound, math.nan, dtype=torch.float64)

    def result(lower: float, upper: float) -> LeastRadius:
        return LeastRadius(radii.new_tensor(lower), radii.new_tensor(upper), radii.reshape(shape))

    clear = float(bound.min()) if len(bound) else math.inf  # no position has a zero nearer
    if math.isnan(clear):
        return result(math.nan, math.nan)
    if clear == 0 or clear >= within:  # 0 where a tangent is infinite
        return result(min(clear, within), math.inf)
    suspects = _suspects(z, a, bound, within)
    while len(suspects) and _GROWTH * clear < within:
        nearer = _suspects(z, a, bound, _GROWTH * clear)
        if len(nearer):
            suspects = nearer
            break
        clear *= _GROWTH
    least, lower, searched, batch = within, within, 0, 1
    while len(suspects) and searched < budget:
        now = suspects[: min(batch, budget - searched)]
        # A little farther, so that what is cleared is clear of the least itself.
        intervals = _intervals(z[now], a[now], least * (1 + 2 * _TOLERANCE))
        if bool(intervals.lower.isnan().any()):
            return result(math.nan, math.nan)
        radii[now] = torch.where(intervals.upper < math.inf, intervals.upper, math.nan)
        lower, least = min(lower, float(intervals.lower.min())), min(least, float(intervals.upper.min()))
        searched, batch = searched + len(now), 8 * batch
        bound[now] = math.inf
        suspects = _suspects(z, a, bound, least)
    if len(suspects):
        lower = min(lower, max(clear, float(bound.min())))
    return result(lower, least if least < within else math.inf)


def _suspects(z: Tensor, a: Tensor, bound: Tensor, radius: float) -> Tensor:
    """Rows that may have a zero within ``radius``, the likeliest first."""
    rows = (bound < radius).nonzero().squeeze(1)
    if radius == math.inf or not len(rows):
        return rows[bound[rows].argsort()]
    score = _score(z, a, rows, radius)
    return rows[score.argsort(descending=True)][: int((score >= _CLEAR).sum())]


def _as_rows(logits: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    """Both as ``(n, classes)``, with two classes at least."""
    shape = torch.broadcast_shapes(logits.shape, tangent.shape)
    rows = [one.expand(shape).reshape(-1, shape[-1]) for one in (logits, tangent)]
    if tangent.device.type == "mps":  # it has no float64
        rows = [one.cpu() for one in rows]
    z, a = ((torch.cat([one, torch.zeros_like(one)], dim=1) if shape[-1] == 1 else one) for one in rows)
    return z, a


def _score(z: Tensor, a: Tensor, rows: Tensor, radius: float) -> Tensor:
    """Below 1 where there is no zero within ``radius``, to 1e-6 of it; see ``ExponentialSums.certified_radius``."""
    scores = []
    for part in rows.split(max(_AT_A_TIME // (4 * a.shape[1]), 1)):
        log_p, tangent = z[part].log_softmax(1), a[part]
        # From the likeliest class: else rounding goes by an offset that all share, or by a class that does not matter.
        tangent = tangent - tangent.gather(1, log_p.argmax(1, keepdim=True))
        p = log_p.exp()
        reach = (tangent - (p * tangent).sum(1, keepdim=True)).abs_().mul_(radius)
        scores.append((log_p.add_(reach).exp_() - p * reach.add_(1)).sum(1))
    return torch.cat(scores).nan_to_num(math.inf)


def _intervals(z: Tensor, a: Tensor, limit: float = math.inf) -> RadiusInterval:
    """Rows ``(n, classes)``, searched no farther than ``limit``."""
    z, a = z.double(), a.double()
    there = z != -math.inf
    top, bottom = torch.where(there, a, -math.inf).amax(1), torch.where(there, a, math.inf).amin(1)
    spread, sound = top - bottom, (z < math.inf).all(1)
    if z.shape[1] == 2:
        radius = binary_ghost_radius(z[:, 1] - z[:, 0], spread)
        radius = torch.where(sound & (spread < math.inf), radius, math.nan)
        return RadiusInterval(radius, torch.where(radius < limit, radius, math.inf))
    lower = torch.where(sound & (spread == 0), math.inf, math.nan).to(spread)
    upper = lower.clone()
    rows = (sound & (spread > 0) & (spread < math.inf)).nonzero().squeeze(1)
    if len(rows):
        scaled = torch.where(there, (a - bottom[:, None]) / spread[:, None] - 0.5, 0.0)[rows]
        found = _search(z[rows].log_softmax(1), scaled, limit * spread[rows])
        lower[rows], upper[rows] = (one / spread[rows] for one in found)
    return RadiusInterval(lower, upper)


def _search(log_p: Tensor, a: Tensor, limit: Tensor) -> RadiusInterval:
    """Rows ``(n, classes)`` of log-probabilities and tangents in [-1/2, 1/2], no farther than ``limit``, ``(n,)``."""
    lower = torch.full_like(limit, math.pi)
    zero = limit.clone()  # modulus of the nearest zero found; where none is, the limit stands for it
    ceiling = torch.full_like(limit, math.inf)  # a circle within which zeros were counted
    slack = torch.full_like(limit, _TOLERANCE / 2)
    reach = min(float(limit.max()), _REACH)
    rows = torch.arange(len(a), device=a.device)
    while len(rows) and reach <= _FARTHEST:
        sums = ExponentialSums(log_p[rows], a[rows], reach)
        lower[rows] = torch.maximum(lower[rows], sums.certified_radius())
        place = torch.arange(len(rows), device=a.device)  # in ``rows``, of those still searched
        for _ in range(_ROUNDS):
            row = rows[place]
            known = (zero[row] <= ceiling[row]) & (zero[row] <= _NEAR * lower[row])
            radius = torch.where(ceiling[row] < math.inf, (lower[row] * ceiling[row]).sqrt(), lower[row] * _GROWTH)
            radius = torch.where(known, zero[row], radius) * (1 - slack[row])
            going = _is_open(lower[row], zero[row], ceiling[row], slack[row]) & (radius < reach)
            if not bool(going.any()):
                break
            place, row, radius, known = place[going], row[going], radius[going], known[going]
            ring = count_zeros(sums, place, radius)
            empty, full = ring.decided & (ring.zeros == 0), ring.decided & (ring.zeros > 0)
            lower[row[empty]] = torch.maximum(lower[row[empty]], radius[empty])
            ceiling[row[full]] = torch.minimum(ceiling[row[full]], radius[full])
            # A circle too near a zero cannot be judged, least where its multiplicity is higher: the next is smaller.
            slack[row[~ring.decided]] *= 10
            slack[row[ring.decided & ~known]] = _TOLERANCE / 2
            of, points = ring.starts
            found = find_zeros(sums, place[of], points).abs()
            genuine = found >= lower[row[of]] * (1 - _TOLERANCE)
            before = zero[row]
            zero.scatter_reduce_(0, row[of][genuine], found[genuine], "amin")
            slack[row[zero[row] < (1 - _TOLERANCE) * before]] = _TOLERANCE / 2
        rows = rows[_is_open(lower[rows], zero[rows], ceiling[rows], slack[rows])]
        reach *= 4
    high = torch.minimum(zero, ceiling)
    return RadiusInterval(lower, torch.where(high < limit, high, math.inf))


def _is_open(lower: Tensor, zero: Tensor, ceiling: Tensor, slack: Tensor) -> Tensor:
    """Whether an interval is still to be narrowed."""
    return (lower < torch.minimum(zero, ceiling) * (1 - 2 * slack)) & (slack < 1e-2)
