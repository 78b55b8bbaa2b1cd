"""Readings in a trainer's own logs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from redline.metrics import METRICS
from redline.readings import Snapshot
from redline.sink import Sink


def logged_values(snapshot: Snapshot) -> dict[str, float]:
    """Every reading by a name that loggers take: the metric's, and its labels behind slashes."""
    return {
        "/".join((series.metric, *series.labels)): value
        for series, value in snapshot.values.items()
        if METRICS[series.metric].kind != "info"
    }


class TrainerLogs(Sink):
    """Hands each snapshot to a trainer's loggers."""

    def __init__(
        self,
        log: Callable[[Mapping[str, float], int], object],
        every: int,
        step: Callable[[], int] | None = None,
    ) -> None:
        """Log on a schedule.

        Args:
            log: takes values by name, and the step they are of.
            every: optimizer steps between logs.
            step: the trainer's own count of steps, asked when a step was committed; by default Redline's.
        """
        super().__init__(every)
        self._log, self._count = log, step
        self._step: int | None = None

    def taken(self, step: int) -> None:
        """Note the step: the trainer may have gone on by the time the snapshot arrives."""
        self._step = step if self._count is None else self._count()

    def emit(self, snapshot: Snapshot) -> None:
        """Log it."""
        self._log(logged_values(snapshot), snapshot.step if self._step is None else self._step)
