"""The page of one run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from redline import metrics
from redline.integrations.html.charts import Line, by_label, chart, curve, layers
from redline.integrations.html.document import document, figure, section, table, text
from redline.integrations.record.reader import Record
from redline.interventions import Intervention
from redline.report import StabilityReport, hardness
from redline.report_view import number
from redline.trail import FragileSample

_MOST_ROWS = 12
_SCALES = {"σ₁(W)": "growth", "ΔW/W": "size", "σ₁(ΔW)": "size", "stable rank": "growth", "step over radius": "size"}


def report_page(record: Record) -> str:
    """One self-contained HTML page: what to do next, r and the radius, the loss, spectra, layers and samples."""
    report = record.report()
    title = f"{record.run.run} · redline"
    body = [
        _head(record, report),
        section("What to do next", *findings(report)),
        tiles(_tiles(report)),
        _course(record),
        _layers(record, report),
        *_controllers(record, report),
        *_samples(record.samples),
        *_notes(record, report),
        _foot(record),
    ]
    return document(title, body, _data(record, report))


def findings(report: StabilityReport) -> Iterator[str]:
    """The verdicts, worst first, as HTML."""
    for verdict in report.verdicts:
        parts = (("seen", verdict.seen), ("why", verdict.why), ("try", verdict.advice))
        lines = "".join(f'<p class="{kind}">{text(words)}</p>' for kind, words in parts if words)
        yield f'<div class="finding {text(verdict.level)}">{lines}</div>'


def tiles(figures: Sequence[tuple[str, str, bool]]) -> str:
    """Key figures: the figure, what it is, and whether it is over the redline."""
    shown = (
        f'<div class="tile{" over" if over else ""}"><b>{text(value)}</b><span>{text(name)}</span></div>'
        for value, name, over in figures
    )
    return f'<div class="tiles">{"".join(shown)}</div>'


def facts(record: Record, report: StabilityReport) -> list[str]:
    """What ran, in a few words each."""
    run = report.run
    found = [f"{report.steps:,} steps in {duration(report.seconds)}", f"{run.precision}, {run.strategy}"]
    if run.world_size > 1:
        found.append(f"{run.world_size} processes")
    if report.overhead_ratio is not None:
        found.append(f"{report.overhead_ratio:.1%} of the time in Redline")
    found.append(f"last line of {time.strftime('%Y-%m-%d %H:%M', time.localtime(record.snapshot.time))}")
    return found


def duration(seconds: float) -> str:
    """Such as 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _head(record: Record, report: StabilityReport) -> str:
    shown = "".join(f"<li>{text(fact)}</li>" for fact in facts(record, report))
    name = f"<small>redline · stability report</small>{text(report.run.run)}"
    return f"<header><h1>{name}</h1><ul class=facts>{shown}</ul></header>"


def _tiles(report: StabilityReport) -> list[tuple[str, str, bool]]:
    shown: list[tuple[str, str, bool]] = []
    if (sizes := report.step_sizes) is not None:
        shown = [
            (number(sizes.median), "median r", sizes.median >= 1),
            (number(sizes.highest), f"highest r, at step {sizes.highest_step:,}", sizes.highest >= 1),
            (f"{sizes.over:,} of {sizes.measured:,}", "measured steps over the redline", sizes.over > 0),
        ]
    if report.last_loss is not None:
        shown.append((f"{number(report.first_loss)} → {number(report.last_loss)}", "loss, first and last", False))
    shown.append((f"{sum(one.count for one in report.interventions):,}", "interventions", False))
    nonfinite = sum(report.nonfinite.values())
    shown.append((f"{nonfinite:,}", "values not finite", nonfinite > 0))
    return shown


def _course(record: Record) -> str:
    binding = by_label(record, metrics.BINDING_STEP_SIZE)
    charts = [
        figure("r", "Step size r", "The step over the radius within which the loss can follow it; 1 is the redline."),
        figure("loss", "Training loss", "Marked: what the controllers did. Point at a mark to read it."),
        figure(
            "radius", "Radius ρ and step length τ", "Both as lengths; where τ is above ρ, r is above 1.", wide=False
        ),
        figure("gradient", "Gradient norm", wide=False),
        figure("rate", "Learning rate", wide=False),
        figure("scale", "Scale put on the step", "By the controllers; 1 is untouched.", wide=False),
    ]
    if len(binding) > 1:
        charts.append(figure("binding", "Which radius binds", "The highest is the one that binds."))
    return section(
        "The run, step by step",
        f'<div class="charts">{"".join(charts)}</div>',
        note=("Drag across a chart to look closer, double-click to go back. Long runs are thinned; spikes stay."),
    )


def _layers(record: Record, report: StabilityReport) -> str:
    rows = [
        [
            layer.name,
            number(layer.spectral_norm),
            "–" if layer.growth is None else f"×{layer.growth:.3g}",
            number(layer.condition),
            number(layer.stable_rank),
            number(layer.hardest_update),
            "–" if layer.hardest_step is None else f"{layer.hardest_step:,}",
        ]
        for layer in report.layers[:_MOST_ROWS]
    ]
    headings = ["layer, hardest pushed first", "σ₁(W)", "growth", "condition", "stable rank", "highest ΔW/W", "at step"]
    left_out = len(_shown_layers(report)[1])
    note = f"{left_out} layers that were pushed less hard are not in the map." if left_out else ""
    return section(
        "Layers",
        table(headings, rows) if rows else "",
        f'<div class="charts">{figure("layers", "Layer by layer, over the run", note)}</div>',
    )


def _shown_layers(report: StabilityReport) -> tuple[list[str], list[str]]:
    from redline.integrations.html.charts import MOST_LAYERS

    names = [layer.name for layer in report.layers]
    return names[:MOST_LAYERS], names[MOST_LAYERS:]


def _controllers(record: Record, report: StabilityReport) -> Iterator[str]:
    if not report.interventions:
        return
    rows = [
        [one.controller, one.action, one.last_reason, f"{one.count:,}", f"{one.first_step:,} – {one.last_step:,}"]
        for one in report.interventions
    ]
    yield section(
        "What the controllers did",
        table(["controller", "action", "in its words, the last time", "times", "at steps"], rows, words=3),
    )


def _samples(samples: Sequence[FragileSample]) -> Iterator[str]:
    if not samples:
        return
    several = any(one.rank for one in samples)
    rows = [
        [
            f"{one.step:,}",
            *([f"{one.rank:,}"] if several else []),
            "remembered from an earlier batch" if one.sample is None else f"{one.sample:,}",
            number(one.r),
            number(one.exact_r),
        ]
        for one in samples[:_MOST_ROWS]
    ]
    yield section(
        "Samples that came nearest to the redline",
        table(["step", *(["rank"] if several else []), "place in the batch", "r", "r, exact"], rows, words=2 + several),
        note="Look at the data behind them: a wrong label or an input far from the others is often first here.",
    )


def _notes(record: Record, report: StabilityReport) -> Iterator[str]:
    if notes := [*record.notes, *report.notes]:
        said = "".join(f"<li>{text(note)}</li>" for note in notes)
        yield section("What is missing, and why", f'<ul class="plain">{said}</ul>')


def _foot(record: Record) -> str:
    return (
        f"<footer>Drawn from {text(record.path.name)}, written by Redline {text(record.run.version)}. Charts by uPlot "
        "(MIT licence, in this file's source).</footer>"
    )


# What the charts are drawn from -------------------------------------------------------------------------------------


def _data(record: Record, report: StabilityReport) -> dict[str, Any]:
    rates = by_label(record, metrics.LEARNING_RATE)
    binding = by_label(record, metrics.BINDING_STEP_SIZE)
    several = len(rates) > 1
    return {
        "r": chart(
            [
                Line("r, as proposed", curve(record, metrics.NORMALIZED_STEP_SIZE), 0),
                Line("r, exact", curve(record, metrics.EXACT_STEP_SIZE), 2),
                Line("r, as committed", curve(record, metrics.COMMITTED_STEP_SIZE), 1, dashed=True),
            ],
            unit="r",
            log=True,
            redline=True,
        ),
        "loss": chart([Line("loss", curve(record, metrics.LOSS), 0)], unit="loss", marks=marks(record.interventions)),
        "radius": chart(
            [
                Line("radius ρ", curve(record, metrics.GHOST_RADIUS), 0),
                Line("radius ρ, exact", curve(record, metrics.EXACT_GHOST_RADIUS), 2),
                Line("step length τ", curve(record, metrics.UPDATE_NORM), 1),
            ],
            unit="length",
            log=True,
        ),
        "gradient": chart([Line("gradient norm", curve(record, metrics.GRADIENT_NORM), 0)], unit="norm", log=True),
        "rate": chart(
            [
                Line(" · ".join(labels) if several else "learning rate", points, place)
                for place, (labels, points) in enumerate(rates.items())
            ],
            unit="rate",
        ),
        "scale": chart([Line("scale", curve(record, metrics.STEP_SCALE), 1)], unit="factor"),
        "binding": chart(
            [Line(labels[0], points, place) for place, (labels, points) in enumerate(binding.items())],
            unit="step over radius",
            log=True,
            redline=True,
        ),
        "layers": _layer_data(record, report),
    }


def _layer_data(record: Record, report: StabilityReport) -> dict[str, Any]:
    names, _ = _shown_layers(report)
    course = [name for name in record.history.layers(metrics.WEIGHT_SPECTRAL_NORM.name) if name in set(names)]
    radii = {**_by_layer(record, metrics.ATTENTION_STEP_SIZE), **_by_layer(record, metrics.ACTIVATION_STEP_SIZE)}
    quantities = [
        ("σ₁(W)", "Top singular value of each weight matrix: how strong the layer is.", metrics.WEIGHT_SPECTRAL_NORM),
        ("ΔW/W", "σ₁(ΔW) over σ₁(W): how hard a step pushes the layer.", metrics.UPDATE_TO_WEIGHT_RATIO),
        ("σ₁(ΔW)", "Top singular value of the update as it was applied.", metrics.UPDATE_SPECTRAL_NORM),
        ("stable rank", "How many directions the layer uses; near 1 it has collapsed.", metrics.WEIGHT_STABLE_RANK),
    ]
    shown = [(title, note, _by_layer(record, metric)) for title, note, metric in quantities]
    shown.append(("step over radius", "Of each attention and each activation; 1 is the redline.", radii))
    hardest = sorted(report.layers, key=lambda layer: hardness(layer.hardest_update), reverse=True)
    ends = [layer.name for layer in hardest]
    return layers(shown, [*course, *radii], [*ends[:8], *list(radii)[:8]], scale=_SCALES)


def _by_layer(record: Record, metric: metrics.Metric) -> dict[str, list[tuple[int, float]]]:
    return {labels[0]: points for labels, points in by_label(record, metric).items()}


def marks(interventions: Sequence[Intervention]) -> list[dict[str, Any]]:
    """What to mark on the loss."""
    return [
        {"step": one.step, "action": one.action, "text": f"{one.controller}, {one.action}: {one.reason}"}
        for one in interventions
    ]
