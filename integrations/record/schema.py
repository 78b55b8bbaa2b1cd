"""What the lines of a record are: JSON objects, one a line. docs/records.md describes them for other readers.

- A header, the first line of each file and of each session that goes on in it: ``{"format", "version", "run", ...}``.
- A snapshot: ``{"step", "time", "gauges", "counts", "absent", "interventions", "samples"}``, what is empty left out. It
  holds what is new since the line before; behind a header, everything.
- A closing, the last line of a session that ended in order: ``{"closed": {...}}``.

Numbers that JSON does not have are the strings "NaN", "Infinity" and "-Infinity".
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from redline.interventions import Intervention
from redline.readings import RunInfo, Series, Snapshot
from redline.report import KeptSnapshot, StabilityReport
from redline.trail import FragileSample, Measurement

FORMAT, VERSION = "redline-record", 1


class MalformedError(ValueError):
    """A line is JSON, but not as the schema has it."""


@dataclass(frozen=True)
class Header:
    """What a file, or a session within it, starts with.

    Attributes:
        run: what ran.
        first_step: of the session: 0, or where it was resumed.
        part: the file's number within the record, 0 for the first.
        goes_on: whether the session began in an earlier file.
    """

    run: RunInfo
    first_step: int
    part: int
    goes_on: bool


@dataclass(frozen=True)
class Line:
    """A snapshot line: what is new in it."""

    step: int
    time: float
    gauges: tuple[Measurement, ...]
    counts: Mapping[Series, float]
    absent: tuple[Series, ...]
    interventions: tuple[Intervention, ...]
    samples: tuple[FragileSample, ...]

    @property
    def says_nothing(self) -> bool:
        """Whether nothing is new."""
        return not (self.gauges or self.counts or self.absent or self.interventions or self.samples)


@dataclass(frozen=True)
class Closing:
    """What only the end of a run tells: see ``StabilityReport`` for each."""

    seconds: float
    overhead_budget: float | None
    snapshots: tuple[KeptSnapshot, ...]
    notes: tuple[str, ...]


# To JSON ------------------------------------------------------------------------------------------------------------


def header_text(header: Header) -> bytes:
    """The line of a header."""
    return _text({"format": FORMAT, "version": VERSION, **asdict(header)})


def line_of(snapshot: Snapshot, before: Snapshot | None) -> Line:
    """What is new in a snapshot since ``before``, the one of the line before it; all of it where that is None."""
    values, measured_at = snapshot.values, snapshot.measured_at
    tracked = {(one.series, one.step) for one in snapshot.since.measurements}
    gauges = list(snapshot.since.measurements)
    counts: dict[Series, float] = {}
    for series, value in values.items():
        step = measured_at.get(series)
        if before is not None and step == before.measured_at.get(series) and _same(value, before.values.get(series)):
            continue
        if step is None:
            counts[series] = value
        elif (series, step) not in tracked:
            gauges.append(Measurement(series, step, value))
    absent = () if before is None else tuple(series for series in before.values if series not in values)
    since = snapshot.since
    return Line(snapshot.step, snapshot.time, tuple(gauges), counts, absent, since.interventions, since.samples)


def line_text(line: Line) -> bytes:
    """The line of a snapshot."""
    gauges: dict[str, dict[tuple[str, ...], list[Any]]] = {}
    for (metric, labels), step, value in line.gauges:
        gauges.setdefault(metric, {}).setdefault(labels, []).append([step, _number(value)])
    counts: dict[str, list[Any]] = {}
    for (metric, labels), value in line.counts.items():
        counts.setdefault(metric, []).append([labels, _number(value)])
    content = {
        "step": line.step,
        "time": line.time,
        "gauges": {metric: list(points.items()) for metric, points in gauges.items()},
        "counts": counts,
        "absent": line.absent,
        "interventions": [
            {**vars(one), "saw": {name: _number(value) for name, value in one.saw.items()}}
            for one in line.interventions
        ],
        "samples": [
            [one.step, one.sample, _number(one.r), None if one.exact_r is None else _number(one.exact_r), one.rank]
            for one in line.samples
        ],
    }
    return _text({name: value for name, value in content.items() if value or name in ("step", "time")})


def closing_text(report: StabilityReport) -> bytes:
    """The line that ends a session."""
    closing = {
        "seconds": report.seconds,
        "overhead_budget": report.overhead_budget,
        "snapshots": [asdict(kept) for kept in report.snapshots],
        "notes": report.notes,
    }
    return _text({"closed": closing})


def _text(content: Any) -> bytes:
    return (
        json.dumps(content, separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode(errors="replace") + b"\n"
    )


def _number(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _same(one: float, other: float | None) -> bool:
    return one == other or (other is not None and math.isnan(one) and math.isnan(other))


# From JSON ----------------------------------------------------------------------------------------------------------


def decoded(text: bytes) -> Header | Line | Closing:
    """What a line says.

    Raises:
        ValueError: it is not JSON: broken off, or none of a record's.
        MalformedError: it is JSON, but not as the schema has it.
    """
    content = json.loads(text)
    try:
        if "format" in content:
            return _header(content)
        return _closing(content["closed"]) if "closed" in content else _line(content)
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise MalformedError(f"{type(error).__name__}: {error}") from error


def _header(content: Mapping[str, Any]) -> Header:
    said = content["run"]
    run, version, precision, strategy = (str(said[name]) for name in ("run", "version", "precision", "strategy"))
    named = RunInfo(run, version, precision, strategy, int(said["world_size"]))
    return Header(named, int(content["first_step"]), int(content["part"]), bool(content["goes_on"]))


def _line(content: Mapping[str, Any]) -> Line:
    return Line(
        int(content["step"]),
        float(content["time"]),
        tuple(_measurements(content.get("gauges", {}))),
        {
            Series(metric, tuple(labels)): float(value)
            for metric, counts in content.get("counts", {}).items()
            for labels, value in counts
        },
        tuple(Series(metric, tuple(labels)) for metric, labels in content.get("absent", ())),
        tuple(_intervention(one) for one in content.get("interventions", ())),
        tuple(
            FragileSample(int(step), sample, float(r), None if exact is None else float(exact), *map(int, rank))
            for step, sample, r, exact, *rank in content.get("samples", ())
        ),
    )


def _measurements(gauges: Mapping[str, Iterable[Any]]) -> Iterator[Measurement]:
    for metric, several in gauges.items():
        for labels, points in several:
            series = Series(metric, tuple(labels))
            for step, value in points:
                yield Measurement(series, int(step), float(value))


def _intervention(one: Mapping[str, Any]) -> Intervention:
    saw = {name: float(value) for name, value in one["saw"].items()}
    by_design = bool(one.get("by_design", False))
    return Intervention(int(one["step"]), one["controller"], one["action"], one["reason"], saw, by_design)


def _closing(content: Mapping[str, Any]) -> Closing:
    return Closing(
        float(content["seconds"]),
        content["overhead_budget"],
        tuple(KeptSnapshot(**kept) for kept in content["snapshots"]),
        tuple(content["notes"]),
    )
