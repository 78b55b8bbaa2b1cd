"""What the page's script draws from: charts over steps, and the layers' quantities over steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from redline.integrations.record.reader import Record
from redline.metrics import Metric
from redline.readings import Series

MOST_COLUMNS, MOST_LAYERS, MOST_LINES, MOST_MARKS = 240, 160, 8, 400
"""Of a heat map; of the layers in it; of the lines below it; of marks on a chart."""


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: as in the legend.
        points: ``(step, value)`` in order; NaN leaves a gap.
        colour: its place in the palette.
        dashed: whether it is a second reading of something else in the chart.
    """

    name: str
    points: Sequence[tuple[int, float]]
    colour: int
    dashed: bool = False


def chart(
    lines: Sequence[Line],
    *,
    unit: str = "",
    log: bool = False,
    redline: bool = False,
    marks: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """A chart over steps.

    Args:
        lines: those without a point are left out.
        unit: of the vertical axis.
        log: whether that is logarithmic.
        redline: whether to draw the line at 1.
        marks: ``{"step", "action", "text"}`` of what is to be marked.
    """
    drawn = [line for line in lines if line.points]
    return {
        "kind": "chart",
        "unit": unit,
        "log": log,
        "redline": redline,
        "marks": thinned(marks, MOST_MARKS),
        "lines": [
            {
                "name": line.name,
                "x": [step for step, _ in line.points],
                "y": [value for _, value in line.points],
                "colour": line.colour,
                "dashed": line.dashed,
            }
            for line in drawn
        ],
    }


def curve(record: Record, metric: Metric, *labels: str) -> list[tuple[int, float]]:
    """The points of one series, or none."""
    found = record.curves.get(Series(metric.name, labels))
    return found.points() if found else []


def by_label(record: Record, metric: Metric) -> dict[tuple[str, ...], list[tuple[int, float]]]:
    """The points of a metric's series, by their label values, in the order in which they first came."""
    return {series.labels: one.points() for series, one in record.curves.items() if series.metric == metric.name}


def columns(steps: Sequence[int]) -> list[int]:
    """The steps at which the columns of a heat map begin: all of them, or so many evenly over the run."""
    distinct = sorted(set(steps))
    if len(distinct) <= MOST_COLUMNS:
        return distinct
    first, last = distinct[0], distinct[-1]
    return [first + (last + 1 - first) * column // MOST_COLUMNS for column in range(MOST_COLUMNS)]


def row(points: Sequence[tuple[int, float]], begins: Sequence[int]) -> list[float]:
    """The highest value in each column; NaN where there is none, and where none is finite."""
    found, at = [math.nan] * len(begins), 0
    for step, value in points:
        while at + 1 < len(begins) and begins[at + 1] <= step:
            at += 1
        if math.isfinite(value) and not value <= found[at]:
            found[at] = value
    return found


def layers(
    quantities: Sequence[tuple[str, str, Mapping[str, Sequence[tuple[int, float]]]]],
    names: Sequence[str],
    lines: Sequence[str],
    *,
    scale: Mapping[str, str],
) -> dict[str, Any]:
    """A heat map of layers over steps, with lines of some of them, for one of several quantities at a time.

    Args:
        quantities: title, help and points by layer.
        names: the layers shown, from the top.
        lines: those of them that have a line.
        scale: by title, how colours go: "growth" (by the first value of the layer), "ratio" (by 1) or "size".
    """
    shown = []
    for title, note, by_layer in quantities:
        there = [name for name in names if by_layer.get(name)]
        if not there:
            continue
        begins = columns([step for name in there for step, _ in by_layer[name]])
        rows = [row(by_layer[name], begins) for name in there]
        shown.append({"title": title, "note": note, "scale": scale[title], "x": begins, "layers": there, "rows": rows})
    return {"kind": "layers", "quantities": shown, "lines": list(lines)[:MOST_LINES]}


def thinned(items: Sequence[Any], most: int) -> list[Any]:
    """All, or so many, evenly."""
    return list(items) if len(items) <= most else [items[at * len(items) // most] for at in range(most)]
