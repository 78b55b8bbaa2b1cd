"""Training without a learning rate: the length of each step comes from the radius."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from redline.controller import AfterUpdate, Number, RunOutline, Scale
from redline.errors import ConfigurationError
from redline.host_copy import moved_to
from redline.radius_controller import RadiusController
from redline.sample_memory import MAX_SAMPLES, REMEMBER
from redline.step import Step
from redline.update_limits import UpdateLimits


class RadiusLR(RadiusController):
    """Scales the joint update to ``r`` radii, whether that is longer or shorter than the optimizers proposed.

    The rate in the parameter groups then sets no length any more, only one group's share against another's; decoupled
    weight decay goes by the rate that results. A step that moves no logit is left alone. Two limits go with it, since
    the radius is that of one step on one batch:

    - Early in training it is long, because the logits hardly move yet, and what breaks first is their linearization:
      no matrix is pushed harder than ``max_update_to_weight`` of its own strength, ``sigma_1(dW)`` over
      ``sigma_1(W)``, net of decoupled decay. The rest of the step keeps its length.
    - Late in training it differs much from batch to batch: the rate that results grows at most by ``max_growth`` from
      one step to the next, while it may fall at once, so that steps keep to the short radii among them.

    What r is, and what is left of a step that was scaled, rejected or could not be measured: see ``RadiusController``.

    Source: arXiv 2603.13552, table 3: ``lr = r * rho_a / |v|`` for the proposed step ``v``. The two limits are
    Redline's own.
    """

    per_parameter: ClassVar[bool] = True
    lengthens: ClassVar[bool] = True

    def __init__(
        self,
        r: float = 1.0,
        *,
        max_update_to_weight: float | None = 0.3,
        max_growth: float | None = 1.02,
        reduction: Literal["max"] | float = "max",
        max_samples: int | None = MAX_SAMPLES,
        remember: int = REMEMBER,
    ) -> None:
        """Set the length.

        Args:
            r: of each step, in radii; the paper finds 1 best of 0.5, 1, 2 and 4.
            max_update_to_weight: the hardest push on a matrix; None for no limit, as in the paper. The default is
                Redline's choice.
            max_growth: of the rate that results, from one step to the next; None for no limit, as in the paper. The
                default is Redline's choice.
            reduction: "max" over the samples, as in the paper, or a quantile in (0, 1] of them.
            max_samples: the most samples of the batch to measure on; None for all. A maximum over fewer is an estimate
                from below, so that steps come out longer. The default is Redline's choice.
            remember: samples that bound lately are measured with each sub-sample, so many at most.

        Raises:
            ConfigurationError: a length or a limit that is not positive, a growth of 1 or less, a quantile outside
                (0, 1], no sample.
        """
        if not 0 < r < math.inf:
            raise ConfigurationError(f"got r={r}; expected a positive number of radii, such as 1.")
        if max_update_to_weight is not None and not 0 < max_update_to_weight < math.inf:
            raise ConfigurationError(
                f"got max_update_to_weight={max_update_to_weight}; expected a positive number, such as 0.3, or None."
            )
        if max_growth is not None and not 1 < max_growth < math.inf:
            raise ConfigurationError(f"got max_growth={max_growth}; expected more than 1, such as 1.02, or None.")
        super().__init__(reduction, max_samples, remember)
        self.r, self.max_update_to_weight, self.max_growth = r, max_update_to_weight, max_growth
        self._forget()

    def _forget(self) -> None:
        most = self.max_update_to_weight
        self._limits = None if most is None else UpdateLimits(most, "weight")
        self._last_rate = torch.tensor(math.inf)

    def begin(self, run: RunOutline) -> None:
        """Start cold."""
        super().begin(run)
        self._forget()

    def inspect(self, step: Step) -> Iterable[AfterUpdate]:
        """Measure the step, bring it to its length, and hold matrices that it would push too hard."""
        decisions: list[AfterUpdate] = list(super().inspect(step))
        if decisions and self._limits is not None:
            scale = decisions[-1]
            assert isinstance(scale, Scale)
            if (held := self._limits.scale(step, scale.factor)) is not None:
                decisions.append(held)
        return decisions

    def scale(self, r: Tensor, step: Step) -> Scale:
        """Bring the step to its length."""
        rates = {id(one.lr) if isinstance(one.lr, Tensor) else one.lr: one.lr for one in step.rates.values()}
        lr = torch.stack([moved_to(torch.as_tensor(rate), r) for rate in rates.values()]).amax()
        last = moved_to(self._last_rate, r)
        growth = math.inf if self.max_growth is None else self.max_growth
        factor = torch.fmin(self.r / r, growth * last / lr)  # where the rate is 0 nothing limits it, and nothing moves
        told = (r > 0) & factor.isfinite()  # an infinite r is told of too, and nothing of such a step committed
        self._last_rate = torch.where(told & (factor > 0), factor * lr, last)
        factor = torch.where(told, factor, 1.0)
        saw: dict[str, Number] = {"r": r, "brought": r * factor, "scale": factor, "update_norm": step.update.norm}
        return Scale(factor, "r = {r:.3g} was brought to {brought:.3g}: the step was scaled by {scale:.3g}.", saw=saw)

    def state_dict(self) -> dict[str, Any]:
        """The last rate, and warm starts."""
        limits = {} if self._limits is None else self._limits.state_dict()
        return {**super().state_dict(), "last_rate": self._last_rate, "limits": limits}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as before."""
        super().load_state_dict(state)
        self._last_rate = state["last_rate"]
        if self._limits is not None and state["limits"]:
            self._limits.load_state_dict(state["limits"])
