"""How long a step is for the layers inside the model, over the samples of all ranks."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from redline.numerics.layer_radii import MOST_INPUTS
from redline.numerics.layer_recorder import LayerSteps
from redline.ranks import Ranks


class LayerSizes(NamedTuple):
    """By layer, the length of the step over that layer's own radius, 0-d: 1 is the redline."""

    attention: dict[str, Tensor]
    activation: dict[str, Tensor]


def layer_sizes(seen: LayerSteps | None, quantile: float, ranks: Ranks, like: Tensor) -> LayerSizes | None:
    """What the layers come to, the same on every rank, or None where one has seen none.

    A layer counts where any rank has seen it: of experts, a rank calls those that its samples are sent to. The hosts
    wait for one another.

    Args:
        seen: of this rank's samples.
        quantile: of an activation's radii, the one that counts; of all ranks' together.
        ranks: of the run.
        like: a tensor where they are to be.
    """
    if ranks.size == 1:
        return None if seen is None else LayerSizes(dict(seen.attention), seen.activation(quantile))
    radii = {} if seen is None else {name: _thinned(one, ranks.size) for name, one in seen.activation_radii.items()}
    told = ranks.objects(
        None if seen is None else (sorted(seen.attention), {name: len(one) for name, one in radii.items()})
    )
    known = [one for one in told if one is not None]
    if seen is None or len(known) < len(told):
        return None
    attention = sorted({name for names, _ in known for name in names})
    counts = {name: [inputs.get(name, 0) for _, inputs in known] for name in sorted({n for _, i in known for n in i})}
    places = {name: max(math.ceil(quantile * sum(count) - 1e-9), 1) for name, count in counts.items()}
    widths = [min(max(counts[name]), places[name]) for name in counts]  # of each rank's lowest, no more can matter

    parts = [seen.attention[name].reshape(1) if name in seen.attention else _filled(1, -math.inf) for name in attention]
    parts += [_lowest(radii.get(name), width) for name, width in zip(counts, widths, strict=True)]
    if not parts:
        return LayerSizes({}, {})
    rows = ranks.rows(torch.cat([part.to(like.device, torch.float64) for part in parts]))
    sizes = rows[:, : len(attention)].amax(0)
    activation = {}
    for name, lowest in zip(counts, rows[:, len(attention) :].split(widths, dim=1), strict=True):
        radius = lowest.flatten().sort().values[places[name] - 1]
        activation[name] = 1 / torch.where(lowest.isnan().any(), math.nan, radius)
    return LayerSizes(dict(zip(attention, sizes.to(like.dtype), strict=True)), activation)


def _thinned(radii: Tensor, ranks: int) -> Tensor:
    """All ranks together take as many as one alone would."""
    stride = -(-len(radii) * ranks // MOST_INPUTS)
    return radii[:: max(stride, 1)]


def _lowest(radii: Tensor | None, width: int) -> Tensor:
    """So many of the smallest, in any order; NaN among them if there is one; filled up where there are fewer."""
    if radii is None:
        return _filled(width, math.inf)
    found = radii.masked_fill(radii.isnan(), -math.inf).topk(min(width, len(radii)), largest=False).values
    found = torch.where(radii.isnan().any(), math.nan, found)
    return torch.cat([found, _filled(width - len(found), math.inf).to(found)])


def _filled(count: int, value: float) -> Tensor:
    return torch.full((count,), value)
