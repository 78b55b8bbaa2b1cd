"""What a controller is: it decides on a step; the session carries the decision out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from redline.errors import ConfigurationError
from redline.monitor import Need

if TYPE_CHECKING:
    from redline.step import Step


@dataclass(frozen=True)
class Scale:
    """Commit ``theta_before + factor * p``.

    Attributes:
        factor: 0 or more, finite; a clamp gives at most 1. 1 leaves the step alone, and no trace.
        reason: what was seen and done, in words.
        parameter: qualified name of the one parameter to scale; None for the whole step.
        saw: the numbers behind it.
    """

    factor: float
    reason: str
    parameter: str | None = None
    saw: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.factor < float("inf"):
            raise ConfigurationError(f"got a scale of {self.factor}; expected a finite factor of at least 0.")


@dataclass(frozen=True)
class Withhold:
    """Set the gradients aside before the update: parameters, moments, step counters and decay stay as they are."""

    reason: str
    saw: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Reject:
    """Take the update back.

    The optimizer's state comes back too where the controller keeps a snapshot of it (``snapshots_state``); otherwise
    the run is stopped, because it would train on with moments that saw the rejected gradients.
    """

    reason: str
    saw: Mapping[str, float] = field(default_factory=dict)


Decision: TypeAlias = Scale | Withhold | Reject


@dataclass(frozen=True)
class Intervention:
    """The trace of one decision.

    Attributes:
        step: optimizer step, counted from 0.
        controller: its name in this session.
        action: "scale", "withhold" or "reject".
        reason: what was seen and done, in words.
        saw: the numbers behind it.
    """

    step: int
    controller: str
    action: str
    reason: str
    saw: Mapping[str, float]


class Controller:
    """Base of all controllers. Laws:

    - It changes nothing itself: it returns decisions.
    - With nothing to object to it returns none, and the step stays the optimizer's own, bit for bit.
    - At most one wait for the device a step.
    - It can be pickled, and what lasts between steps is in ``state_dict``.
    """

    needs: ClassVar[Need] = Need.UPDATE
    per_parameter: ClassVar[bool] = False
    """Whether it scales single parameters; these decide first, and the others on what is left."""
    snapshots_state: ClassVar[bool] = False
    """Whether the optimizer's state is copied ahead of each step, so that a rejection can bring it back."""

    def before_update(self, step: Step) -> Withhold | None:
        """After backward, before the update: whether to withhold the gradients."""
        return None

    def inspect(self, step: Step) -> Iterable[Scale | Reject]:
        """After the update: what to do with it."""
        return ()

    def state_dict(self) -> dict[str, Any]:
        """What lasts between steps; empty by default."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state_dict`` gave."""
