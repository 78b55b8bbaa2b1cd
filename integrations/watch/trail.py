"""What a live view remembers of the last minutes."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from redline import metrics
from redline.readings import Snapshot

_MOST_KEPT = 1200
_WINDOW = 60.0  # seconds over which speed is taken


class Moment(NamedTuple):
    """One snapshot's figures; None for what was not measured."""

    step: int
    time: float
    r: float | None
    loss: float | None


class Trail:
    """The figures of the last minutes, bounded; it begins anew with another run, or where one starts over.

    Attributes:
        snapshot: the last one, or None.
        moved_at: when, by the watcher's clock, the last new step was seen; None before the first.
    """

    def __init__(self) -> None:
        self.snapshot: Snapshot | None = None
        self.moved_at: float | None = None
        self._moments: deque[Moment] = deque(maxlen=_MOST_KEPT)

    def add(self, snapshot: Snapshot, now: float) -> None:
        """Take in a snapshot; ``now``: the watcher's Unix time."""
        last = self.snapshot
        if last is not None and (snapshot.run != last.run or snapshot.step < last.step):
            self._moments.clear()
            last = None
        self.snapshot = snapshot
        if last is None:
            self.moved_at = min(snapshot.time, now)  # it may have stopped long before anybody looked
        elif snapshot.step > last.step:
            self.moved_at = now
        if not self._moments or snapshot.step > self._moments[-1].step:
            r, loss = (snapshot.series(one.name).get(()) for one in (metrics.NORMALIZED_STEP_SIZE, metrics.LOSS))
            self._moments.append(Moment(snapshot.step, snapshot.time, r, loss))

    @property
    def step_sizes(self) -> list[float]:
        """r, oldest first."""
        return [moment.r for moment in self._moments if moment.r is not None]

    @property
    def losses(self) -> list[float]:
        """The loss, oldest first."""
        return [moment.loss for moment in self._moments if moment.loss is not None]

    @property
    def steps_per_second(self) -> float | None:
        """Over the last minute of steps, or None before two of them."""
        if len(self._moments) < 2:
            return None
        last = self._moments[-1]
        first = next(moment for moment in self._moments if moment.time >= last.time - _WINDOW)
        if first is last:
            first = self._moments[-2]
        return (last.step - first.step) / (last.time - first.time) if last.time > first.time else None

    def seconds_since_step(self, now: float) -> float | None:
        """How long no new step was seen, in seconds; None before the first snapshot."""
        return None if self.moved_at is None else max(now - self.moved_at, 0.0)
