"""How a diagnosis looks on a terminal, and the lines of code it ends in."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from redline.findings.thresholds import OVERHEAD
from redline.integrations.doctor.cost import Costs
from redline.integrations.doctor.coverage import Coverage
from redline.integrations.doctor.diagnosis import Diagnosis, Memory, says_a_gap
from redline.integrations.doctor.tangents import Tangents

_MOST_SHAPES = 5
_MOST_NAMED = 4


def diagnosis_view(diagnosis: Diagnosis) -> RenderableType:
    """The whole diagnosis as one rich renderable."""
    parts: list[RenderableType] = [
        _coverage(diagnosis.coverage),
        Text(),
        _tangents(diagnosis.tangents),
        Text(),
        _memory(diagnosis.memory),
    ]
    if diagnosis.costs is not None:
        parts += [Text(), _costs(diagnosis.costs)]
    parts.append(Text())
    if diagnosis.gaps:
        parts.append(Text("Cannot be measured, and why", style="bold red"))
        parts += [Text(f"  ✗ {gap}") for gap in diagnosis.gaps]
    else:
        parts.append(Text("✓ All of it can be measured.", style="bold green"))
    panel = Panel(
        Group(*parts),
        title=Text(f"redline doctor · {diagnosis.subject.name}"),
        title_align="left",
        border_style="red",
        padding=(1, 2),
    )
    return Group(panel, Text(), Text("Attach it so:", style="bold"), Text(), Text(snippet(diagnosis)))  # to be copied


def snippet(diagnosis: Diagnosis) -> str:
    """The call of ``redline.attach`` that fits this model."""
    lines = ["import redline", ""]
    options = ["sinks=[redline.ConsoleReport(every=200)]"]
    name = diagnosis.subject.logits_name
    if name is not None:
        module, _, path = name.partition(":")
        root, *rest = path.split(".")
        lines[1:1] = [f"from {module} import {root}"]
        options.insert(0, f"logits={'.'.join([root, *rest])}")
    costs = diagnosis.costs
    if costs is not None and costs.share > OVERHEAD:
        options.append(f"overhead_budget={OVERHEAD:g}")
    lines += ["with redline.attach(", *(f"    {one}," for one in ("model", "optimizer", *options)), ") as session:"]
    lines.append("    ...  # the training loop")
    return "\n".join(lines)


def _coverage(coverage: Coverage) -> RenderableType:
    shapes = [f"{d_out}×{d_in}" + (f" ({n} times)" if n > 1 else "") for (d_out, d_in), n in coverage.shapes.items()]
    more = f", {len(shapes) - _MOST_SHAPES} more" if len(shapes) > _MOST_SHAPES else ""
    count = len(coverage.matrices)
    table = _grid("What is measured")
    largest = "" if coverage.largest is None else f", the largest {coverage.largest.name}"
    table.add_row("matrices", Text(f"{count}{largest}"))
    if shapes:
        table.add_row("shapes", Text(f"{', '.join(shapes[:_MOST_SHAPES])}{more}"))
    names = [name for name, _ in coverage.others]
    named = ", ".join(names[:_MOST_NAMED]) + (", …" if len(names) > _MOST_NAMED else "")
    size = sum(elements for _, elements in coverage.others)
    words = f"{len(names)} parameters of {size:,} elements ({named}): in τ and r, without spectra" if names else "none"
    table.add_row("not matrices", Text(words))
    for remark in coverage.remarks:
        table.add_row("note", Text(remark))
    return table


def _tangents(tangents: Tangents) -> RenderableType:
    table = _grid("How r is measured")
    used = tangents.method
    for trial in tangents.trials:
        if trial.method == used:
            agreed = "" if trial.error is None else f"; {trial.error:.2%} from a finite difference"
            verdict = Text(f"used{agreed}", style="green")
        elif trial.works:
            verdict = Text("works, not needed", style="dim")
        else:
            verdict = Text(f"does not work: {trial.reason}", style="yellow")
        table.add_row(trial.method.replace("_", " "), verdict)
    if tangents.logits is not None:
        masked = ", with a mask of positions that count" if tangents.masked else ""
        table.add_row("logits", Text(f"found, of shape {tangents.logits}{masked}"))
    return table


def _memory(memory: Memory) -> RenderableType:
    table = _grid("Memory that Redline takes")
    rows = [
        ("between steps", memory.between_steps, "warm starts of spectra, remembered samples"),
        (
            "at a due step",
            memory.due_step,
            "parameters, update and inputs, from backward to commit; the tangent's pass",
        ),
        ("with a controller", memory.controlled_step, "a copy of the parameters, at every step"),
        ("with SpikeGuard", memory.snapshot, "a snapshot of the run, kept"),
    ]
    for name, size, what in rows:
        if size is not None:
            share = f" ({100 * size / memory.parameters:.3g} % of the parameters)" if memory.parameters else ""
            table.add_row(name, Text(f"{_bytes(size)}{share}: {what}"))
    return table


def _costs(costs: Costs) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, title_justify="left", title_style="bold")
    table.title = "Time, on this machine and this batch"
    table.add_column("what")
    for heading in ("each time", "every", "a step", "share"):
        table.add_column(heading, justify="right")
    table.add_row("a plain step with AdamW", _seconds(costs.plain), "1", _seconds(costs.plain), "100 %")
    for cost in costs.costs:
        table.add_row(
            cost.what,
            _seconds(cost.seconds),
            f"{1 / cost.per_step:.3g}" if cost.per_step else "never",
            _seconds(cost.amortized),
            f"{100 * cost.amortized / costs.plain:.2f} %",
        )
    table.add_row("watching, in all", "", "", _seconds(costs.share * costs.plain), f"{100 * costs.share:.2f} %")
    return Group(table, *(Text(line, style="dim") for line in _remarks(costs)))


def _remarks(costs: Costs) -> Iterator[str]:
    yield (
        f"The first measurement takes {_seconds(costs.first)}: spectra start cold. Weights are measured once for both "
        "spectrum monitors."
    )
    yield from (note for note in costs.notes if not says_a_gap(note))
    if costs.unmoved:
        more = ", …" if len(costs.unmoved) > _MOST_NAMED else ""
        yield f"No gradient reached {', '.join(costs.unmoved[:_MOST_NAMED])}{more}: they have no update."


def _grid(title: str) -> Table:
    table = Table(
        box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False, title_justify="left", title_style="bold"
    )
    table.title = title
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    return table


def _bytes(size: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size} B"


def _seconds(seconds: float) -> str:
    return (
        f"{seconds:.3g} s"
        if seconds >= 1
        else f"{1e3 * seconds:.3g} ms"
        if seconds >= 1e-3
        else f"{1e6 * seconds:.3g} µs"
    )
