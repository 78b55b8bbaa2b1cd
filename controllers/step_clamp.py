"""The clamp: no step longer than the radius within which the loss can be trusted to follow it."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from redline.controller import Number, Scale
from redline.errors import ConfigurationError
from redline.radius_controller import RadiusController
from redline.sample_memory import MAX_SAMPLES, REMEMBER
from redline.step import Step
from redline.tangent_probe import StepTangent


class StepClamp(RadiusController):
    """Scales the joint update by ``min(1, max_r / r)``, along the update that the optimizers really made.

    A step with ``r <= max_r`` stays the optimizer's own, bit for bit. What r is, and what is left of a step that was
    scaled, rejected or could not be measured: see ``RadiusController``. Source: arXiv 2603.13552, section 5.
    """

    def __init__(
        self,
        max_r: float = 1.0,
        *,
        radius: Literal["bound", "exact"] = "bound",
        reduction: Literal["max"] | float = "max",
        max_samples: int | None = MAX_SAMPLES,
        remember: int = REMEMBER,
    ) -> None:
        """Set the limit.

        Args:
            max_r: the longest step allowed, in radii; 1, the default, is the redline.
            radius: "bound" measures by ``pi / spread``, which is safe but short, so that healthy steps may be
                shortened, too; "exact" by the nearest complex zero itself, which costs a search where the bound alone
                does not clear the step, and on an accelerator a wait for it. Where the search ends without a proof, the
                proven part of the radius counts.
            reduction: "max" over the samples, as in the paper, or a quantile in (0, 1] of them: below 1 the most
                fragile samples no longer hold the step back, nor are they protected. Of the bound only.
            max_samples: the most samples of the batch to measure on; None for all. A maximum over fewer is an estimate
                from below, so that steps come out longer than ``max_r`` on the whole batch. The default is Redline's
                choice, and that of ``GhostRadius``: both together cost one tangent.
            remember: samples that bound lately are measured with each sub-sample, so many at most.

        Raises:
            ConfigurationError: a limit that is not positive, another radius, a quantile outside (0, 1] or of the exact
                radius, no sample.
        """
        if not 0 < max_r < math.inf:
            raise ConfigurationError(f"got max_r={max_r}; expected a positive number of radii, such as 1.")
        if radius not in ("bound", "exact"):
            raise ConfigurationError(f"got radius={radius!r}; expected 'bound' or 'exact'.")
        super().__init__(reduction, max_samples, remember)
        if radius == "exact" and self._quantile < 1:
            raise ConfigurationError(
                f"got reduction={reduction!r} of the exact radius; expected 'max': the quantile makes up for a bound "
                "that is too short, which the exact radius is not."
            )
        self.max_r, self.radius = max_r, radius

    def size(self, tangent: StepTangent) -> Tensor:
        """``r`` by the radius asked for, 0-d; by the exact one only where the bound does not clear the step."""
        r = super().size(tangent)
        if self.radius == "bound" or not bool((r > self.max_r) & r.isfinite()):
            return r
        within = 1 / self.max_r
        radius = tangent.least_radius(within).lower.to(r)
        exact = torch.where(radius >= within, r.clamp(max=self.max_r), 1 / radius)
        return torch.where(radius.isnan(), r, exact)

    def scale(self, r: Tensor, step: Step) -> Scale:
        """Shorten the step if it is too long."""
        factor = torch.where(r > self.max_r, self.max_r / r, 1.0)
        saw: dict[str, Number] = {"r": r, "max_r": self.max_r, "scale": factor, "update_norm": step.update.norm}
        kind = "exact " if self.radius == "exact" else ""
        return Scale(factor, kind + "r = {r:.3g} was over {max_r:.3g}: the step was scaled by {scale:.3g}.", saw=saw)
