"""The clamp: no step longer than the radius within which the loss can be trusted to follow it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch

from redline.controller import Controller, Number, Reject, Scale
from redline.errors import ConfigurationError
from redline.monitor import Need
from redline.numerics.radii import normalized_step_size
from redline.step import Step


class StepClamp(Controller):
    """Scales the joint update by ``min(1, max_r / r)``, along the update that the optimizers really made.

    ``r = max_x spread_k(J_z(x) p) / pi`` is the update's length over the radius within which cross-entropy's Taylor
    series converges along it, from one Jacobian-vector product on each step. A step with ``r <= max_r`` stays the
    optimizer's own, bit for bit. Moments and step counters have advanced as for the whole step; decoupled weight decay
    is part of the update and is scaled with it. Under gradient accumulation r is that of the last micro-batch.

    An update that is not finite is rejected. One that cannot be measured, for want of a forward in training mode since
    the last step, is left alone, and a warning says so once. Positions whose logits are NaN say nothing of the step and
    do not count. Source: arXiv 2603.13552, section 5.
    """

    needs: ClassVar[Need] = Need.TANGENT

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
        if reduction != "max" and not (isinstance(reduction, (int, float)) and 0 < reduction <= 1):
            raise ConfigurationError(
                f"got reduction={reduction!r}; expected 'max' or a quantile in (0, 1], such as 0.99."
            )
        if max_samples is not None and max_samples < 1:
            raise ConfigurationError(
                f"got max_samples={max_samples}; expected at least 1, or None for the whole batch."
            )
        self.max_r, self.max_samples = max_r, max_samples
        self._quantile = 1.0 if reduction == "max" else float(reduction)
        self._has_measured = False

    def inspect(self, step: Step) -> Iterable[Scale | Reject]:
        """Measure the step, and scale it if it is too long."""
        tau = step.update.norm
        tangent = step.tangent(self.max_samples)
        if tangent is None:
            if step.index == 0 or not self._has_measured:
                raise ConfigurationError(
                    "got no logits to measure the first step by (a warning above says why); expected the model, or the "
                    "module that gives the logits, to be called in training mode before the step. Pass module= and "
                    "logits= to attach, or leave StepClamp out if the loss is no cross-entropy."
                )
            return []
        self._has_measured = True
        told = ~tangent.tangent.isnan().any(-1)
        r = normalized_step_size(tangent.tangent, told if tangent.mask is None else told & tangent.mask, self._quantile)
        factor = torch.where(r > self.max_r, self.max_r / r, 1.0)
        saw: dict[str, Number] = {"r": r, "max_r": self.max_r, "scale": factor, "update_norm": tau}
        return [
            Reject("the update was not finite (norm {update_norm:.3g}).", {"update_norm": tau}, ~tau.isfinite()),
            Scale(factor, "r = {r:.3g} was over {max_r:.3g}: the step was scaled by {scale:.3g}.", saw=saw),
        ]

    def state_dict(self) -> dict[str, Any]:
        """Whether it has measured a step: only the first may be refused."""
        return {"has_measured": self._has_measured}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as before."""
        self._has_measured = bool(state["has_measured"])
