"""Training without a learning rate: the length of each step comes from the radius alone."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from redline.controller import Number, Scale
from redline.errors import ConfigurationError
from redline.radius_controller import RadiusController
from redline.step import Step


class RadiusLR(RadiusController):
    """Scales the joint update to ``r`` radii, whether that is longer or shorter than the optimizers proposed.

    The rate in the parameter groups then sets no length any more, only the share of one group against another's; what
    weight decay is decoupled goes by the rate that results. A step that moves no logit is left alone. What r is, and
    what is left of a step that was scaled, rejected or could not be measured: see ``RadiusController``.

    Source: arXiv 2603.13552, table 3: ``lr = r * rho_a / |v|`` for the proposed step ``v``.
    """

    lengthens: ClassVar[bool] = True

    def __init__(
        self,
        r: float = 1.0,
        *,
        reduction: Literal["max"] | float = "max",
        max_samples: int | None = 32,
    ) -> None:
        """Set the length.

        Args:
            r: of each step, in radii; the paper finds 1 best of 0.5, 1, 2 and 4.
            reduction: "max" over the samples, as in the paper, or a quantile in (0, 1] of them.
            max_samples: the most samples of the batch to measure on; None for all. A maximum over fewer is an estimate
                from below, so that steps come out longer. The default is Redline's choice.

        Raises:
            ConfigurationError: a length that is not positive, a quantile outside (0, 1], no sample.
        """
        if not 0 < r < math.inf:
            raise ConfigurationError(f"got r={r}; expected a positive number of radii, such as 1.")
        super().__init__(reduction, max_samples)
        self.r = r

    def scale(self, r: Tensor, step: Step) -> Scale:
        """Bring the step to its length."""
        factor = torch.where((r > 0) & r.isfinite(), self.r / r, 1.0)
        saw: dict[str, Number] = {"r": r, "target": self.r, "scale": factor, "update_norm": step.update.norm}
        return Scale(factor, "r = {r:.3g} was brought to {target:.3g}: the step was scaled by {scale:.3g}.", saw=saw)
