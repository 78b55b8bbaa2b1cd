"""What a controller is: it decides on a step; the session carries the decision out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from torch import Tensor

from redline.errors import ConfigurationError
from redline.monitor import Need

if TYPE_CHECKING:
    from redline.step import Step

Number: TypeAlias = "float | Tensor"
"""A float, or a 0-d tensor: on an accelerator nobody waits for it."""


@dataclass(frozen=True)
class Scale:
    """Commit ``theta_before + factor * p``.

    Attributes:
        factor: 0 or more, finite; a clamp gives at most 1. 1 leaves the step alone, and no trace. A tensor on an
            accelerator is carried out there; the trace follows once its value is on the host.
        reason: what was seen and done, in words; it may name the numbers of ``saw``, as in ``"r = {r:.3g}"``.
        parameter: qualified name of the one parameter to scale; None for the whole step.
        saw: the numbers behind it.
    """

    factor: Number
    reason: str
    parameter: str | None = None
    saw: Mapping[str, Number] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.factor, Tensor) and not 0 <= self.factor < float("inf"):
            raise ConfigurationError(f"got a scale of {self.factor}; expected a finite factor of at least 0.")


@dataclass(frozen=True)
class Reject:
    """Take the update back.

    The optimizer's state comes back too where a controller keeps a snapshot of it (``snapshots_state``); otherwise the
    run is stopped, because it would train on with moments that saw the rejected gradients.

    Attributes:
        reason: what was seen, in words, as for a scale.
        saw: the numbers behind it.
        when: whether to, 0-d bool if a tensor. On an accelerator the parameters are taken back there, and the run stops
            ahead of an update once the value is on the host.
    """

    reason: str
    saw: Mapping[str, Number] = field(default_factory=dict)
    when: bool | Tensor = True


@dataclass(frozen=True)
class Withhold:
    """Set the gradients aside before the update: parameters, moments, step counters and decay stay as they are."""

    reason: str
    saw: Mapping[str, Number] = field(default_factory=dict)


@dataclass(frozen=True)
class RollBack:
    """Put the run back to where this controller last said ``Keep``, and withhold this step's gradients."""

    reason: str
    saw: Mapping[str, Number] = field(default_factory=dict)


@dataclass(frozen=True)
class Stop:
    """Stop the run before the update, with the reason."""

    reason: str
    saw: Mapping[str, Number] = field(default_factory=dict)


@dataclass(frozen=True)
class Keep:
    """Keep a snapshot of the run as it stands, in place of this controller's last one; it changes nothing.

    It holds parameters, buffers, optimizer state and what the session was given as ``schedulers``.

    Attributes:
        memory: "device", beside the parameters, or "host", pinned where there is an accelerator.
        in_checkpoints: whether the session's ``state_dict`` carries it.
    """

    memory: Literal["device", "host"] = "device"
    in_checkpoints: bool = True


Decision: TypeAlias = Scale | Reject | Withhold | RollBack | Stop


class Controller:
    """Base of all controllers. Laws:

    - It changes nothing itself: it returns decisions.
    - With nothing to object to it returns none, and the step stays the optimizer's own, bit for bit.
    - What it has to know on the host it reads from ``step.start``, one wait for all who ask, before the update; after
      the update it decides in tensors.
    - It can be pickled, and what lasts between steps is in ``state_dict``.
    """

    needs: ClassVar[Need] = Need.UPDATE
    per_parameter: ClassVar[bool] = False
    """Whether it scales single parameters; these decide first, and the others on what is left."""
    snapshots_state: bool = False
    """Whether the optimizer's state is copied ahead of each step, so that a rejection can bring it back."""

    def before_update(self, step: Step) -> Withhold | RollBack | Stop | Keep | None:
        """After backward, before the update: whether there is to be one."""
        return None

    def inspect(self, step: Step) -> Iterable[Scale | Reject]:
        """After the update: what to do with it."""
        return ()

    def state_dict(self) -> dict[str, Any]:
        """What lasts between steps; empty by default."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state_dict`` gave."""
