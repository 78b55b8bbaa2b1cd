"""Reading a record: what it comes to, in memory that does not grow with it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from redline import metrics
from redline.errors import ConfigurationError
from redline.history import RunHistory
from redline.integrations.record.curves import Curves
from redline.integrations.record.parts import Part, checked_header, decoded_line, first_header, is_header, lines, parts
from redline.integrations.record.schema import Closing, Header, Line
from redline.integrations.record.state import State
from redline.interventions import Intervention, Tally, tally
from redline.readings import RunInfo, Series, Snapshot
from redline.report import StabilityReport
from redline.trail import FragileSample

_MOST_INTERVENTIONS, _MOST_SAMPLES = 10_000, 20


@dataclass
class Record:
    """A run as its record has it.

    Attributes:
        path: of the first file.
        snapshot: the last.
        history: as the session's own.
        curves: every gauge over the run, thinned.
        interventions: what the controllers did, oldest first; of very many, the last 10,000.
        tallies: all they did, one a controller and action.
        samples: the most fragile samples of the run, most fragile first, 20 at most.
        closing: what the end of the run told; None for a run that has not ended, or was killed.
        seconds: from the first line of the last session to its last.
        notes: what there is to say of the record itself: what of it is broken off, missing or superseded.
    """

    path: Path
    snapshot: Snapshot
    history: RunHistory = field(default_factory=RunHistory, repr=False)
    curves: Curves = field(default_factory=Curves, repr=False)
    interventions: Sequence[Intervention] = field(default=(), repr=False)
    tallies: tuple[Tally, ...] = ()
    samples: tuple[FragileSample, ...] = ()
    closing: Closing | None = None
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def run(self) -> RunInfo:
        """What ran."""
        return self.snapshot.run

    def report(self) -> StabilityReport:
        """The stability report, as the session gave it at its end or would have given it by the last line."""
        budget = self.snapshot.series(metrics.OVERHEAD_BUDGET_RATIO.name).get(())
        closing = self.closing or Closing(self.seconds, budget, (), ())
        return StabilityReport.of(
            self.snapshot,
            self.history,
            self.tallies,
            closing.snapshots,
            closing.notes,
            closing.seconds,
            closing.overhead_budget,
        )


def read(path: str | Path) -> Record:
    """Read a record, of a run that has ended, was killed or goes on.

    Args:
        path: the record's first file, and with it those that followed; or one of these, to read only that.

    Raises:
        ConfigurationError: no record is there, or none that this Redline reads; says why.
    """
    path = Path(path)
    first_header(path)
    there = parts(path)
    reading = _Reading(path, [session for part in there for session in _sessions(part)])
    for part in there:
        reading.add(part)
    return reading.record(there)


class _Session(NamedTuple):
    """A session within a file."""

    first_step: int
    goes_on: bool


def _sessions(part: Part) -> Iterator[_Session]:
    """Of a file, found without reading more of it than the headers."""
    with part.path.open("rb") as file:
        for text, whole in lines(file):
            if whole and is_header(text):
                header = checked_header(text, part.path)
                yield _Session(header.first_step, header.goes_on)


class _Reading:
    """Goes through the lines of all files once, in order.

    What a resumed session did again supersedes what the sessions before it had done from there on.
    """

    def __init__(self, path: Path, sessions: Sequence[_Session]) -> None:
        self._path = path
        self._until: list[float] = []  # of each session, the step from which it is superseded
        until, before = math.inf, [None, *sessions]
        for session, earlier in reversed(list(zip(sessions, before, strict=False))):
            self._until.insert(0, until)
            if not session.goes_on or earlier is None or earlier.first_step != session.first_step:
                until = min(until, session.first_step)
        self._session = -1
        self._state: State | None = None
        self._last: Snapshot | None = None
        self._line: Line | None = None
        self._began = 0.0
        self._closing: Closing | None = None
        self._seen: dict[Series, int] = {}
        self._history, self._curves = RunHistory(), Curves()
        self._interventions: deque[Intervention] = deque(maxlen=_MOST_INTERVENTIONS)
        self._tallies: dict[tuple[str, str], Tally] = {}
        self._samples: list[FragileSample] = []
        self._garbled: list[str] = []
        self._left_out = 0

    def add(self, part: Part) -> None:
        """Take in a file."""
        first_header(part.path)
        with part.path.open("rb") as file:
            for number, (text, whole) in enumerate(lines(file), 1):
                if whole and is_header(text):
                    self._begin(checked_header(text, part.path))
                    continue
                said = decoded_line(text, part.path, number) if text else None
                if isinstance(said, Line):
                    self._add_line(said)
                elif isinstance(said, Closing):
                    self._closing = said
                elif text:
                    what = "unreadable" if whole else "broken off"
                    self._garbled.append(f"Line {number} of {part.path.name} is {what} and was left out.")

    def _begin(self, header: Header) -> None:
        self._session += 1
        if self._state is None:
            self._state = State(header)
        self._state.begin(header)
        if not header.goes_on or self._line is None:
            self._line, self._began = None, math.nan
        self._closing = None

    def _add_line(self, line: Line) -> None:
        assert self._state is not None
        until = self._until[self._session]
        self._state.add(line)
        self._line = line
        self._began = line.time if math.isnan(self._began) else self._began
        self._left_out += line.step >= until
        for series, step, value in sorted(line.gauges, key=lambda one: one.step):
            if step < until and step > self._seen.get(series, -2):
                self._seen[series] = step
                self._history.record(series, step, value)
                self._curves.add(series, step, value)
        for one in line.interventions:
            if one.step < until:
                self._interventions.append(one)
                tally(self._tallies, one)
        self._samples += [sample for sample in line.samples if sample.step < until]
        if len(self._samples) > 50 * _MOST_SAMPLES:
            self._samples = worst(self._samples)

    def record(self, there: Sequence[Part]) -> Record:
        """What it comes to."""
        if self._state is None or self._line is None:
            raise ConfigurationError(
                f"got {self._path}, which holds no whole line; expected a run's first step at least."
            )
        return Record(
            self._path,
            self._state.snapshot(self._line),
            self._history,
            self._curves,
            tuple(self._interventions),
            tuple(self._tallies.values()),
            tuple(worst(self._samples)),
            self._closing,
            self._line.time - self._began,
            tuple(self._notes(there)),
        )

    def _notes(self, there: Sequence[Part]) -> Iterator[str]:
        if self._closing is None:
            assert self._line is not None
            yield f"The run has not ended in order: it goes on, or was killed after step {self._line.step}."
        yield from self._garbled[:5]
        if len(self._garbled) > 5:
            yield f"{len(self._garbled) - 5} more lines are unreadable and were left out."
        numbers = [part.number for part in there]
        if gone := sorted(set(range(numbers[0], numbers[-1])) - set(numbers)):
            names = f"file {gone[0]}" if len(gone) == 1 else f"files {gone[0]} to {gone[-1]}"
            yield f"Of the record's files, {names} are gone: what the run did there is in no figure but the counts."
        if self._left_out:
            yield (
                f"{self._left_out} lines were left out: a later session in the same file did those steps again, or "
                "was another run."
            )


def worst(samples: Sequence[FragileSample]) -> list[FragileSample]:
    """The most fragile, by the exact radius where it is known; what is NaN comes first."""

    def fragility(one: FragileSample) -> float:
        r = one.r if one.exact_r is None else one.exact_r
        return math.inf if math.isnan(r) else r

    return sorted(samples, key=fragility, reverse=True)[:_MOST_SAMPLES]
