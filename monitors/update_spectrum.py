"""Update spectra: how hard a step pushes each layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from redline import metrics
from redline.monitor import Monitor, Need
from redline.parameters import fans
from redline.readings import Readings
from redline.schedules import Schedule
from redline.spectrum_tracker import SpectrumTracker
from redline.step import Step

_WEIGHT_TOLERANCE = 1e-4  # that of WeightSpectrum, so that one measurement of the weights serves both
_SEED = 0xDE17A


class UpdateSpectrum(Monitor):
    """Top singular value of each matrix's update, its spectral condition and its ratio to that of the weight.

    Matrices outside the optimizers have no update and stay absent; one that the step did not move has an update of 0.
    """

    needs: ClassVar[Need] = Need.UPDATE

    def __init__(self, every: int | Schedule = 50, *, tolerance: float = 3e-4) -> None:
        """Measure on a schedule.

        Args:
            every: schedule; the default is Redline's choice.
            tolerance: relative error of ``sigma_1`` that the iteration stops at.
        """
        super().__init__(every)
        self.tolerance = tolerance
        self._spectra = SpectrumTracker(_SEED)

    def measure(self, step: Step, readings: Readings) -> None:
        """Measure the update as proposed."""
        update = step.update
        places = [place for place, layer in enumerate(step.layers) if layer.parameter in update.tensors]
        if not places:
            return
        layers = [step.layers[place] for place in places]
        names = [layer.name for layer in layers]
        sigma = self._spectra.measure(layers, update.tensors, self.tolerance, step.layout).sigma
        index = torch.tensor(places).to(sigma.device, non_blocking=True)
        weight = step.weight_spectra(_WEIGHT_TOLERANCE).sigma.index_select(0, index)
        readings.layers(metrics.UPDATE_SPECTRAL_NORM, names, sigma)
        readings.layers(metrics.UPDATE_SPECTRAL_CONDITION, names, sigma / fans(layers, sigma))
        readings.layers(metrics.UPDATE_TO_WEIGHT_RATIO, names, sigma / weight, weight != 0)
        readings.gauge(metrics.UPDATE_NORM, update.norm)
        readings.count(metrics.NONFINITE, (~torch.isfinite(sigma)).sum(), "update")

    def state_dict(self) -> dict[str, Any]:
        """The warm start."""
        return self._spectra.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Start warm."""
        self._spectra.load_state_dict(state)
