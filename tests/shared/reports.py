"""Stability reports of made-up runs, and what is printed of one."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console

from redline.history import RunHistory
from redline.interventions import Tally
from redline.readings import RunInfo, Series, Snapshot
from redline.report import KeptSnapshot, StabilityReport

Key = str | tuple[str, str]
R, LOSS = "redline_normalized_step_size", "redline_loss"


def series(key: Key) -> Series:
    return Series(key) if isinstance(key, str) else Series(key[0], (key[1],))


def shown(report: StabilityReport) -> str:
    """The report as printed, on lines as long as it takes."""
    console = Console(record=True, width=400, file=io.StringIO())
    console.print(report)
    return console.export_text()


def report_of(
    steps: int,
    *,
    r: Iterable[tuple[int, float]] = (),
    losses: Iterable[tuple[int, float]] = (),
    courses: Mapping[Key, Iterable[tuple[int, float]]] | None = None,
    values: Mapping[Key, float] | None = None,
    interventions: Sequence[Tally] = (),
    snapshots: Sequence[KeptSnapshot] = (),
    notes: tuple[str, ...] = (),
    seconds: float = 2.0,
    run: str = "run-1",
    budget: float | None = None,
) -> StabilityReport:
    """Of ``(step, value)`` as measured, in the order of the run, and of last values."""
    history = RunHistory()
    given = {R: r, LOSS: losses, **(courses or {})}
    for step, key, value in sorted(((s, key, v) for key, c in given.items() for s, v in c), key=lambda one: one[0]):
        history.record(series(key), step, value)
    last = {series(key): value for key, value in (values or {}).items()}
    last[Series("redline_steps_total")] = float(steps)
    snapshot = Snapshot(steps - 1, 0.0, RunInfo(run, "0.1", "float32", "single", 1), last, {})
    return StabilityReport.of(snapshot, history, interventions, snapshots, notes, seconds, budget)


def report_of_sizes(step_sizes: Sequence[float] = (), *, steps: int | None = None, **given: Any) -> StabilityReport:
    """Of a run that measured r at every step, and what else ``report_of`` takes."""
    return report_of(len(step_sizes) if steps is None else steps, r=enumerate(step_sizes), **given)


def tally(controller: str, action: str, count: int, *, by_design: bool = False) -> Tally:
    return Tally(controller, action, count, 3, 90, "it was too long", by_design)
