"""The page of two runs side by side."""

from __future__ import annotations

import math
from typing import Any

from redline import metrics
from redline.integrations.html.charts import MOST_LAYERS, Line, chart, curve, layers
from redline.integrations.html.document import document, figure, section, table, text
from redline.integrations.html.report import facts, findings, marks
from redline.integrations.record.comparison import Comparison, times
from redline.integrations.record.reader import Record
from redline.metrics import Metric
from redline.readings import Series
from redline.report_view import number

_OVERLAID: tuple[tuple[str, str, str, Metric, dict[str, Any]], ...] = (
    (
        "r",
        "Step size r, as proposed",
        "1 is the redline.",
        metrics.NORMALIZED_STEP_SIZE,
        {"log": True, "redline": True},
    ),
    ("loss", "Training loss", "Marked: what the controllers did in either run.", metrics.LOSS, {}),
    ("radius", "Radius ρ", "As a length.", metrics.GHOST_RADIUS, {"log": True}),
    ("step", "Step length τ", "As a length.", metrics.UPDATE_NORM, {"log": True}),
    ("gradient", "Gradient norm", "", metrics.GRADIENT_NORM, {"log": True}),
    ("scale", "Scale put on the step", "By the controllers; 1 is untouched.", metrics.STEP_SCALE, {}),
)
_MOST_ROWS = 40
_RATIO = "B over A"


def compare_page(comparison: Comparison) -> str:
    """One self-contained HTML page: key figures, both runs' curves in one chart each, and their layers."""
    first, second = comparison.first, comparison.second
    figures = [
        [one.name, number(one.first), number(one.second), times(one.ratio)]
        for one in comparison.figures
        if one.first is not None or one.second is not None
    ]
    charts = (figure(name, title, note, wide=name in ("r", "loss")) for name, title, note, _, _ in _OVERLAID)
    body = [
        f"<header><h1><small>redline · two runs</small>{text(first.run.run)} and {text(second.run.run)}</h1></header>",
        *(_run(which, record) for which, record in (("A", first), ("B", second))),
        section("Key figures", table(["", "A", "B", "B / A"], figures)),
        section("Step by step", f'<div class="charts">{"".join(charts)}</div>'),
        _layers(comparison),
        "<footer>Charts by uPlot (MIT licence, in this file's source).</footer>",
    ]
    return document(f"{first.run.run} and {second.run.run} · redline", body, _data(comparison))


def _run(which: str, record: Record) -> str:
    report = record.report()
    said = "".join(f"<li>{text(fact)}</li>" for fact in [record.path.name, *facts(record, report)])
    notes = "".join(f"<li>{text(note)}</li>" for note in record.notes)
    listed = f'<ul class="plain">{notes}</ul>' if notes else ""
    return section(f"{which}: {record.run.run}", f"<ul class=facts>{said}</ul>", *findings(report), listed)


def _layers(comparison: Comparison) -> str:
    rows = [
        [
            pair.name,
            number(pair.first.spectral_norm),
            number(pair.second.spectral_norm),
            times(pair.ratio),
            number(pair.first.hardest_update),
            number(pair.second.hardest_update),
        ]
        for pair in comparison.layers[:_MOST_ROWS]
    ]
    headings = ["layer, farthest apart first", "σ₁(W) A", "σ₁(W) B", "B / A", "max ΔW/W A", "max ΔW/W B"]
    unmatched = "".join(f"<li>{text(line)}</li>" for line in comparison.unmatched())
    return section(
        "Layers",
        table(headings, rows) if rows else "",
        f'<ul class="plain">{unmatched}</ul>' if unmatched else "",
        f'<div class="charts">{figure("layers", "Layer by layer: B over A, over the run")}</div>',
        note="Layers are matched by name, and those without a namesake by order among those of their kind.",
    )


def _data(comparison: Comparison) -> dict[str, Any]:
    runs = (("A", comparison.first), ("B", comparison.second))
    both = [
        {**mark, "text": f"{which}: {mark['text']}"} for which, record in runs for mark in marks(record.interventions)
    ]
    data = {
        name: chart(
            [Line(f"{which}: {record.run.run}", curve(record, metric), at) for at, (which, record) in enumerate(runs)],
            marks=sorted(both, key=lambda mark: mark["step"]) if name == "loss" else (),
            **how,
        )
        for name, _, _, metric, how in _OVERLAID
    }
    return {**data, "layers": _layer_data(comparison)}


def _layer_data(comparison: Comparison) -> dict[str, Any]:
    shown = [pair.name for pair in comparison.layers[:MOST_LAYERS]]
    quantities = []
    for title, metric in (("σ₁(W)", metrics.WEIGHT_SPECTRAL_NORM), ("ΔW/W", metrics.UPDATE_TO_WEIGHT_RATIO)):
        by_layer = {
            pair.name: _ratios(comparison, metric, pair.first.name, pair.second.name) for pair in comparison.layers
        }
        quantities.append((f"{title}, {_RATIO}", "Where the two runs are alike it is 1.", by_layer))
    return layers(quantities, shown, shown, scale={title: "ratio" for title, _, _ in quantities})


def _ratios(comparison: Comparison, metric: Metric, one: str, other: str) -> list[tuple[int, float]]:
    """B over A at the steps of A, B as it was last measured by then; as far as both runs go."""
    curves = comparison.first.curves, comparison.second.curves
    found = [kept.get(Series(metric.name, (name,))) for kept, name in zip(curves, (one, other), strict=True)]
    if found[0] is None or found[1] is None:
        return []
    first, second = found[0].points(), found[1].points()
    ratios, at = [], -1
    for step, value in first:
        while at + 1 < len(second) and second[at + 1][0] <= step:
            at += 1
        if at >= 0 and step <= second[-1][0] and value:
            ratios.append((step, second[at][1] / value))
    return [(step, ratio) for step, ratio in ratios if not math.isnan(ratio)]
