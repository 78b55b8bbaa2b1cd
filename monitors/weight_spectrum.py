"""Weight spectra: how strong each layer is."""

from __future__ import annotations

from typing import ClassVar

import torch

from redline import metrics
from redline.matrix_shards import frobenius_norms
from redline.monitor import Monitor
from redline.parameters import fans
from redline.readings import Readings
from redline.schedules import Schedule
from redline.step import Step


class WeightSpectrum(Monitor):
    """Top singular value, its residual, stable rank and spectral condition of every matrix of the model.

    Frozen parameters are measured too. A zero matrix has a spectral norm of 0 and no stable rank.
    """

    after_commit: ClassVar[bool] = True

    def __init__(self, every: int | Schedule = 50, *, tolerance: float = 1e-4) -> None:
        """Measure on a schedule.

        Args:
            every: schedule; the default is Redline's choice.
            tolerance: relative error of ``sigma_1`` that the iteration stops at.
        """
        super().__init__(every)
        self.tolerance = tolerance

    def measure(self, step: Step, readings: Readings) -> None:
        """Measure the weights as committed."""
        if not step.layers:
            return
        estimate = step.weight_spectra(self.tolerance)
        names = [layer.name for layer in step.layers]
        frobenius = frobenius_norms(step.layers, step.weights, step.layout).to(estimate.sigma)
        readings.layers(metrics.WEIGHT_SPECTRAL_NORM, names, estimate.sigma)
        readings.layers(metrics.WEIGHT_SPECTRAL_RESIDUAL, names, estimate.residual)
        readings.layers(metrics.WEIGHT_STABLE_RANK, names, (frobenius / estimate.sigma) ** 2, estimate.sigma != 0)
        readings.layers(metrics.WEIGHT_SPECTRAL_CONDITION, names, estimate.sigma / fans(step.layers, estimate.sigma))
        readings.count(metrics.NONFINITE, (~torch.isfinite(estimate.sigma)).sum(), "weight")
