"""When something is due: a schedule is a callable ``step -> bool``; steps count from 0."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from redline.errors import ConfigurationError

Schedule: TypeAlias = Callable[[int], bool]


@dataclass(frozen=True)
class Every:
    """Due at steps 0, n, 2n, ...; the first step always is, so that a run shows something at once."""

    n: int

    def __call__(self, step: int) -> bool:
        """Whether it is due at this step."""
        return step % self.n == 0


def as_schedule(every: int | Schedule) -> Schedule:
    """Read a schedule: an int means "every n steps", a callable is one already.

    Raises:
        ConfigurationError: for anything else, and for an int below 1.
    """
    if isinstance(every, int) and not isinstance(every, bool):
        if every < 1:
            raise ConfigurationError(
                f"got a schedule of {every}; expected at least 1 (every step). "
                "To switch something off, leave it out of the list."
            )
        return Every(every)
    if callable(every):
        return every
    raise ConfigurationError(
        f"got {every!r} as a schedule; expected an int (every n steps) or a callable `step -> bool`."
    )
