"""How width transfer looks on a terminal: what was decided for each parameter, and how the spectra compare."""

from __future__ import annotations

import re
from collections.abc import Sequence

import rich
from rich.table import Table
from rich.text import Text

from redline.scaling import ScaledParameter, SpectraComparison


def print_decisions(title: str, decided: Sequence[tuple[ScaledParameter, tuple[float, float] | None]]) -> None:
    """One row for all parameters that differ in nothing but numbers of their names.

    Args:
        title: over the table.
        decided: each parameter with its rate and decay, or None for one that is in no group.
    """
    rows: dict[tuple[str, tuple[int, ...], str, tuple[float, float] | None, str], int] = {}
    for one, rates in decided:
        pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", one.name)
        row = (pattern, one.shape, one.kind, rates, one.why)
        rows[row] = rows.get(row, 0) + 1
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("parameters", "", "shape", "taken for", "lr", "decay", "because"):
        table.add_column(heading, justify="right" if heading in ("", "lr", "decay") else "left", overflow="fold")
    for (pattern, shape, kind, rates, why), count in rows.items():
        figures = ["in no group", ""] if rates is None else [f"{rate:.3g}" for rate in rates]
        times = f"×{count}" if count > 1 else ""
        style = "cyan" if kind == "matrix-like" else ""
        table.add_row(Text(pattern), times, "×".join(map(str, shape)), kind, *figures, why, style=style)
    rich.get_console().print(table)


def comparison_view(comparison: SpectraComparison) -> Table:
    """The layers, the worst match first."""
    within = sum(abs(one.ratio - 1) <= comparison.tolerance for one in comparison.layers)
    table = Table(
        title=f"Top singular values: {within} of {len(comparison.layers)} match within {comparison.tolerance:.0%}, the "
        f"median ratio is {comparison.median_ratio:.3g}",
        title_justify="left",
        title_style="bold",
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for heading in ("layer", "reference", "run", "ratio"):
        table.add_column(heading, justify="left" if heading == "layer" else "right", overflow="fold")
    for one in comparison.layers:
        style = "green" if abs(one.ratio - 1) <= comparison.tolerance else "yellow"
        table.add_row(Text(one.layer), f"{one.reference:.3g}", f"{one.run:.3g}", f"×{one.ratio:.3g}", style=style)
    for name in comparison.unmatched:
        table.add_row(Text(name), "", "", "only in one", style="dim")
    return table
