"""The clamp: no step longer than the radius within which the loss can be trusted to follow it."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from redline.controller import Number, Scale
from redline.errors import ConfigurationError
from redline.radius_controller import RadiusController
from redline.step import Step


class StepClamp(RadiusController):
    """Scales the joint update by ``min(1, max_r / r)``, along the update that the optimizers really made.

    A step with ``r <= max_r`` stays the optimizer's own, bit for bit. What r is, and what is left of a step that was
    scaled, rejected or could not be measured: see ``RadiusController``. Source: arXiv 2603.13552, section 5.
    """

    def __init__(
        self,
        max_r: float = 1.0,
        *,
        reduction: Literal["max"] | float = "max",
        max_samples: int | None = 32,
    ) -> None:
        """Set the limit.

        Args:
            max_r: the longest step allowed, in radii; 1, the default, is the redline.
            reduction: "max" over the samples, as in the paper, or a quantile in (0, 1] of them: below 1 the most
                fragile samples no longer hold the step back, nor are they protected.
            max_samples: the most samples of the batch to measure on; None for all. A maximum over fewer is an estimate
                from below, so that steps come out longer than ``max_r`` on the whole batch. The default is Redline's
                choice, and that of ``GhostRadius``: both together cost one tangent.

        Raises:
            ConfigurationError: a limit that is not positive, a quantile outside (0, 1], no sample.
        """
        if not 0 < max_r < math.inf:
            raise ConfigurationError(f"got max_r={max_r}; expected a positive number of radii, such as 1.")
        super().__init__(reduction, max_samples)
        self.max_r = max_r

    def scale(self, r: Tensor, step: Step) -> Scale:
        """Shorten the step if it is too long."""
        factor = torch.where(r > self.max_r, self.max_r / r, 1.0)
        saw: dict[str, Number] = {"r": r, "max_r": self.max_r, "scale": factor, "update_norm": step.update.norm}
        return Scale(factor, "r = {r:.3g} was over {max_r:.3g}: the step was scaled by {scale:.3g}.", saw=saw)
