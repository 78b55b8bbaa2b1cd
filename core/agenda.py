"""What is due at the step to come, and what was put off from steps before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

from redline.notes import Notes
from redline.schedules import Schedule


class Scheduled(Protocol):
    """What has a schedule: a monitor or a sink."""

    due: Schedule


T = TypeVar("T", bound=Scheduled)


class Agenda:
    """Asks schedules, once a step, and remembers what was put off: it happens once, however often it fell due.

    Attributes:
        put_off: names of those that fell due at the step asked of last, and were put off.
    """

    def __init__(self, notes: Notes) -> None:
        """``notes``: where a schedule that fails is told of."""
        self._notes = notes
        self._pending: set[str] = set()
        self._overdue: set[str] = set()  # of those due at the step asked of last, as long as it has not ended
        self.put_off: list[str] = []

    def due(self, plugins: Sequence[tuple[str, T]], step: int, *, put_off: Callable[[], bool]) -> list[tuple[str, T]]:
        """Those due at ``step``, by schedule or from before.

        ``put_off``: whether to put off what can be; asked only where there is any.
        """
        asked = {name for name, plugin in plugins if self._is_due(name, plugin, step)}
        light = {name for name, plugin in plugins if getattr(plugin, "light", False)}
        self._overdue = set(self._pending)
        heavy = self._pending | asked - light
        if heavy and put_off():
            self.put_off, self._pending = [name for name, _ in plugins if name in asked - light], heavy
        else:
            self.put_off, self._pending = [], set()
        now = (heavy | asked) - self._pending
        return [(name, plugin) for name, plugin in plugins if name in now]

    def _is_due(self, name: str, plugin: Scheduled, step: int) -> bool:
        try:
            return plugin.due(step)
        except Exception as error:  # noqa: BLE001 a schedule may be anything callable; the run goes on
            self._notes.add(f"{name} is not due: its schedule failed with {type(error).__name__}: {error}")
            return False

    def state_dict(self) -> list[str]:
        """Names of what is still put off, or is to be made up for at the step to come."""
        return sorted(self._pending | self._overdue)

    def load_state_dict(self, state: Iterable[str]) -> None:
        """Take up what was put off."""
        self._pending = set(state)
