"""The ghost radius: whether a step is too long for the loss to follow."""

from __future__ import annotations

import math
from typing import ClassVar

import torch

from redline import metrics
from redline.monitor import Monitor, Need
from redline.readings import Readings
from redline.sample_memory import MAX_SAMPLES, REMEMBER, check_sub_sample
from redline.schedules import Schedule
from redline.step import Step


class GhostRadius(Monitor):
    """``tau``, ``rho_a`` and ``r = tau / rho_a`` of the step as proposed, from one Jacobian-vector product along it.

    ``r`` is a maximum over samples, so on a sub-sample it is an estimate from below; over how many is a reading. Models
    whose train-mode statistics couple the samples (BatchNorm) are measured on the whole batch. Which samples bind is
    in ``session.margins``.

    Source: arXiv 2603.13552, definitions 4.7 and 5.1.
    """

    needs: ClassVar[Need] = Need.TANGENT

    def __init__(
        self,
        every: int | Schedule = 50,
        *,
        exact: bool = False,
        max_samples: int | None = MAX_SAMPLES,
        remember: int = REMEMBER,
    ) -> None:
        """Measure on a schedule.

        Args:
            every: schedule; the default is Redline's choice.
            exact: also by the exact radius, the nearest complex zero itself, and how many times the bound it is. It
                costs a search, and on an accelerator a wait for it.
            max_samples: the most samples of the batch to measure on; None for all. The default is Redline's choice: on
                32 of 128, r was 0.84 of the whole batch's in the median.
            remember: samples that bound lately are measured with each sub-sample, so many at most.
        """
        super().__init__(every)
        check_sub_sample(max_samples, remember)
        self.exact, self.max_samples, self.remember = exact, max_samples, remember

    def measure(self, step: Step, readings: Readings) -> None:
        """Measure the step as proposed."""
        tau = step.update.norm
        readings.gauge(metrics.UPDATE_NORM, tau)
        readings.count(metrics.NONFINITE, ~tau.isfinite(), "update")
        tangent = step.tangent(self.max_samples, self.remember)
        exact = (metrics.EXACT_GHOST_RADIUS, metrics.EXACT_STEP_SIZE, metrics.EXACT_TO_BOUND_RATIO)
        if tangent is None:
            for metric in (metrics.GHOST_RADIUS, metrics.NORMALIZED_STEP_SIZE, metrics.COMMITTED_STEP_SIZE):
                readings.absent(metric)
            for metric in exact if self.exact else ():
                readings.absent(metric)
            return
        r = tangent.normalized_step_size
        readings.gauge(metrics.NORMALIZED_STEP_SIZE, r)
        # A step that moves no logit has no ghosts, not even one of length 0.
        readings.gauge(metrics.GHOST_RADIUS, (tau / r).masked_fill(r == 0, math.inf))
        if step.layout.ranks.size > 1:
            readings.gauge(metrics.BINDING_RANK, tangent.binding_rank)
        samples, batch = tangent.samples_of_all
        readings.gauge(metrics.TANGENT_SAMPLES, samples)
        readings.gauge(metrics.BATCH_SAMPLES, batch)
        if self.exact:
            # In steps; of a step of which r is not known, neither is this.
            radius = torch.where(r.isnan(), math.nan, tangent.least_radius().to(r))
            readings.gauge(metrics.EXACT_GHOST_RADIUS, (tau * radius).masked_fill(r == 0, math.inf))
            readings.gauge(metrics.EXACT_STEP_SIZE, 1 / radius)
            readings.gauge(metrics.EXACT_TO_BOUND_RATIO, radius * r)
