"""From the device to the sinks: one copy, and a snapshot once it has arrived."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from redline.host_copy import HostCopy
from redline.interventions import InterventionLog, Untold, tensors_of
from redline.notes import Notes
from redline.readings import Batch, Readings, RunInfo
from redline.report import StabilityReport
from redline.sink import Sink

NamedSinks = Sequence[tuple[str, Sink]]


@dataclass
class _UnderWay:
    """One copy, what it brings, and the sinks that are to see it."""

    batch: Batch
    untold: Sequence[Untold]
    copy: HostCopy
    due: NamedSinks


class Delivery:
    """Brings readings and decisions to the host in one copy, and hands snapshots to sinks, in the order taken.

    At most one copy is under way. On the CPU it has arrived as soon as it was started, and so has the snapshot.

    Attributes:
        snapshot: the last that has arrived.
        sinks: those that have not failed, with their names.
    """

    def __init__(self, readings: Readings, log: InterventionLog, sinks: NamedSinks, run: RunInfo, notes: Notes) -> None:
        """``run``: what the snapshots are of."""
        self._readings, self._log, self._run, self._notes = readings, log, run, notes
        self._under_way: _UnderWay | None = None
        self.sinks = list(sinks)
        self.snapshot = readings.fetch(run)

    def open(self) -> None:
        """The session starts."""
        for name, sink in list(self.sinks):
            self._tell(name, sink, partial(sink.open, self.snapshot))

    def close(self, report: StabilityReport) -> None:
        """The session ends."""
        self.finish()
        for name, sink in list(self.sinks):
            self._tell(name, sink, partial(sink.close, report))

    @property
    def under_way(self) -> bool:
        """Whether a snapshot was taken that has not arrived."""
        return self._under_way is not None

    def start(self, due: NamedSinks = ()) -> None:
        """Start to bring over all there is; ``due`` are the sinks to see it. Waits for what was started before."""
        self.finish()
        batch, untold = self._readings.take(), self._log.take()
        for name, sink in due:
            self._tell(name, sink, partial(sink.taken, batch.step))
        self._under_way = _UnderWay(batch, untold, HostCopy([*tensors_of(untold), *batch.tensors]), due)
        self.arrive()

    def arrive(self) -> None:
        """Hand over what is under way, if it has arrived; waits for nothing."""
        if self._under_way is not None and self._under_way.copy.ready:
            self.finish()

    def finish(self) -> None:
        """Wait for what is under way, and hand it over."""
        if self._under_way is None:
            return
        done, self._under_way = self._under_way, None
        numbers = iter(done.copy.read())
        self._log.receive(done.untold, numbers, done.batch.count)
        self.snapshot = snapshot = self._readings.receive(done.batch, numbers, self._run)
        for name, sink in done.due:
            self._tell(name, sink, partial(sink.emit, snapshot))

    def refresh(self) -> None:
        """Other counters were loaded: a snapshot of them."""
        self.snapshot = self._readings.fetch(self._run)

    def _tell(self, name: str, sink: Sink, action: Callable[[], None]) -> None:
        if not any(kept is sink for _, kept in self.sinks):
            return  # it failed since it fell due
        try:
            action()
        except Exception as error:  # noqa: BLE001 no run dies because it could not be shown
            self.sinks = [(other, kept) for other, kept in self.sinks if kept is not sink]
            self._notes.add(f"{name} failed and is switched off: {type(error).__name__}: {error}")
