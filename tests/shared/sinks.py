"""A sink that keeps what it is handed."""

from __future__ import annotations

from collections.abc import Callable

import redline


class Keep(redline.Sink):
    """Keeps every snapshot."""

    def __init__(self, every: int | Callable[[int], bool] = 1) -> None:
        super().__init__(every)
        self.snapshots: list[redline.Snapshot] = []

    def emit(self, snapshot: redline.Snapshot) -> None:
        self.snapshots.append(snapshot)

    def values(self, metric: str, **labels: str) -> list[float]:
        return [snapshot.value(metric, **labels) for snapshot in self.snapshots]
