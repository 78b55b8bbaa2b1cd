"""How a running job looks on a terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from redline import metrics
from redline.integrations.console import layer_table, step_size_gauge
from redline.integrations.watch.trail import Trail
from redline.metrics import Metric
from redline.readings import Snapshot
from redline.report_view import number, step_size_style

_BLOCKS = "▁▂▃▄▅▆▇█"
_WIDTH = 40
_STALE_AFTER = 30.0  # seconds without a new step
_STALE_STEPS = 10  # and so many of the run's own steps


def watch_view(trail: Trail, source: str, now: float, *, trouble: str = "", layers: int = 8) -> RenderableType:
    """The view of a job as it stands.

    Args:
        trail: what is known of it.
        source: where that comes from.
        now: Unix time.
        trouble: why nothing new comes, if it does not.
        layers: how many layers to show.
    """
    snapshot = trail.snapshot
    parts: list[RenderableType] = []
    if trouble:
        parts.append(Text(trouble, style="yellow"))
    if snapshot is None:
        parts.append(Text("Nothing was measured yet.", style="dim"))
    else:
        if mark := stale_mark(trail, now):
            parts.append(Text(mark, style="bold yellow"))
        parts.append(_figures(snapshot, trail))
        if layers and (
            snapshot.layers(metrics.WEIGHT_SPECTRAL_NORM.name) or snapshot.layers(metrics.UPDATE_SPECTRAL_NORM.name)
        ):
            parts += [Text(), layer_table(snapshot, layers)]
    name = "" if snapshot is None else f" · {snapshot.run.run}"
    return Panel(
        Group(*parts),
        title=Text(f"redline watch{name}"),
        title_align="left",
        subtitle=Text(source, style="dim"),
        subtitle_align="right",
        border_style="red",
        padding=(1, 2),
    )


def stale_mark(trail: Trail, now: float) -> str:
    """Words if no step came for longer than the run's own pace explains, else nothing."""
    waited, pace = trail.seconds_since_step(now), trail.steps_per_second
    allowed = max(_STALE_AFTER, _STALE_STEPS / pace if pace else 0.0)
    return "" if waited is None or waited <= allowed else f"Stale: no step for {_duration(waited)}."


def sparkline(values: Sequence[float], width: int, style: Callable[[float], str], *, top: float | None = None) -> Text:
    """Values as blocks, oldest first, the highest of those that share a column; what is not finite is a red cross.

    Args:
        values: in order.
        width: columns at most.
        style: of a value.
        top: the value of a full block, if the highest one shown is less; the bottom is then 0, and else the lowest.
    """
    columns = [values[len(values) * k // width : len(values) * (k + 1) // width] for k in range(width)]
    heights = [_worst(column) for column in columns if column]
    known = [height for height in heights if math.isfinite(height)]
    low = 0.0 if top is not None else min(known, default=0.0)
    high = max([*known, top if top is not None else low])
    line = Text()
    for height in heights:
        if math.isfinite(height):
            place = (height - low) / (high - low) if high > low else 0.0
            line.append(_BLOCKS[min(int(place * len(_BLOCKS)), len(_BLOCKS) - 1)], style(height))
        else:
            line.append("×", "bold red")
    return line


def _worst(column: Sequence[float]) -> float:
    return next((value for value in column if not math.isfinite(value)), max(column))


def _figures(snapshot: Snapshot, trail: Trail) -> Table:
    def scalar(metric: Metric) -> float | None:
        return snapshot.series(metric.name).get(())

    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_column()
    pace = trail.steps_per_second
    table.add_row("step", Text(f"{snapshot.step}", style="bold"), "" if pace is None else f"{pace:.3g} steps/s")
    loss = scalar(metrics.LOSS)
    table.add_row("loss", number(loss), sparkline(trail.losses, _WIDTH, lambda _: "cyan"))
    r = scalar(metrics.NORMALIZED_STEP_SIZE)
    r_text = Text("–") if r is None else Text(number(r), style=step_size_style(r))
    table.add_row("r", r_text, step_size_gauge(r, _WIDTH - 1))
    table.add_row("lately", "", sparkline(trail.step_sizes, _WIDTH, step_size_style, top=1.0))
    scale, did = scalar(metrics.STEP_SCALE), snapshot.series(metrics.INTERVENTIONS.name)
    acted = ", ".join(f"{controller} {action} ×{n:.0f}" for (controller, action), n in did.items() if n)
    table.add_row("scale", number(scale), Text(acted or "no interventions", style="yellow" if acted else "dim"))
    broken = {labels[0]: n for labels, n in snapshot.series(metrics.NONFINITE.name).items() if n}
    words = ", ".join(f"{source} ×{n:.0f}" for source, n in broken.items())
    table.add_row("not finite", f"{sum(broken.values()):.0f}", Text(words, style="bold red"))
    overhead = scalar(metrics.OVERHEAD_RATIO)
    table.add_row("overhead", "–" if overhead is None else f"{overhead:.1%}", Text("of training time", style="dim"))
    return table


def _duration(seconds: float) -> str:
    for size, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {name}"
    return f"{seconds:.0f} s"
