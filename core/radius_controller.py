"""What the controllers that go by the radius share: measuring the step, and rejecting one that is not finite."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor

from redline.controller import AfterUpdate, Controller, Reject, RunOutline, Scale
from redline.errors import ConfigurationError
from redline.monitor import Need
from redline.sample_memory import check_sub_sample
from redline.step import Step
from redline.step_tangent import StepTangent


class RadiusController(Controller):
    """Measures ``r = max_x spread_k(J_z(x) p) / pi`` of the joint update on each step, and scales the update by it.

    ``r`` is the update's length over the radius within which cross-entropy's Taylor series converges along it, from one
    Jacobian-vector product. Moments and step counters have advanced as for the whole step; decoupled weight decay is
    part of the update and is scaled with it. Under gradient accumulation r is that of the last micro-batch.

    An update that is not finite is rejected. One that cannot be measured, for want of a forward in training mode since
    the last step, is left alone, and a warning says so once. Positions whose logits are NaN say nothing of the step and
    do not count. Source: arXiv 2603.13552, definitions 4.7 and 5.1.
    """

    needs: ClassVar[Need] = Need.TANGENT

    def __init__(self, reduction: Literal["max"] | float, max_samples: int | None, remember: int) -> None:
        if reduction != "max" and not (isinstance(reduction, (int, float)) and 0 < reduction <= 1):
            raise ConfigurationError(
                f"got reduction={reduction!r}; expected 'max' or a quantile in (0, 1], such as 0.99."
            )
        check_sub_sample(max_samples, remember)
        self.max_samples, self.remember = max_samples, remember
        self._quantile = 1.0 if reduction == "max" else float(reduction)
        self._has_measured = False

    @property
    def sub_sample(self) -> tuple[int | None, int]:
        """That of its own."""
        return self.max_samples, self.remember

    @abstractmethod
    def scale(self, r: Tensor, step: Step) -> Scale:
        """What to do with a step of ``r``, 0-d on the device."""

    def size(self, tangent: StepTangent) -> Tensor:
        """``r``, 0-d."""
        return tangent.told_step_size(self._quantile)

    def begin(self, run: RunOutline) -> None:
        """The first step has to be measurable."""
        self._has_measured = False

    def inspect(self, step: Step) -> Iterable[AfterUpdate]:
        """Measure the step, and scale it."""
        tau = step.update.norm
        tangent = step.tangent(self.max_samples, self.remember, decides=True)
        if tangent is None:
            if not self._has_measured:
                raise ConfigurationError(
                    "got no logits to measure the first step by (a warning above says why); expected the model, or the "
                    "module that gives the logits, to be called in training mode before the step. Pass module= and "
                    f"logits= to attach, or leave {type(self).__name__} out if the loss is no cross-entropy."
                )
            return []
        self._has_measured = True
        r = self.size(tangent)
        return [
            Reject("the update was not finite (norm {update_norm:.3g}).", {"update_norm": tau}, ~tau.isfinite()),
            self.scale(r, step),
        ]

    def state_dict(self) -> dict[str, Any]:
        """Whether it has measured a step: only the first may be refused."""
        return {"has_measured": self._has_measured}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as before."""
        self._has_measured = bool(state["has_measured"])
