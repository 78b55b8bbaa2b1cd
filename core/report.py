"""The stability report: what a run's measurements come to, with a verdict in words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from redline import metrics
from redline.history import STEP_SIZE_EDGES, RunHistory
from redline.interventions import Tally
from redline.numerics.tangents import FORWARD_MODE
from redline.readings import RunInfo, Snapshot
from redline.run_snapshot import RunSnapshot

NEAR = 0.5
"""From this r on a step is called near the redline: half of what the bound allows; an edge of the histogram."""


@dataclass(frozen=True)
class StepSizes:
    """The distribution of the normalized step size r over the run's measurements.

    Attributes:
        measured: how often; of these ``nonfinite`` were NaN or infinite and are in no other figure.
        samples: samples of the batch the last r is the maximum over, of ``batch`` in it.
        method: how many tangents were taken by each method.
        histogram: ``(from, to, count)`` of r.
    """

    measured: int
    nonfinite: int
    samples: int
    batch: int
    method: dict[str, int]
    median: float
    p95: float
    highest: float
    highest_step: int
    near: int
    over: int
    histogram: tuple[tuple[float, float, int], ...]


@dataclass(frozen=True)
class LayerSummary:
    """One matrix over the run: its spectral norm and the hardest update it took; None for what was not measured.

    ``ceiling`` and ``weight_decay`` are what controllers hold it by, last.
    """

    name: str
    spectral_norm: float
    growth: float | None
    condition: float | None
    stable_rank: float | None
    hardest_update: float | None
    hardest_step: int | None
    ceiling: float | None
    weight_decay: float | None


@dataclass(frozen=True)
class BindingRadius:
    """How often one of the radii was the one that bound: the step was longer against it than against the others.

    Attributes:
        radius: output (that of r), attention or activation.
        shares: of the steps measured in each quarter of the run, those at which it bound; None where none were.
        highest: the longest step against it, at ``highest_step``.
        layer: that against which the last step measured was the longest; None for the output.
    """

    radius: str
    shares: tuple[float | None, ...]
    highest: float
    highest_step: int
    layer: str | None


@dataclass(frozen=True)
class KeptSnapshot:
    """A copy of the run that a controller holds to go back to: of which step, how large and where it is."""

    controller: str
    step: int
    bytes: int
    memory: str
    in_checkpoints: bool

    @classmethod
    def of(cls, controller: str, snapshot: RunSnapshot) -> KeptSnapshot:
        """Describe one."""
        return cls(controller, snapshot.step, snapshot.bytes, snapshot.memory, snapshot.in_checkpoints)


@dataclass(frozen=True)
class Verdict:
    """One finding: how bad it is, what was seen and what to do about it."""

    level: Literal["good", "watch", "bad"]
    text: str


@dataclass(frozen=True)
class StabilityReport:
    """What a run's measurements come to. ``rich.print(report)`` shows it; ``to_dict()`` gives it as plain data.

    Attributes:
        run: what ran.
        steps: optimizer steps.
        seconds: from the first step to the last.
        overhead_ratio: time in Redline / time of training; None before the first measurement.
        monitoring_ratio: the part of it that is not the controllers'; None as above.
        overhead_budget: what monitoring may take of training time; None without a limit.
        put_off: monitor to how often it fell due and was put off, to keep to the budget.
        first_loss, last_loss: as observed, or None.
        step_sizes: the distribution of r, or None if it was never measured.
        binding: of each radius, how often it bound; empty if only that of the output was measured, or none.
        layers: every matrix, the hardest pushed first.
        nonfinite: source to count.
        interventions: what the controllers did, one entry a controller and action.
        snapshots: what they hold to go back to.
        notes: what could not be measured, in words.
        verdicts: worst first.
    """

    run: RunInfo
    steps: int
    seconds: float
    overhead_ratio: float | None
    monitoring_ratio: float | None
    overhead_budget: float | None
    put_off: dict[str, int]
    first_loss: float | None
    last_loss: float | None
    step_sizes: StepSizes | None
    binding: tuple[BindingRadius, ...]
    layers: tuple[LayerSummary, ...]
    nonfinite: dict[str, int]
    interventions: tuple[Tally, ...]
    snapshots: tuple[KeptSnapshot, ...]
    notes: tuple[str, ...]
    verdicts: tuple[Verdict, ...]

    @classmethod
    def of(
        cls,
        snapshot: Snapshot,
        history: RunHistory,
        interventions: Sequence[Tally],
        snapshots: Sequence[KeptSnapshot],
        notes: tuple[str, ...],
        seconds: float,
        overhead_budget: float | None = None,
    ) -> StabilityReport:
        """Sum up a run."""
        loss = history.course(metrics.LOSS.name)
        sizes = _step_sizes(snapshot, history)
        nonfinite = {labels[0]: int(count) for labels, count in snapshot.series(metrics.NONFINITE.name).items()}
        layers = _layers(snapshot, history)
        steps = int(snapshot.value(metrics.STEPS.name))
        overhead, monitoring = (
            snapshot.series(ratio.name).get(()) if steps else None
            for ratio in (metrics.OVERHEAD_RATIO, metrics.MONITORING_RATIO)
        )
        return cls(
            run=snapshot.run,
            steps=steps,
            seconds=seconds,
            overhead_ratio=overhead,
            monitoring_ratio=monitoring,
            overhead_budget=overhead_budget,
            put_off={labels[0]: int(count) for labels, count in snapshot.series(metrics.PUT_OFF.name).items()},
            first_loss=loss.first if loss else None,
            last_loss=loss.last if loss else None,
            step_sizes=sizes,
            binding=_binding(snapshot, history, steps),
            layers=layers,
            nonfinite=nonfinite,
            interventions=tuple(interventions),
            snapshots=tuple(snapshots),
            notes=notes,
            verdicts=_verdicts(sizes, nonfinite, steps, interventions),
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts, lists, numbers and strings."""
        return asdict(self)

    def __rich__(self) -> Any:
        from redline.report_view import report_view  # rich is loaded only by who prints

        return report_view(self)


def _step_sizes(snapshot: Snapshot, history: RunHistory) -> StepSizes | None:
    course = history.course(metrics.NORMALIZED_STEP_SIZE.name)
    if course is None:
        return None
    finite = sorted(value for _, value in history.step_sizes if math.isfinite(value)) or [math.nan]
    bins = list(zip(STEP_SIZE_EDGES, (*STEP_SIZE_EDGES[1:], math.inf), history.step_size_counts, strict=True))
    method = {labels[0]: int(n) for labels, n in snapshot.series(metrics.TANGENT_FALLBACKS.name).items() if n}
    if forward := history.measured_step_sizes - sum(method.values()):
        method = {FORWARD_MODE: forward, **method}
    return StepSizes(
        measured=history.measured_step_sizes,
        nonfinite=history.nonfinite_step_sizes,
        samples=int(snapshot.series(metrics.TANGENT_SAMPLES.name).get((), 0)),
        batch=int(snapshot.series(metrics.BATCH_SAMPLES.name).get((), 0)),
        method=method,
        median=statistics.median(finite),
        p95=finite[math.ceil(0.95 * len(finite)) - 1],
        highest=course.highest,
        highest_step=course.highest_step,
        near=sum(count for low, _, count in bins if NEAR <= low < 1),
        over=sum(count for low, _, count in bins if low >= 1),
        histogram=tuple(bins),
    )


_LAYER_METRICS = {"attention": metrics.ATTENTION_STEP_SIZE, "activation": metrics.ACTIVATION_STEP_SIZE}


def _binding(snapshot: Snapshot, history: RunHistory, steps: int) -> tuple[BindingRadius, ...]:
    courses = history.layers(metrics.BINDING_STEP_SIZE.name)
    if len(courses) < 2:
        return ()
    bound: list[list[str]] = [[], [], [], []]
    for step, sizes in history.binding:
        if not any(math.isnan(size) for size in sizes.values()):
            bound[min(4 * step // max(steps, 1), 3)].append(max(sizes, key=lambda radius: sizes[radius]))
    found = []
    for radius, course in courses.items():
        layers = snapshot.layers(_LAYER_METRICS[radius].name) if radius in _LAYER_METRICS else {}
        shares = tuple(names.count(radius) / len(names) if names else None for names in bound)
        last = max(layers, key=lambda name: layers[name]) if layers else None
        found.append(BindingRadius(radius, shares, course.highest, course.highest_step, last))
    return tuple(found)


def _layers(snapshot: Snapshot, history: RunHistory) -> tuple[LayerSummary, ...]:
    ratios = history.layers(metrics.UPDATE_TO_WEIGHT_RATIO.name)
    conditions = snapshot.layers(metrics.WEIGHT_SPECTRAL_CONDITION.name)
    ranks = snapshot.layers(metrics.WEIGHT_STABLE_RANK.name)
    ceilings = snapshot.layers(metrics.WEIGHT_SPECTRAL_CEILING.name)
    decays = snapshot.layers(metrics.WEIGHT_DECAY_IN_FORCE.name)
    found = [
        LayerSummary(
            name=name,
            spectral_norm=course.last,
            growth=course.last / course.first if course.first and course.measured > 1 else None,
            condition=conditions.get(name),
            stable_rank=ranks.get(name),
            hardest_update=ratios[name].highest if name in ratios else None,
            hardest_step=ratios[name].highest_step if name in ratios else None,
            ceiling=ceilings.get(name),
            weight_decay=decays.get(name),
        )
        for name, course in history.layers(metrics.WEIGHT_SPECTRAL_NORM.name).items()
    ]
    return tuple(sorted(found, key=lambda layer: hardness(layer.hardest_update), reverse=True))


def hardness(update: float | None) -> float:
    """To sort layers by their update: those without one last, those whose update was not finite first."""
    return -1.0 if update is None else math.inf if math.isnan(update) else update


def _verdicts(
    sizes: StepSizes | None, nonfinite: dict[str, int], steps: int, interventions: Sequence[Tally]
) -> tuple[Verdict, ...]:
    found: list[Verdict] = []
    scaled = max((one.count for one in interventions if one.action == "scale"), default=0)
    if broken := {source: count for source, count in nonfinite.items() if count}:
        sources = ", ".join(f"{source} {count} times" for source, count in broken.items())
        found.append(
            Verdict("bad", f"Values were not finite: {sources}. Look at the data and the rate of those steps first.")
        )
    if sizes is not None and sizes.nonfinite:
        found.append(
            Verdict(
                "bad",
                f"r was not finite at {sizes.nonfinite} of {sizes.measured} measured steps: the step or the logits had "
                "overflowed by then.",
            )
        )
    if not steps:
        found.append(Verdict("watch", "No optimizer step was taken."))
    elif sizes is None:
        found.append(Verdict("watch", "The step size r was not measured, so nothing is said of the redline."))
    elif sizes.over and scaled:
        found.append(
            Verdict(
                "watch",
                f"Over the redline, and held: {sizes.over} of {sizes.measured} measured steps were proposed with "
                f"r >= 1, the longest r = {sizes.highest:.3g} at step {sizes.highest_step}; controllers scaled "
                f"{scaled} of all steps. If that goes on, lower the rate or lengthen the warm-up.",
            )
        )
    elif sizes.over:
        found.append(
            Verdict(
                "bad",
                f"Over the redline: {sizes.over} of {sizes.measured} measured steps had r >= 1, the longest "
                f"r = {sizes.highest:.3g} at step {sizes.highest_step}. The loss cannot be trusted to follow such "
                "steps: lower the rate, lengthen the warm-up, or clamp the step.",
            )
        )
    elif sizes.near:
        found.append(
            Verdict(
                "watch",
                f"Near the redline: the longest measured step had r = {sizes.highest:.3g} (step {sizes.highest_step}), "
                f"and {sizes.near} of {sizes.measured} were at {NEAR} or more. There is little room for a higher rate.",
            )
        )
    elif not sizes.nonfinite:
        found.append(
            Verdict(
                "good",
                f"Within limits: the longest of {sizes.measured} measured steps had r = {sizes.highest:.3g} (step "
                f"{sizes.highest_step}), {1 / max(sizes.highest, 1e-12):.3g} times shorter than the redline.",
            )
        )
    return tuple(found)
