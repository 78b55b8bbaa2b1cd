"""How a stability report looks on a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from redline.findings import Finding
from redline.interventions import Tally
from redline.report import BindingRadius, LayerSummary, StabilityReport, StepSizes

_STYLES = {"good": "green", "watch": "yellow", "bad": "red"}
_MARKS = {"good": "✓", "watch": "!", "bad": "✗"}
_MOST_LAYERS = 8
_BAR = 24


def report_view(report: StabilityReport) -> RenderableType:
    """The whole report as one rich renderable."""
    parts: list[RenderableType] = [_finding(finding) for finding in report.verdicts]
    parts += [Text(), _facts(report)]
    if report.step_sizes:
        parts += [Text(), _distribution(report.step_sizes)]
    if report.binding:
        parts += [Text(), _binding(report.binding)]
    if report.layers:
        parts += [Text(), _worst_layers(report.layers)]
    if report.interventions:
        parts += [Text(), _interventions(report.interventions)]
    if report.notes:
        parts += [Text(), Text("Not measured, and why", style="bold"), *(Text(f"  · {note}") for note in report.notes)]
    return Panel(
        Group(*parts), title="redline · stability report", title_align="left", border_style="red", padding=(1, 2)
    )


def _finding(finding: Finding) -> Table:
    """What was seen, boldly; why it matters, dimly; what to try."""
    style = _STYLES[finding.level]
    table = Table.grid(padding=(0, 1))
    table.add_row(Text(_MARKS[finding.level], style=style), Text(finding.seen, style=f"bold {style}"))
    if finding.why:
        table.add_row("", Text(finding.why, style="dim"))
    if finding.advice:
        table.add_row("", Text(f"→ {finding.advice}"))
    return table


def number(value: float | None) -> str:
    """A figure of three digits, or a dash for what was not measured."""
    return "–" if value is None else f"{value:.3g}"


def layer_label(name: str, width: int = 28) -> str:
    """The end of a long qualified name: what tells layers apart stands there."""
    return name if len(name) <= width else f"…{name[1 - width :]}"


def step_size_style(value: float) -> str:
    """Green below half the redline, yellow below it, red from it on."""
    return "green" if value < 0.5 else "yellow" if value < 1 else "bold red"


def _facts(report: StabilityReport) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    table.add_row("run", Text(report.run.run))
    rate = f"  ({report.steps / report.seconds:.3g} steps/s)" if report.seconds else ""
    table.add_row("steps", f"{report.steps} in {report.seconds:.1f} s{rate}")
    if report.last_loss is not None:
        table.add_row("loss", f"{number(report.first_loss)} → {number(report.last_loss)}")
    table.add_row("not finite", ", ".join(f"{source} {count}" for source, count in report.nonfinite.items()))
    for kept in report.snapshots:
        carried = "checkpoints carry it" if kept.in_checkpoints else "checkpoints leave it out"
        table.add_row(
            "kept",
            f"{kept.controller}: a copy of the run at step {kept.step}, {kept.bytes / 2**20:.3g} MiB in "
            f"{kept.memory} memory; {carried}",
        )
    if report.overhead_ratio is not None:
        table.add_row("overhead", f"{report.overhead_ratio:.1%} of training time was spent in Redline{_shares(report)}")
    if put_off := {name: times for name, times in report.put_off.items() if times}:
        table.add_row("put off", ", ".join(f"{name} ×{times}" for name, times in put_off.items()))
    return table


def _shares(report: StabilityReport) -> str:
    if report.monitoring_ratio is None:
        return ""
    budget = "" if report.overhead_budget is None else f", of {100 * report.overhead_budget:.3g}% allowed"
    return f"; {report.monitoring_ratio:.1%} on monitoring{budget}"


def _distribution(sizes: StepSizes) -> RenderableType:
    over = f"over {sizes.samples} samples (batches of {sizes.batch})" if sizes.samples else ""
    method = " and ".join(name.replace("_", " ") for name in sizes.method)
    heading = Text.assemble(
        ("Step size r", "bold"),
        f"  median {number(sizes.median)} · p95 {number(sizes.p95)} · highest {number(sizes.highest)} at step "
        f"{sizes.highest_step}",
        (f"\n{sizes.measured} measurements, each {over}, by {method}; 1 is the redline", "dim"),
    )
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right", style="dim")
    table.add_column()
    table.add_column(justify="right")
    tallest = max(count for _, _, count in sizes.histogram) or 1
    for low, high, count in sizes.histogram:
        name = f"{low:g} – {high:g}" if high != float("inf") else f"{low:g} and more"
        bar = "█" * max(round(count / tallest * _BAR), 1 if count else 0)
        table.add_row(name, Text(bar, style=step_size_style(low if low else 0.0)), str(count) if count else "")
    return Group(heading, table)


def _binding(radii: tuple[BindingRadius, ...]) -> Table:
    table = Table(
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        title="Which radius binds, by quarter of the run",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("radius", style="cyan", no_wrap=True)
    for heading in ("first", "second", "third", "last", "longest", "at step"):
        table.add_column(heading, justify="right")
    table.add_column("layer, at last")
    for one in radii:
        table.add_row(
            one.radius,
            *("–" if share is None else f"{share:.0%}" for share in one.shares),
            number(one.highest),
            str(one.highest_step),
            Text("–" if one.layer is None else layer_label(one.layer)),
        )
    return table


def _interventions(tallies: tuple[Tally, ...]) -> Table:
    table = Table(
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        title="What the controllers did",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("controller", style="cyan", no_wrap=True)
    table.add_column("action", no_wrap=True)
    table.add_column("times", justify="right")
    table.add_column("at steps", justify="right", no_wrap=True)
    table.add_column("in its words, the last time")
    for one in tallies:
        steps = str(one.first_step) if one.count == 1 else f"{one.first_step} – {one.last_step}"
        table.add_row(Text(one.controller), one.action, str(one.count), steps, Text(one.last_reason))
    return table


def _worst_layers(layers: tuple[LayerSummary, ...]) -> Table:
    shown = layers[:_MOST_LAYERS]
    more = f", {len(layers) - len(shown)} more not shown" if len(layers) > len(shown) else ""
    table = Table(
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        title=f"Layers, the hardest pushed first{more}",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("layer", style="cyan", no_wrap=True)
    for heading in ("σ₁(W)", "growth", "cond.", "stable rank", "max ΔW/W", "at step"):
        table.add_column(heading, justify="right")
    held = {"ceiling": [layer.ceiling for layer in shown], "decay": [layer.weight_decay for layer in shown]}
    held = {heading: values for heading, values in held.items() if any(value is not None for value in values)}
    for heading in held:
        table.add_column(heading, justify="right")
    for place, layer in enumerate(shown):
        table.add_row(
            Text(layer_label(layer.name)),
            number(layer.spectral_norm),
            "–" if layer.growth is None else f"×{layer.growth:.3g}",
            number(layer.condition),
            number(layer.stable_rank),
            number(layer.hardest_update),
            "–" if layer.hardest_step is None else str(layer.hardest_step),
            *(number(values[place]) for values in held.values()),
        )
    return table
