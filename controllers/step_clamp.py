"""The clamp: no step longer than the radius within which the loss can be trusted to follow it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from redline.controller import AfterUpdate, Number, RunOutline, Scale
from redline.errors import ConfigurationError
from redline.host_copy import moved_to
from redline.radius_controller import RadiusController
from redline.sample_memory import MAX_SAMPLES, REMEMBER
from redline.step import Step
from redline.step_tangent import StepTangent

_WARY = 0.5  # of max_r: from there on every step is measured
_LOUDER = 2.0  # times the loss at the last measurement: no quiet step


class _Measured(NamedTuple):
    """The last step measured: ``r``, 0-d; whose updates, and the norm of each, ``(parameters,)``; the loss, if any."""

    r: Tensor
    names: tuple[str, ...]
    norms: Tensor
    loss: Tensor | None


class StepClamp(RadiusController):
    """Scales the joint update by ``min(1, max_r / r)``, along the update that the optimizers really made.

    A step with ``r <= max_r`` stays the optimizer's own, bit for bit.

    It need not measure what it can rule out. A step is left unmeasured only while all of this holds:

    - the forecast ``r' max_l |p_l| / |p'_l|`` is under ``max_r / 2``, where ``r'``, more than 0, is that of the last
      measured step, ``p_l`` the update of one parameter and ``p'_l`` its update then;
    - the observed loss is at most twice what it was then;
    - that was fewer than ``stale_after`` steps ago (2, 4, 8, ... at first, as long as all stays quiet).

    So a parameter that moves further than the forecast allows is always measured before the commit, whenever that
    comes. What is not seen before the next measurement is what makes r longer at norms that do not grow and an equal
    loss: updates that turn within a parameter, or no longer cancel one another, or inputs, to where logits are more
    than twice as sensitive.

    What r is, and what is left of a step that was scaled, rejected or could not be measured: see ``RadiusController``.
    Source: arXiv 2603.13552, section 5.
    """

    def __init__(
        self,
        max_r: float = 1.0,
        *,
        radius: Literal["bound", "exact"] = "bound",
        reduction: Literal["max"] | float = "max",
        max_samples: int | None = MAX_SAMPLES,
        remember: int = REMEMBER,
        stale_after: int = 20,
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
            stale_after: the steps after which a quiet step is measured all the same; 1 measures every step. The default
                is Redline's choice: a tangent on one step of 20 costs about 2 %. With more than 1 the step is waited
                for once, on an accelerator.

        Raises:
            ConfigurationError: a limit that is not positive, another radius, a quantile outside (0, 1] or of the exact
                radius, no sample, a staleness below 1.
        """
        if not 0 < max_r < math.inf:
            raise ConfigurationError(f"got max_r={max_r}; expected a positive number of radii, such as 1.")
        if radius not in ("bound", "exact"):
            raise ConfigurationError(f"got radius={radius!r}; expected 'bound' or 'exact'.")
        if isinstance(stale_after, bool) or not isinstance(stale_after, int) or stale_after < 1:
            raise ConfigurationError(
                f"got stale_after={stale_after!r}; expected a number of steps, or 1 to measure each of them."
            )
        super().__init__(reduction, max_samples, remember)
        if radius == "exact" and self._quantile < 1:
            raise ConfigurationError(
                f"got reduction={reduction!r} of the exact radius; expected 'max': the quantile makes up for a bound "
                "that is too short, which the exact radius is not."
            )
        self.max_r, self.radius, self.stale_after = max_r, radius, stale_after
        self._forget()

    def _forget(self) -> None:
        self._measured: _Measured | None = None
        self._interval, self._since = 1, 0

    def begin(self, run: RunOutline) -> None:
        """Nothing is known yet: the first step is measured."""
        super().begin(run)
        self._forget()

    def inspect(self, step: Step) -> Iterable[AfterUpdate]:
        """Measure the step, unless it can be ruled out that it is too long, and shorten it if it is."""
        if self.stale_after > 1 and self._may_pass(step):
            return []
        return super().inspect(step)

    def _may_pass(self, step: Step) -> bool:
        self._since += 1
        last, norms, loss = self._measured, step.update_norms, step.comparable_loss
        wary = _WARY * self.max_r
        if last is None or last.names != tuple(step.before) or (last.loss is None) != (loss is None):
            return False
        ratio = torch.where(norms == 0, 0.0, norms / moved_to(last.norms, norms)).amax()
        losses = [one for one in (loss, last.loss) if one is not None]
        r, grown, *heard = step.read([last.r, ratio, *losses])
        if self._since == 1:
            self._interval = min(2 * self._interval, self.stale_after) if 0 < r < wary else 1
        quiet = not heard or heard[0] == heard[1] or heard[0] <= _LOUDER * heard[1] < math.inf
        return self._since < min(self._interval, self.stale_after) and r * grown < wary and quiet

    def size(self, tangent: StepTangent) -> Tensor:
        """``r`` by the radius asked for, 0-d; by the exact one only where the bound does not clear the step."""
        r = super().size(tangent)
        if self.radius == "bound" or not bool((r > self.max_r) & r.isfinite()):
            return r
        within = 1 / self.max_r
        radius = tangent.least_radius(within).to(r)
        exact = torch.where(radius >= within, r.clamp(max=self.max_r), 1 / radius)
        return torch.where(radius.isnan(), r, exact)

    def scale(self, r: Tensor, step: Step) -> Scale:
        """Shorten the step if it is too long."""
        if self.stale_after > 1:
            self._measured, self._since = _Measured(r, tuple(step.before), step.update_norms, step.comparable_loss), 0
        factor = torch.where(r > self.max_r, self.max_r / r, 1.0)
        saw: dict[str, Number] = {"r": r, "max_r": self.max_r, "scale": factor, "update_norm": step.update.norm}
        kind = "exact " if self.radius == "exact" else ""
        return Scale(factor, kind + "r = {r:.3g} was over {max_r:.3g}: the step was scaled by {scale:.3g}.", saw=saw)

    def state_dict(self) -> dict[str, Any]:
        """The last step measured, and how long it may stand for others."""
        last = None if self._measured is None else tuple(self._measured)
        return {**super().state_dict(), "measured": last, "interval": self._interval, "since": self._since}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as before."""
        super().load_state_dict(state)
        self._measured = None if state["measured"] is None else _Measured(*state["measured"])
        self._interval, self._since = int(state["interval"]), int(state["since"])
