"""What is due at the step to come, and what it needs: schedules, within the budget that monitoring has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from redline.agenda import Agenda
from redline.controller import Controller
from redline.monitor import Monitor, Need
from redline.notes import Notes
from redline.overhead_budget import OverheadBudget
from redline.own_time import OwnTime
from redline.ranks import Ranks
from redline.sink import Sink


class Timetable:
    """Decides, once a step, what the next one is for; what monitoring cannot afford is put off, on all ranks alike.

    Attributes:
        monitors: due at the step to come, with their names.
        sinks: likewise.
        needs: of those monitors and of the controllers.
        controllers_need: of the controllers alone.
    """

    def __init__(
        self,
        monitors: Sequence[tuple[str, Monitor]],
        controllers: Sequence[tuple[str, Controller]],
        budget: OverheadBudget,
        time: OwnTime,
        ranks: Ranks,
        notes: Notes,
    ) -> None:
        """``time``: spent so far, held against the budget; ``notes``: where a schedule that fails is told of."""
        self._monitors, self._controllers = monitors, controllers
        self._budget, self._time, self._ranks = budget, time, ranks
        self._monitors_due, self._sinks_due = Agenda(notes), Agenda(notes)
        self.monitors: list[tuple[str, Monitor]] = []
        self.sinks: list[tuple[str, Sink]] = []
        self.needs = self.controllers_need = Need.NOTHING

    def arm(self, step: int, sinks: Sequence[tuple[str, Sink]], *, alone: bool = False) -> None:
        """Decide what ``step`` is for.

        Args:
            step: the step to come.
            sinks: that there are.
            alone: without asking the other ranks, which may be waiting for something else.
        """
        if self._budget.share is not None:
            self._budget.settle(*self._time.totals()[:2])
        in_debt = self._budget.in_debt
        agrees = self._budget.share is not None and not alone
        self.monitors = self._monitors_due.due(
            self._monitors, step, put_off=lambda: self._ranks.any(in_debt) if agrees else in_debt
        )
        self.sinks = self._sinks_due.due(sinks, step, put_off=lambda: in_debt)
        self.controllers_need = _joint_needs(self._controllers)
        self.needs = self.controllers_need | _joint_needs(self.monitors)

    @property
    def put_off(self) -> list[str]:
        """Names of the monitors that fell due at the step to come, and were put off."""
        return self._monitors_due.put_off

    def state_dict(self) -> list[list[str]]:
        """What is still put off: monitors, and sinks."""
        return [self._monitors_due.state_dict(), self._sinks_due.state_dict()]

    def load_state_dict(self, state: Sequence[Any]) -> None:
        """Take it up."""
        for agenda, put_off in zip((self._monitors_due, self._sinks_due), state, strict=True):
            agenda.load_state_dict(put_off)


def _joint_needs(plugins: Sequence[tuple[str, Monitor | Controller]]) -> Need:
    needs = Need.NOTHING
    for _, plugin in plugins:
        needs |= plugin.needs
    return needs
