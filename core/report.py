"""The stability report: what a run's measurements come to, with findings in words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from redline import metrics
from redline.findings import Finding, findings_of
from redline.findings.thresholds import NEAR, OVER
from redline.history import STEP_SIZE_EDGES, Course, RunHistory
from redline.interventions import Tally
from redline.numerics.tangents import FORWARD_MODE
from redline.readings import RunInfo, Series, Snapshot
from redline.run_snapshot import RunSnapshot


@dataclass(frozen=True)
class StepSizes:
    """The distribution of the normalized step size r over the run's measurements.

    Attributes:
        measured: how often; of these ``nonfinite`` were NaN or infinite and are in no other figure.
        samples: samples of the batch the last r is the maximum over, of ``batch`` in it.
        method: how many tangents were taken by each method.
        histogram: ``(from, to, count)`` of r.
        first_nonfinite: the first step at which it was not finite, or None.
        over_steps: those measured with r >= 1, in order; of more than 1,024, every other one was dropped.
        highest_by_tenth: the highest r in each tenth of the run; None where none was measured.
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
    first_nonfinite: int | None
    over_steps: tuple[int, ...]
    highest_by_tenth: tuple[float | None, ...]


@dataclass(frozen=True)
class LayerSummary:
    """One matrix over the run: its spectral norm and the hardest update it took; None for what was not measured.

    ``ceiling`` and ``weight_decay`` are what controllers hold it by, last. ``stable_rank`` is the last one measured,
    ``first_stable_rank`` the first.
    """

    name: str
    spectral_norm: float
    growth: float | None
    condition: float | None
    stable_rank: float | None
    first_stable_rank: float | None
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
class FirstNonFinite:
    """Where a value that was not finite was seen first, as far as it is known."""

    what: str
    step: int


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
        losses: the median loss of each tenth of the run; None where none was observed.
        step_sizes: the distribution of r, or None if it was never measured.
        binding: of each radius, how often it bound; empty if only that of the output was measured, or none.
        layers: every matrix, the hardest pushed first.
        nonfinite: source to count.
        first_nonfinite: where such a value was seen first, or None.
        interventions: what the controllers did, one entry a controller and action.
        snapshots: what they hold to go back to.
        notes: what could not be measured, in words.
        verdicts: what was found, worst first.
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
    losses: tuple[float | None, ...]
    step_sizes: StepSizes | None
    binding: tuple[BindingRadius, ...]
    layers: tuple[LayerSummary, ...]
    nonfinite: dict[str, int]
    first_nonfinite: FirstNonFinite | None
    interventions: tuple[Tally, ...]
    snapshots: tuple[KeptSnapshot, ...]
    notes: tuple[str, ...]
    verdicts: tuple[Finding, ...]

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
        nonfinite = {labels[0]: int(count) for labels, count in snapshot.series(metrics.NONFINITE.name).items()}
        steps = int(snapshot.value(metrics.STEPS.name))
        overhead, monitoring = (
            snapshot.series(ratio.name).get(()) if steps else None
            for ratio in (metrics.OVERHEAD_RATIO, metrics.MONITORING_RATIO)
        )
        report = cls(
            run=snapshot.run,
            steps=steps,
            seconds=seconds,
            overhead_ratio=overhead,
            monitoring_ratio=monitoring,
            overhead_budget=overhead_budget,
            put_off={labels[0]: int(count) for labels, count in snapshot.series(metrics.PUT_OFF.name).items()},
            first_loss=loss.first if loss else None,
            last_loss=loss.last if loss else None,
            losses=_by_tenth(history.losses, steps, statistics.median),
            step_sizes=_step_sizes(snapshot, history, steps),
            binding=_binding(snapshot, history, steps),
            layers=_layers(snapshot, history),
            nonfinite=nonfinite,
            first_nonfinite=_first_nonfinite(history),
            interventions=tuple(interventions),
            snapshots=tuple(snapshots),
            notes=notes,
            verdicts=(),
        )
        return replace(report, verdicts=findings_of(report))

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts, lists, numbers and strings."""
        return {**asdict(self), "verdicts": [{**asdict(one), "text": one.text} for one in self.verdicts]}

    def __rich__(self) -> Any:
        from redline.report_view import report_view  # rich is loaded only by who prints

        return report_view(self)


def _step_sizes(snapshot: Snapshot, history: RunHistory, steps: int) -> StepSizes | None:
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
        near=sum(count for low, _, count in bins if NEAR <= low < OVER),
        over=sum(count for low, _, count in bins if low >= OVER),
        histogram=tuple(bins),
        first_nonfinite=course.first_nonfinite,
        over_steps=tuple(step for step, _ in history.long_steps),
        highest_by_tenth=_by_tenth([*history.step_sizes, *history.long_steps], steps, max),
    )


def _by_tenth(
    values: Sequence[tuple[int, float]], steps: int, figure: Callable[[list[float]], float]
) -> tuple[float | None, ...]:
    """A figure of the finite values in each tenth of the run, None where there are none; empty without steps."""
    tenths: list[list[float]] = [[] for _ in range(10)] if steps else []
    for step, value in values if steps else ():
        if math.isfinite(value):
            tenths[min(10 * step // steps, 9)].append(value)
    return tuple(figure(tenth) if tenth else None for tenth in tenths)


_WATCHED = {
    metrics.LOSS.name: "the loss",
    metrics.GRADIENT_NORM.name: "the gradients",
    metrics.UPDATE_NORM.name: "the update",
    metrics.UPDATE_SPECTRAL_NORM.name: "the update of {}",
    metrics.WEIGHT_SPECTRAL_NORM.name: "{}",
}
"""Series that count as not finite, and what they are called; of one step the first in order."""


def _first_nonfinite(history: RunHistory) -> FirstNonFinite | None:
    def place(found: tuple[Series, Course]) -> tuple[int, int]:
        series, course = found
        assert course.first_nonfinite is not None
        return course.first_nonfinite, list(_WATCHED).index(series.metric)

    broken = [
        (series, course)
        for series, course in history.courses.items()
        if series.metric in _WATCHED and course.first_nonfinite is not None
    ]
    if not broken:
        return None
    first = min(broken, key=place)
    return FirstNonFinite(_WATCHED[first[0].metric].format(*first[0].labels), place(first)[0])


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
    first_ranks = history.layers(metrics.WEIGHT_STABLE_RANK.name)
    ceilings = snapshot.layers(metrics.WEIGHT_SPECTRAL_CEILING.name)
    decays = snapshot.layers(metrics.WEIGHT_DECAY_IN_FORCE.name)
    found = [
        LayerSummary(
            name=name,
            spectral_norm=course.last,
            growth=course.last / course.first if course.first and course.measured > 1 else None,
            condition=conditions.get(name),
            stable_rank=ranks.get(name),
            first_stable_rank=first_ranks[name].first if name in first_ranks else None,
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
