"""How near each sample of a batch came to the redline: which data is behind a fragile step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from redline.host_copy import moved_to
from redline.trail import FragileSample


class SampleMargin(NamedTuple):
    """One sample of the batch.

    Attributes:
        sample: its place in the batch; None for one that was remembered from an earlier batch.
        r: the step over its own radius, by the bound; ``1 / r`` is how many times longer the step could have been.
        exact_r: the same by the exact radius, or None where that was not needed to find the least.
    """

    sample: int | None
    r: float
    exact_r: float | None


@dataclass(frozen=True)
class StepMargins:
    """The normalized step size of each sample that a step was measured on.

    Attributes:
        step: which step.
        samples: ``(n,)``, int64, places in the batch, -1 for remembered samples.
        r: ``(n,)``, by the bound, the largest of the sample's positions that count.
        exact_r: ``(n,)``, by the exact radius, NaN where that was not needed; None where it was not asked for.
    """

    step: int
    samples: Tensor
    r: Tensor
    exact_r: Tensor | None

    def leading(self, count: int = 5) -> Tensor:
        """The samples that bind, in order, left on the device: rows of place, r and exact r (NaN if unknown)."""
        exact = torch.full_like(self.r, math.nan) if self.exact_r is None else self.exact_r
        size = torch.where(exact.isnan(), self.r, exact)
        first = size.masked_fill(size.isnan(), math.inf).argsort(descending=True, stable=True)
        leads = ~exact.isnan() | size.isnan()  # see _fragility
        first = first[leads[first].int().argsort(descending=True, stable=True)][:count]
        wide = self.r.to(
            torch.promote_types(self.r.dtype, torch.float32)
        )  # in half, places past 2,048 would be rounded
        return torch.stack([moved_to(self.samples, wide), wide, exact.to(wide)])[:, first].T

    def most_fragile(self, count: int = 5) -> list[SampleMargin]:
        """The samples that bind, most fragile first: by the exact radius where it is known, else by the bound."""
        exact = torch.full_like(self.r, math.nan) if self.exact_r is None else self.exact_r
        margins = [
            SampleMargin(None if sample < 0 else sample, r, None if math.isnan(exact_r) else exact_r)
            for sample, r, exact_r in zip(self.samples.tolist(), self.r.tolist(), exact.tolist(), strict=True)
        ]
        return sorted(margins, key=_fragility, reverse=True)[:count]


def fragile_samples(step: int, numbers: list[float]) -> list[FragileSample]:
    """The rows of ``leading``, once they are on the host."""
    rows = zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True)
    return [
        FragileSample(step, None if place < 0 else int(place), r, None if math.isnan(exact) else exact)
        for place, r, exact in rows
    ]


def _fragility(one: SampleMargin) -> tuple[bool, float]:
    """Where the exact radius was not needed, it was known to be larger than the least; what is NaN comes first."""
    r = one.r if one.exact_r is None else one.exact_r
    return one.exact_r is not None or math.isnan(r), math.inf if math.isnan(r) else r


def by_sample(values: Tensor, samples: int, batch_dim: int) -> Tensor | None:
    """The largest value of each sample, ``(samples,)``, of values by position, or None where these cannot be told.

    Args:
        values: ``(...)``, one a position: with the batch at ``batch_dim``, or flattened with the batch first.
        samples: in the batch.
        batch_dim: of the inputs.
    """
    if not values.numel():
        return None
    if values.dim() > batch_dim and values.shape[batch_dim] == samples:
        return values.movedim(batch_dim, 0).reshape(samples, -1).amax(1)
    if batch_dim == 0 and values.dim() and values.shape[0] % samples == 0:
        return values.reshape(samples, -1).amax(1)
    return None
