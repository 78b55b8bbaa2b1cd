"""The logit tangent of one step, and what it comes to over all samples of the run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from redline.margins import StepMargins, by_sample
from redline.numerics.exact_radius import LeastRadius, least_ghost_radius
from redline.numerics.layer_recorder import LayerSteps
from redline.numerics.radii import normalized_step_size, tangent_spread
from redline.ranks import Ranks


@dataclass
class StepTangent:
    """The logit tangent ``J_z p`` of one step, on the samples of this rank.

    What it comes to is the same on every rank: the largest size, the least radius, and samples, of all of them.

    Attributes:
        logits: ``(..., classes)`` at ``theta_before``, float32 or float64.
        tangent: ``(..., classes)``, along the whole step ``p``.
        mask: ``(...)``, bool, positions that count, or None for all.
        method: one of ``redline.numerics.tangents.METHODS``.
        index: ``(samples,)``, int64, on the host: places in the batch; -1 for samples remembered from earlier ones.
        batch: samples in the batch.
        batch_dim: of the model's inputs.
        layers: how long the step is for attention and activations; None if nobody needs it, or by finite difference.
        ranks: of the run, each of which has a tangent of its own.
    """

    logits: Tensor
    tangent: Tensor
    mask: Tensor | None
    method: str
    index: Tensor
    batch: int
    batch_dim: int
    layers: LayerSteps | None = None
    ranks: Ranks = field(default_factory=Ranks, repr=False)
    _exact: tuple[float, LeastRadius] | None = field(default=None, init=False, repr=False)

    @property
    def samples(self) -> int:
        """How many samples were measured on this rank."""
        return len(self.index)

    @cached_property
    def samples_of_all(self) -> tuple[Tensor, Tensor]:
        """How many samples were measured, and were in the batch, on all ranks; each 0-d."""
        total = self.ranks.total(torch.tensor([self.samples, self.batch]).to(self.logits.device, non_blocking=True))
        return total[0], total[1]

    @cached_property
    def spread(self) -> Tensor:
        """``Delta_a`` of each position, ``(...)``; 0 at those that do not count."""
        spread = tangent_spread(self.tangent)
        return spread if self.mask is None else torch.where(self.mask, spread, 0.0)

    @cached_property
    def told(self) -> Tensor:
        """``(...)``, bool: positions that count, and of which neither logits nor tangent are NaN."""
        told = ~(self.tangent.amax(-1).isnan() | self.logits.amax(-1).isnan())  # a maximum hands NaN on
        return told if self.mask is None else told & self.mask

    @cached_property
    def normalized_step_size(self) -> Tensor:
        """``r`` over all positions that count, 0-d, 0 if there are none; over a sub-sample an estimate from below."""
        return self._by_rank.amax()

    @property
    def binding_rank(self) -> Tensor:
        """The rank of the largest ``r``, 0-d, int64."""
        return self._by_rank.argmax()

    @cached_property
    def _by_rank(self) -> Tensor:
        r = self.spread.amax() / math.pi if self.spread.numel() else self.spread.new_zeros(())
        return self.ranks.rows(r.reshape(1)).flatten()

    def told_step_size(self, quantile: float = 1.0) -> Tensor:
        """``r`` over the positions ``told``, 0-d, or a quantile of it; on several ranks the largest of theirs."""
        return self.ranks.highest(normalized_step_size(self.tangent, self.told, quantile))

    def least_radius(self, within: float = math.inf) -> Tensor:
        """The least exact radius over the positions ``told``, in steps, 0-d; see ``least_ghost_radius``.

        The proven lower end of it. Waits for the device. What was found for a larger ``within`` is not searched for
        again.
        """
        try:
            if self._exact is None or within > self._exact[0]:
                self._exact = within, least_ghost_radius(self.logits, self.tangent, self.told, within=within)
        except Exception:
            self.ranks.highest(self.logits.new_full((), math.nan))  # the others wait for it
            raise
        return -self.ranks.highest(-self._exact[1].lower)

    def margins(self, step: int) -> StepMargins | None:
        """``r`` of each sample, or None where logits cannot be told by sample."""
        r = by_sample(self.spread / math.pi, self.samples, self.batch_dim)
        if r is None:
            return None
        if self._exact is None:
            return StepMargins(step, self.index, r, None)
        exact_r = by_sample((1 / self._exact[1].radii).nan_to_num(nan=-1), self.samples, self.batch_dim)
        return StepMargins(step, self.index, r, None if exact_r is None else exact_r.masked_fill(exact_r < 0, math.nan))
