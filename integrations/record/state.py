"""The values of a record as of the line last read."""

from __future__ import annotations

from types import MappingProxyType

from redline.integrations.record.schema import Header, Line
from redline.metrics import METRICS
from redline.readings import RunInfo, Series, Snapshot
from redline.trail import Measurement, Since


class State:
    """Takes in the lines of a record, in order, and gives the snapshot that each was written from."""

    def __init__(self, header: Header) -> None:
        """``header``: the one that comes first."""
        self._values: dict[Series, float] = {}
        self._measured_at: dict[Series, int] = {}
        self._told: dict[Series, int] = {}  # step of the last value of the session's, whichever file it stands in
        self._since: list[Measurement] = []
        self.begin(header)

    def begin(self, header: Header) -> None:
        """A header: the line behind it holds everything."""
        self.run: RunInfo = header.run
        self._first_step = header.first_step
        self._values.clear()
        self._measured_at.clear()
        if not header.goes_on:
            self._told.clear()

    def add(self, line: Line) -> None:
        """A snapshot line."""
        self._since.clear()
        for one in line.gauges:
            series, step, value = one
            self._values[series], self._measured_at[series] = value, step
            if step > self._told.get(series, -1) and series.metric in METRICS and METRICS[series.metric].tracked:
                self._since.append(one)
            self._told[series] = step
        self._values.update(line.counts)
        for series in line.absent:
            self._values.pop(series, None)
            self._measured_at.pop(series, None)

    def snapshot(self, line: Line) -> Snapshot:
        """The snapshot as of ``line``, which was just added."""
        return Snapshot(
            line.step,
            line.time,
            self.run,
            MappingProxyType(dict(self._values)),
            MappingProxyType(dict(self._measured_at)),
            self._first_step,
            Since(tuple(self._since), line.interventions, line.samples),
        )
