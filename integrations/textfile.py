"""Metrics as a file, for clusters whose node exporter collects files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prometheus_client import write_to_textfile

from redline.errors import ConfigurationError
from redline.integrations.prometheus_families import SnapshotCollector
from redline.integrations.ranks import is_rank_zero
from redline.integrations.series_budget import DEFAULT_MAX_SERIES
from redline.readings import Snapshot
from redline.report import StabilityReport
from redline.schedules import Schedule
from redline.sink import Sink


class TextfileSink(Sink):
    """Keeps a file, on rank 0, of what ``PrometheusExporter`` would serve, for the node exporter's textfile collector.

    Each snapshot takes the place of the last in one move, so that nobody reads half of one. The file is taken away at
    the end of the session, as a served page would be; what a killed run leaves behind tells by
    ``redline_last_step_timestamp_seconds`` that it stands still. A folder that cannot be written is a warning, and the
    run goes on. Two runs that one node exporter collects would have the same series: it takes one at a time.
    """

    def __init__(
        self,
        path: str | Path = "redline.prom",
        *,
        every: int | Schedule = 100,
        max_series: int = DEFAULT_MAX_SERIES,
    ) -> None:
        """Write to a file.

        Args:
            path: of the file; its name ends in ``.prom``, or the node exporter would not read it. The folder is the one
                that was given to it as ``--collector.textfile.directory``.
            every: schedule on which it is written, in the run's own thread: a thousand series take some 10 ms.
            max_series: the most series to write; see ``SeriesBudget``.

        Raises:
            ConfigurationError: the name does not end in ``.prom``, or the budget is out of range.
        """
        super().__init__(every)
        self.path, self.max_series = Path(path), max_series
        if self.path.suffix != ".prom":
            raise ConfigurationError(
                f"got {str(path)!r}; expected a name that ends in .prom: the node exporter reads no other file."
            )
        self._collector = SnapshotCollector(max_series)
        self._writes = False  # on other ranks; settled once, since at the end the process group may be gone

    def open(self, snapshot: Snapshot) -> None:
        """Write what runs, and the counters where they stand."""
        self._collector = SnapshotCollector(self.max_series)
        self._writes = is_rank_zero()
        self.emit(snapshot)

    def emit(self, snapshot: Snapshot) -> None:
        """Write this snapshot in place of the last."""
        if not self._writes:
            return
        self._collector.snapshot = snapshot
        try:
            write_to_textfile(str(self.path), self._collector.registry)
        except OSError as error:
            raise OSError(
                f"got {str(self.path)!r}, which cannot be written ({error}); expected a file in a folder that is there "
                "and can be written. The run goes on without it"
            ) from error

    def close(self, report: StabilityReport) -> None:
        """Take the file away."""
        if self._writes:
            self._writes = False
            self.path.unlink(missing_ok=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_collector": None, "_writes": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._collector = SnapshotCollector(self.max_series)
