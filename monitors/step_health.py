"""Step health: what every training script plots, read where it costs nothing."""

from __future__ import annotations

from typing import ClassVar

from redline import metrics
from redline.monitor import Monitor, Need
from redline.readings import Readings
from redline.schedules import Schedule
from redline.step import Step


class StepHealth(Monitor):
    """Loss, gradient norm, learning rate and weight decay of each group, and counts of what was not finite.

    In a plain loop the loss is seen only if it is handed to ``session.observe``. The gradient norm is that of what the
    optimizer was given: after clipping.
    """

    needs: ClassVar[Need] = Need.GRADIENTS
    light: ClassVar[bool] = True

    def __init__(self, every: int | Schedule = 1) -> None:
        """``every``: schedule; every step by default."""
        super().__init__(every)

    def measure(self, step: Step, readings: Readings) -> None:
        """Read what the step was made of."""
        if (loss := step.loss) is not None:
            readings.gauge(metrics.LOSS, loss)
            readings.count(metrics.NONFINITE, ~loss.isfinite(), "loss")
        if step.gradient_norm is not None:
            readings.gauge(metrics.GRADIENT_NORM, step.gradient_norm)
            readings.count(metrics.NONFINITE, ~step.gradient_norm.isfinite(), "gradient")
        for optimizer, group, settings in step.groups:
            for metric, key in ((metrics.LEARNING_RATE, "lr"), (metrics.WEIGHT_DECAY, "weight_decay")):
                if key in settings:
                    readings.gauge(metric, settings[key], optimizer, group)
