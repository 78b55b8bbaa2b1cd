"""What a sink is: it is handed snapshots and shows them somewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from redline.schedules import Schedule, as_schedule

if TYPE_CHECKING:
    from redline.readings import Snapshot
    from redline.report import StabilityReport


class Sink:
    """Base of all sinks. Laws:

    - It is handed immutable values only, and cannot change the run.
    - One that raises is switched off with a warning; the run goes on.
    - It can be pickled: handles of servers and files are made in ``open`` and left out of pickles.
    """

    def __init__(self, every: int | Schedule) -> None:
        """``every``: an int, "every n steps", or a callable ``step -> bool``; steps count from 0."""
        self.due = as_schedule(every)

    def open(self, snapshot: Snapshot) -> None:
        """The session starts; the snapshot says what runs (``.run``) and has the counters where they stand."""

    def taken(self, step: int) -> None:
        """A step at which this sink is due was committed, and its readings are on their way; ``emit`` follows."""

    def emit(self, snapshot: Snapshot) -> None:
        """A snapshot of such a step: at once on the CPU, on an accelerator once it has arrived, some steps later."""

    def finish(self, snapshot: Snapshot) -> None:
        """No more steps come: a last snapshot, whatever the schedule, for who keeps everything; ``close`` follows."""

    def close(self, report: StabilityReport) -> None:
        """The session ends."""
