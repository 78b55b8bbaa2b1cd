"""Console reports: a compact table every n steps, and the stability report at the end."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import rich
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from redline import metrics
from redline.integrations.ranks import is_rank_zero
from redline.metrics import Metric
from redline.readings import Snapshot
from redline.report import StabilityReport, hardness
from redline.report_view import layer_label, number, step_size_style
from redline.schedules import Schedule
from redline.sink import Sink

_GAUGE_WIDTH = 12


class ConsoleReport(Sink):
    """Prints the readings on rank 0, beside whatever progress bar is live.

    The table shows the layers whose update is hardest on them; the report at the end sums up the run.
    """

    def __init__(self, every: int | Schedule = 200, *, layers: int = 5, report: bool = True) -> None:
        """Print on a schedule.

        Args:
            every: schedule of the table.
            layers: how many layers it shows.
            report: whether to print the stability report at the end.
        """
        super().__init__(every)
        self.layers, self.report = layers, report

    def emit(self, snapshot: Snapshot) -> None:
        """Print the table."""
        self._print(snapshot_view(snapshot, self.layers))

    def close(self, report: StabilityReport) -> None:
        """Print the stability report."""
        if self.report:
            self._print(report)

    def _print(self, renderable: Any) -> None:
        if is_rank_zero():
            with _beside_tqdm():
                _console().print(renderable)


def snapshot_view(snapshot: Snapshot, layers: int) -> RenderableType:
    """One snapshot as a headline, what controllers did so far, and a table of the layers pushed hardest."""
    parts: list[RenderableType] = [_headline(snapshot)]
    if did := {kind: n for kind, n in snapshot.series(metrics.INTERVENTIONS.name).items() if n}:
        words = " · ".join(f"{controller} {action} ×{n:.0f}" for (controller, action), n in did.items())
        parts.append(Text(f"  controllers so far: {words}", style="yellow"))
    if layers and (
        snapshot.layers(metrics.WEIGHT_SPECTRAL_NORM.name) or snapshot.layers(metrics.UPDATE_SPECTRAL_NORM.name)
    ):
        parts.append(layer_table(snapshot, layers))
    return Group(*parts)


def _headline(snapshot: Snapshot) -> Text:
    def scalar(metric: Metric) -> float | None:
        return snapshot.series(metric.name).get(())

    line = Text.assemble(("redline", "bold red"), (f" step {snapshot.step} ", "bold"))
    line.append(f" loss {number(scalar(metrics.LOSS))}  ‖g‖ {number(scalar(metrics.GRADIENT_NORM))}  r ")
    r = scalar(metrics.NORMALIZED_STEP_SIZE)
    if r is None:
        line.append("– ")
    else:
        line.append(f"{r:.3g} ", step_size_style(r))
        line.append(step_size_gauge(r, _GAUGE_WIDTH))
    line.append(f"  ρ {number(scalar(metrics.GHOST_RADIUS))}  τ {number(scalar(metrics.UPDATE_NORM))}")
    overhead = scalar(metrics.OVERHEAD_RATIO)
    if overhead is not None:
        line.append(f"  overhead {overhead:.1%}", "dim")
    return line


def step_size_gauge(r: float | None, width: int) -> Text:
    """r as a bar of ``width`` columns up to the redline, which is drawn; empty where r is not known."""
    filled = round(min(r, 1.0) * width) if r is not None and r == r else 0
    return Text.assemble(("━" * filled, step_size_style(r or 0.0)), ("─" * (width - filled), "dim"), ("┃", "bold red"))


def layer_table(snapshot: Snapshot, most: int) -> Table:
    """The layers pushed hardest, ``most`` of them, with their spectra."""
    ratios = snapshot.layers(metrics.UPDATE_TO_WEIGHT_RATIO.name)
    norms = snapshot.layers(metrics.WEIGHT_SPECTRAL_NORM.name)
    columns = {
        "σ₁(W)": norms,
        "σ₁(ΔW)": snapshot.layers(metrics.UPDATE_SPECTRAL_NORM.name),
        "ΔW/W": ratios,
        "cond.": snapshot.layers(metrics.WEIGHT_SPECTRAL_CONDITION.name),
        "stable rank": snapshot.layers(metrics.WEIGHT_STABLE_RANK.name),
    }
    table = Table(box=None, padding=(0, 1), pad_edge=False)
    table.add_column("  layer", style="cyan", no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="right")
    ordered = sorted(norms or columns["σ₁(ΔW)"], key=lambda name: hardness(ratios.get(name)), reverse=True)
    for name in ordered[:most]:
        table.add_row(Text(f"  {layer_label(name)}"), *(number(column.get(name)) for column in columns.values()))
    if len(ordered) > most:
        table.add_row(f"  … {len(ordered) - most} more", style="dim")
    return table


def _console() -> Console:
    # rich's own console is the one that a live rich progress bar knows how to print beside.
    return rich.get_console()


def _beside_tqdm() -> AbstractContextManager[Any]:
    """Let a live tqdm bar, if the run has one, step aside while something is printed."""
    tqdm = sys.modules.get("tqdm")
    return nullcontext() if tqdm is None else tqdm.tqdm.external_write_mode()
