"""Two runs side by side: their key figures, and their layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from redline.integrations.record.matching import Matching, match_layers
from redline.integrations.record.reader import Record
from redline.report import LayerSummary, StabilityReport
from redline.report_view import layer_label, number

_MOST_LAYERS, _MOST_NAMED = 12, 5


@dataclass(frozen=True)
class KeyFigure:
    """One figure of both runs; None for what was not measured."""

    name: str
    first: float | None
    second: float | None

    @property
    def ratio(self) -> float | None:
        """The second over the first, or None where that says nothing."""
        return self.second / self.first if self.first and self.second is not None else None


@dataclass(frozen=True)
class LayerPair:
    """One layer in both runs."""

    first: LayerSummary
    second: LayerSummary

    @property
    def ratio(self) -> float:
        """The second run's last σ₁(W) over the first's; NaN where that is 0."""
        return self.second.spectral_norm / self.first.spectral_norm if self.first.spectral_norm else math.nan

    @property
    def name(self) -> str:
        """The layer's name, or both where they differ."""
        return self.first.name if self.first.name == self.second.name else f"{self.first.name} / {self.second.name}"


@dataclass(frozen=True)
class Comparison:
    """Two records side by side; ``rich.print`` shows it.

    Attributes:
        first, second: the records.
        figures: their key figures.
        layers: those that have a counterpart, farthest from one another first.
        matching: which layer is which, and which have none.
    """

    first: Record
    second: Record
    figures: tuple[KeyFigure, ...]
    layers: tuple[LayerPair, ...]
    matching: Matching

    @classmethod
    def of(cls, first: Record, second: Record) -> Comparison:
        """Compare two records."""
        reports = first.report(), second.report()
        by_name = [{layer.name: layer for layer in report.layers} for report in reports]
        order = [list(record.history.layers("redline_weight_spectral_norm")) for record in (first, second)]
        matching = match_layers(*order)
        layers = [LayerPair(by_name[0][one], by_name[1][other]) for one, other in matching.pairs]
        layers.sort(key=lambda pair: _distance(pair.ratio), reverse=True)
        figures = (KeyFigure(name, take(reports[0]), take(reports[1])) for name, take in FIGURES)
        return cls(first, second, tuple(figures), tuple(layers), matching)

    def unmatched(self) -> list[str]:
        """In words, the layers that have no counterpart."""
        said = []
        for names, which in ((self.matching.only_first, "A"), (self.matching.only_second, "B")):
            if names:
                more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
                said.append(f"Only in {which}: {', '.join(names[:_MOST_NAMED])}{more}.")
        return said

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = [_runs(self), Text(), _figures(self.figures)]
        if self.layers:
            parts += [Text(), _layers(self.layers)]
        if unmatched := self.unmatched():
            parts += [Text(), *(Text(line, style="yellow") for line in unmatched)]
        return Panel(Group(*parts), title="redline · two runs", title_align="left", border_style="red", padding=(1, 2))


def _distance(ratio: float) -> float:
    return abs(math.log(ratio)) if 0 < ratio < math.inf else math.inf


def _of_sizes(take: Callable[[StabilityReport], float]) -> Callable[[StabilityReport], float | None]:
    return lambda report: take(report) if report.step_sizes else None


def _most(report: StabilityReport, take: Callable[[LayerSummary], float | None]) -> float | None:
    found = [value for layer in report.layers if (value := take(layer)) is not None and not math.isnan(value)]
    return max(found, default=None)


FIGURES: tuple[tuple[str, Callable[[StabilityReport], float | None]], ...] = (
    ("steps", lambda report: float(report.steps)),
    ("seconds", lambda report: report.seconds),
    ("first loss", lambda report: report.first_loss),
    ("last loss", lambda report: report.last_loss),
    ("median r", _of_sizes(lambda report: report.step_sizes.median if report.step_sizes else math.nan)),
    ("95th percentile of r", _of_sizes(lambda report: report.step_sizes.p95 if report.step_sizes else math.nan)),
    ("highest r", _of_sizes(lambda report: report.step_sizes.highest if report.step_sizes else math.nan)),
    ("steps measured over the redline", _of_sizes(lambda report: report.step_sizes.over if report.step_sizes else 0)),
    ("interventions", lambda report: float(sum(one.count for one in report.interventions))),
    ("values not finite", lambda report: float(sum(report.nonfinite.values()))),
    ("highest growth of a layer's σ₁(W)", lambda report: _most(report, lambda layer: layer.growth)),
    ("highest ΔW/W of a layer", lambda report: _most(report, lambda layer: layer.hardest_update)),
    ("share of time in Redline", lambda report: report.overhead_ratio),
)


def _runs(comparison: Comparison) -> Table:
    table = Table.grid(padding=(0, 2))
    for which, record in (("A", comparison.first), ("B", comparison.second)):
        table.add_row(Text(which, style="bold"), Text(record.run.run), Text(str(record.path), style="dim"))
    return table


def _table(title: str, first: str, *headings: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, title=title, title_justify="left", title_style="bold")
    table.add_column(first, style="cyan", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    return table


def _figures(figures: tuple[KeyFigure, ...]) -> Table:
    table = _table("Key figures", "", "A", "B", "B / A")
    for one in figures:
        if one.first is not None or one.second is not None:
            table.add_row(one.name, number(one.first), number(one.second), times(one.ratio))
    return table


def _layers(layers: tuple[LayerPair, ...]) -> Table:
    shown = layers[:_MOST_LAYERS]
    more = f", {len(layers) - len(shown)} more not shown" if len(layers) > len(shown) else ""
    table = _table(
        f"Layers, farthest apart first{more}", "layer", "σ₁(W) A", "σ₁(W) B", "B / A", "max ΔW/W A", "max ΔW/W B"
    )
    for pair in shown:
        table.add_row(
            Text(layer_label(pair.name, 44)),
            number(pair.first.spectral_norm),
            number(pair.second.spectral_norm),
            times(pair.ratio),
            number(pair.first.hardest_update),
            number(pair.second.hardest_update),
        )
    return table


def times(ratio: float | None) -> str:
    """A ratio, or a dash where there is none."""
    return "–" if ratio is None or math.isnan(ratio) else f"×{ratio:.3g}"
