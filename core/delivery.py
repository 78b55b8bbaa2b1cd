"""From the device to the sinks: one copy, and a snapshot once it has arrived."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from redline.host_copy import HostCopy
from redline.interventions import InterventionLog, Untold, tensors_of
from redline.margins import StepMargins, fragile_samples
from redline.notes import Notes
from redline.readings import Batch, Readings, RunInfo, Snapshot
from redline.report import StabilityReport
from redline.sink import Sink
from redline.trail import FragileSample, Measurement, Since, Trail, latest

NamedSinks = Sequence[tuple[str, Sink]]

_MOST_MEASUREMENTS, _MOST_SAMPLES = 32_768, 4_096
"""What is kept for a sink that is due seldom."""


@dataclass
class _UnderWay:
    """One copy, what it brings, and the sinks that are to see it."""

    batch: Batch
    untold: Sequence[Untold]
    margins: Sequence[tuple[int, Tensor]]
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
        self._margins: list[tuple[int, Tensor]] = []
        self._measurements: Trail[Measurement] = Trail(_MOST_MEASUREMENTS)
        self._samples: Trail[FragileSample] = Trail(_MOST_SAMPLES)
        self._seen = {name: (0, 0, 0) for name, _ in sinks}  # measurements, interventions, samples
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
            self._tell(name, sink, partial(sink.finish, self._as_seen_by(name, self.snapshot)))
        for name, sink in list(self.sinks):
            self._tell(name, sink, partial(sink.close, report))

    @property
    def under_way(self) -> bool:
        """Whether a snapshot was taken that has not arrived."""
        return self._under_way is not None

    def add_margins(self, margins: StepMargins) -> None:
        """The samples that bind at a step go with the next copy, if there is a sink to see them."""
        if self.sinks:
            self._margins.append((margins.step, margins.leading()))

    def start(self, due: NamedSinks = ()) -> None:
        """Start to bring over all there is; ``due`` are the sinks to see it. Waits for what was started before."""
        self.finish()
        batch, untold = self._readings.take(), self._log.take()
        margins, self._margins = self._margins, []
        for name, sink in due:
            self._tell(name, sink, partial(sink.taken, batch.step))
        copy = HostCopy([*tensors_of(untold), *batch.tensors, *(leading for _, leading in margins)])
        self._under_way = _UnderWay(batch, untold, margins, copy, due)
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
        self._remember(snapshot, done.margins, numbers)
        for name, sink in done.due:
            self._tell(name, sink, partial(sink.emit, self._as_seen_by(name, snapshot)))
        self._forget()

    def refresh(self) -> None:
        """Other counters were loaded: a snapshot of them, and what sinks had not seen is none of this run's."""
        self.snapshot = self._readings.fetch(self._run)
        self._seen = {name: self._so_far for name in self._seen}
        self._forget()

    @property
    def _so_far(self) -> tuple[int, int, int]:
        return self._measurements.total, self._log.told, self._samples.total

    def _remember(
        self, snapshot: Snapshot, margins: Sequence[tuple[int, Tensor]], numbers: Iterator[list[float]]
    ) -> None:
        samples = [one for step, _ in margins for one in fragile_samples(step, next(numbers))]
        if self.sinks:
            self._measurements.extend(snapshot.since.measurements)
            self._samples.extend(samples)

    def _as_seen_by(self, name: str, snapshot: Snapshot) -> Snapshot:
        """The snapshot, with what happened since the one that this sink saw before."""
        measured, told, samples = self._seen[name]
        self._seen[name] = self._so_far
        since = Since(
            self._measurements.since(measured),
            latest(self._log.latest, self._log.told - told),
            self._samples.since(samples),
        )
        return replace(snapshot, since=since)

    def _forget(self) -> None:
        """Nothing is kept that every sink has seen."""
        seen = [self._seen[name] for name, _ in self.sinks] or [self._so_far]
        self._measurements.forget(min(measured for measured, _, _ in seen))
        self._samples.forget(min(samples for _, _, samples in seen))

    def _tell(self, name: str, sink: Sink, action: Callable[[], None]) -> None:
        if not any(kept is sink for _, kept in self.sinks):
            return  # it failed since it fell due
        try:
            action()
        except Exception as error:  # noqa: BLE001 no run dies because it could not be shown
            self.sinks = [(other, kept) for other, kept in self.sinks if kept is not sink]
            self._notes.add(f"{name} failed and is switched off: {type(error).__name__}: {error}")
