"""How near each sample of a batch came to the redline: which data is behind a fragile step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from redline.host_copy import moved_to
from redline.ranks import Ranks
from redline.trail import FragileSample

_TOLD = 8  # samples of each rank that the others are told of


@dataclass(frozen=True)
class StepMargins:
    """The normalized step size of each sample that a step was measured on.

    On several ranks it is of the leading samples of each: ``over`` makes it so.

    Attributes:
        step: which step.
        samples: ``(n,)``, int64, places in the batch, -1 for remembered samples.
        r: ``(n,)``, by the bound, the largest of the sample's positions that count; -inf for no sample.
        exact_r: ``(n,)``, by the exact radius, NaN where that was not needed; None where it was not asked for.
        rank: ``(n,)``, int64, in whose batch; None where there is but one.
    """

    step: int
    samples: Tensor
    r: Tensor
    exact_r: Tensor | None
    rank: Tensor | None = None

    def leading(self, count: int = 5) -> Tensor:
        """The samples that bind, in order, left on the device: rows of place, r, exact r (NaN if unknown) and rank.

        Where the exact radius was not needed, it was known to be larger than the least; what is NaN comes first.
        """
        exact = torch.full_like(self.r, math.nan) if self.exact_r is None else self.exact_r
        size = torch.where(exact.isnan(), self.r, exact)
        first = size.masked_fill(size.isnan(), math.inf).argsort(descending=True, stable=True)
        leads = ~exact.isnan() | size.isnan()
        first = first[leads[first].int().argsort(descending=True, stable=True)][:count]
        wide = self.r.to(
            torch.promote_types(self.r.dtype, torch.float32)
        )  # in half, places past 2,048 would be rounded
        rank = torch.zeros_like(wide) if self.rank is None else moved_to(self.rank, wide)
        return torch.stack([moved_to(self.samples, wide), wide, exact.to(wide), rank])[:, first].T

    def most_fragile(self, count: int = 5) -> list[FragileSample]:
        """The samples that bind, most fragile first: by the exact radius where it is known, else by the bound."""
        return fragile_samples(self.step, self.leading(count).flatten().tolist())

    @classmethod
    def over(cls, ranks: Ranks, step: int, of_this: StepMargins | None, like: Tensor) -> StepMargins:
        """The leading samples of every rank; each gives its own, or none. ``like``: a tensor where they are to be."""
        told = torch.full((_TOLD, 3), -math.inf, dtype=torch.float64, device=like.device)
        if of_this is not None:
            leading = of_this.leading(_TOLD)[:, :3]
            told[: len(leading)] = leading
        samples, r, exact = ranks.rows(told.flatten()).reshape(-1, 3).unbind(1)
        rank = torch.arange(ranks.size, device=like.device).repeat_interleave(_TOLD)
        return cls(step, samples.clamp(min=-1).long(), r, exact.masked_fill(exact == -math.inf, math.nan), rank)


def fragile_samples(step: int, numbers: list[float]) -> list[FragileSample]:
    """The rows of ``leading``, once they are on the host."""
    rows = zip(*(numbers[column::4] for column in range(4)), strict=True)
    return [
        FragileSample(step, None if place < 0 else int(place), r, None if math.isnan(exact) else exact, int(rank))
        for place, r, exact, rank in rows
        if r != -math.inf
    ]


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
