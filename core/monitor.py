"""What a monitor is: it observes a step and never changes anything."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Flag
from typing import TYPE_CHECKING, Any, ClassVar

from redline.schedules import Schedule, as_schedule

if TYPE_CHECKING:
    from redline.readings import Readings
    from redline.step import Step


class Need(Flag):
    """What the session has to prepare before a step's update, for those who ask for it afterwards."""

    NOTHING = 0
    GRADIENTS = 1  # step.gradient_norm
    UPDATE = 2  # step.update, which takes a copy of the parameters before the step
    TANGENT = 4 | UPDATE  # step.tangent(), which takes the model's inputs besides
    LAYERS = 8 | TANGENT  # step.tangent().layers, from the same pass


class Monitor:
    """Base of all monitors. Laws:

    - ``measure`` changes nothing it is shown, and draws no random number from a stream of the run's.
    - It leaves its readings on the device: no ``.item()``, no copy to the host.
    - What cannot be measured is not written, or written as absent; never as a number.
    - It can be pickled, and what lasts between steps is in ``state_dict``.
    - On several ranks it is due at the same steps on all, and asks the step for the same things: what it is given there
      the ranks measure together.
    """

    needs: ClassVar[Need] = Need.NOTHING
    after_commit: ClassVar[bool] = False
    """Whether to measure what was committed; by default the step is measured as the optimizer proposed it."""
    light: ClassVar[bool] = False
    """Whether it costs next to nothing: then no budget puts it off."""

    def __init__(self, every: int | Schedule) -> None:
        """``every``: an int, "every n steps", or a callable ``step -> bool``; steps count from 0."""
        self.due = as_schedule(every)

    def measure(self, step: Step, readings: Readings) -> None:
        """Measure one step."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What lasts between steps; empty by default."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state_dict`` gave."""
