"""Layer radii: where inside the model a step is too long, and which radius binds."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from redline import metrics
from redline.errors import ConfigurationError
from redline.layer_sizes import LayerSizes, layer_sizes
from redline.monitor import Monitor, Need
from redline.numerics.layer_radii import QUANTILE
from redline.readings import Readings
from redline.sample_memory import MAX_SAMPLES, REMEMBER, check_sub_sample
from redline.schedules import Schedule
from redline.step import Step


class LayerRadii(Monitor):
    """How long the step as proposed is for each attention and each activation, beside r: 1 is the redline for all.

    From the pass that gives the logit tangent, so that beside ``GhostRadius`` with as many samples it takes none of its
    own. Attention goes by the largest spread of its scores' tangent over keys, an activation by a low quantile of its
    inputs' radii. What is called is seen, module or function; exact GELU has no singularity, and no reading. Where
    tangents are taken by finite difference nothing is written, and a note says why.

    Source: arXiv 2603.13552, appendix 2.
    """

    needs: ClassVar[Need] = Need.LAYERS

    def __init__(
        self,
        every: int | Schedule = 50,
        *,
        max_samples: int | None = MAX_SAMPLES,
        remember: int = REMEMBER,
        quantile: float = QUANTILE,
    ) -> None:
        """Measure on a schedule.

        Args:
            every: schedule; the default is Redline's choice.
            max_samples: the most samples of the batch to measure on; None for all. The default is that of
                ``GhostRadius``, whose pass is then shared.
            remember: samples that bound lately are measured with each sub-sample, so many at most.
            quantile: in (0, 1], of an activation's radii, the one that counts; the default is the paper's.

        Raises:
            ConfigurationError: no sample, or a quantile outside (0, 1].
        """
        super().__init__(every)
        check_sub_sample(max_samples, remember)
        if not 0 < quantile <= 1:
            raise ConfigurationError(f"got quantile={quantile}; expected a share in (0, 1], such as 0.01.")
        self.max_samples, self.remember, self.quantile = max_samples, remember, quantile
        self._shown: set[tuple[metrics.Metric, str]] = set()  # at the last measurement, with their label

    def measure(self, step: Step, readings: Readings) -> None:
        """Measure the step as proposed."""
        before, self._shown = self._shown, set()
        tangent = step.tangent(self.max_samples, self.remember)
        if tangent is not None:
            r = tangent.normalized_step_size
            sizes = layer_sizes(tangent.layers, self.quantile, step.layout.ranks, r)
            if sizes is not None:
                self._show(r, sizes, readings)
        for metric, label in before - self._shown:
            readings.absent(metric, label)

    def _show(self, r: Tensor, found: LayerSizes, readings: Readings) -> None:
        readings.gauge(metrics.BINDING_STEP_SIZE, r, "output")
        self._shown.add((metrics.BINDING_STEP_SIZE, "output"))
        of_each: list[tuple[str, metrics.Metric, dict[str, Tensor]]] = [
            ("attention", metrics.ATTENTION_STEP_SIZE, found.attention),
            ("activation", metrics.ACTIVATION_STEP_SIZE, found.activation),
        ]
        for radius, metric, sizes in of_each:
            if sizes:
                values = torch.stack([size.to(r, non_blocking=True) for size in sizes.values()])
                readings.layers(metric, list(sizes), values)
                readings.gauge(metrics.BINDING_STEP_SIZE, values.amax(), radius)
                self._shown |= {(metric, layer) for layer in sizes} | {(metrics.BINDING_STEP_SIZE, radius)}
