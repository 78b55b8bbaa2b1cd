"""What the step size r says of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from redline.findings.finding import Finding
from redline.findings.thresholds import (
    ENOUGH_MEASUREMENTS,
    FEW_SAMPLES,
    LATE,
    NEAR,
    ROUGH_NEAR,
    SPIKES,
    START,
    THROUGHOUT,
)
from redline.numerics.tangents import FINITE_DIFFERENCE, SHARDED_DIFFERENCE

if TYPE_CHECKING:
    from redline.report import StabilityReport, StepSizes

_Pattern = Literal["over_at_the_start", "over_in_spikes", "over_late", "over_throughout", "over_the_redline"]
_BEYOND = "Beyond the radius the loss cannot be trusted to follow the step."
_MOST_NAMED = 5


def step_size_not_measured(report: StabilityReport) -> Finding | None:
    """Steps were taken, and r was measured at none of them."""
    if not report.steps or report.step_sizes is not None:
        return None
    return Finding(
        "watch",
        "step_size_not_measured",
        "The step size r was not measured, so nothing is said of the redline.",
        "Without it a step that is too long shows only once the loss has jumped.",
        "Add GhostRadius to the monitors; if it is there, the notes say why it could not measure, and "
        "`redline doctor` shows it ahead of a run.",
    )


def step_size_not_finite(report: StabilityReport) -> Finding | None:
    """r was NaN or infinite at some measured step."""
    sizes = report.step_sizes
    if sizes is None or not sizes.nonfinite:
        return None
    first = "" if sizes.first_nonfinite is None else f", first at step {sizes.first_nonfinite}"
    return Finding(
        "bad",
        "step_size_not_finite",
        f"r was not finite at {sizes.nonfinite} of {sizes.measured} measured steps{first}.",
        "The step or the logits had overflowed by then.",
        "Look at the rate and the data of the steps just before; NonFiniteGuard keeps such steps from the parameters.",
    )


def over_at_the_start(report: StabilityReport) -> Finding | None:
    """Steps were over the redline in the first tenth of the run only."""
    return _over(
        report,
        "over_at_the_start",
        "all within the first tenth of the run",
        "Steps that were too long only while the run began point at the warm-up, not at the rate.",
        "Lengthen the warm-up or start it lower; StepClamp holds these steps until then.",
    )


def over_in_spikes(report: StabilityReport) -> Finding | None:
    """A few single steps were over the redline, the typical one far from it."""
    return _over(
        report,
        "over_in_spikes",
        "the typical step well inside",
        f"{_BEYOND} Single steps point at single batches, not at the rate.",
        "Look at the samples of these steps (session.margins.most_fragile() names those that bind); StepClamp shortens "
        "such steps and leaves the others alone.",
    )


def over_late(report: StabilityReport) -> Finding | None:
    """Steps were over the redline in the second half of the run only, and too many for single spikes."""
    return _over(
        report,
        "over_late",
        "none in the first half of the run",
        f"{_BEYOND} The radius shrinks as logits grow, so that a rate that was right early on can become too high.",
        "Let the rate decay earlier or further, or hold the logits' growth by weight decay on the last layers.",
    )


def over_throughout(report: StabilityReport) -> Finding | None:
    """A large share of steps was over the redline, all over the run."""
    return _over(
        report,
        "over_throughout",
        "all over the run",
        f"{_BEYOND} Where this goes on from end to end the rate itself is too high.",
        "Lower the rate, or hold the steps with StepClamp.",
    )


def over_the_redline(report: StabilityReport) -> Finding | None:
    """Steps were over the redline in no pattern that another rule names, or in too few measurements to tell."""
    return _over(
        report,
        "over_the_redline",
        "",
        _BEYOND,
        "Lower the rate, lengthen the warm-up, or clamp the step; measure r more often to see when it happens.",
    )


def near_the_redline(report: StabilityReport) -> Finding | None:
    """No step was over the redline, and the longest was near it."""
    sizes = report.step_sizes
    if sizes is None or sizes.over or not sizes.near:
        return None
    return Finding(
        "watch",
        "near_the_redline",
        f"Near the redline: the longest measured step had r = {sizes.highest:.3g} (step {sizes.highest_step}), and "
        f"{sizes.near} of {sizes.measured} were at {NEAR} or more.",
        "There is little room for a higher rate.",
        "Keep the rate; StepClamp costs such a run little and holds the step that would go over.",
    )


def within_limits(report: StabilityReport) -> Finding | None:
    """Every measured step was far from the redline."""
    sizes = report.step_sizes
    if sizes is None or sizes.over or sizes.near or sizes.nonfinite:
        return None
    return Finding(
        "good",
        "within_limits",
        f"Within limits: the longest of {sizes.measured} measured steps had r = {sizes.highest:.3g} (step "
        f"{sizes.highest_step}), {1 / max(sizes.highest, 1e-12):.3g} times shorter than the redline.",
        "Such steps are short enough for the loss to follow them.",
        "",
    )


def few_samples(report: StabilityReport) -> Finding | None:
    """r was measured on a small share of each batch, and is not far enough from the redline for that not to matter."""
    sizes = report.step_sizes
    if sizes is None or not sizes.batch or sizes.samples >= FEW_SAMPLES * sizes.batch:
        return None
    if not sizes.highest >= ROUGH_NEAR:  # NaN where none was finite
        return None
    return Finding(
        "watch",
        "few_samples",
        f"r was measured on {sizes.samples} samples of batches of {sizes.batch}, and reached {sizes.highest:.3g}.",
        "It is a maximum over samples: over few of them it is an estimate from below, and the whole batch's may be "
        "over the redline where this one is not.",
        "Raise max_samples of GhostRadius, or pass None for the whole batch, and measure less often in return.",
    )


def tangent_fallback(report: StabilityReport) -> Finding | None:
    """r was measured by finite difference, the last rung of the ladder; the other two are equally exact."""
    sizes = report.step_sizes
    if sizes is None:
        return None
    differences = sum(sizes.method.get(method, 0) for method in (FINITE_DIFFERENCE, SHARDED_DIFFERENCE))
    if not differences:
        return None
    return Finding(
        "watch",
        "tangent_fallback",
        f"r was measured by finite difference at {differences} of {sizes.measured} measured steps: "
        "forward mode does not work for this model.",
        "A finite difference is good to about 1 %, to 5 % across kinks, and sees no layers.",
        "`redline doctor` says what forward mode failed on; read r with that margin.",
    )


def pattern(sizes: StepSizes, steps: int) -> _Pattern | None:
    """The rule that speaks of how steps over the redline lie in the run; None if there are none."""
    if not sizes.over:
        return None
    known = sizes.measured - sizes.nonfinite
    if known < ENOUGH_MEASUREMENTS or not sizes.over_steps:
        return "over_the_redline"
    first, last = sizes.over_steps[0], sizes.over_steps[-1]
    if last < START * steps and any(r is not None for r in sizes.highest_by_tenth[1:]):
        return "over_at_the_start"
    if sizes.over <= SPIKES * known and sizes.median < NEAR:
        return "over_in_spikes"
    if first >= LATE * steps:
        return "over_late"
    quarters = {4 * step // steps for step in sizes.over_steps}
    return "over_throughout" if sizes.over >= THROUGHOUT * known and len(quarters) >= 3 else "over_the_redline"


def _over(report: StabilityReport, rule: _Pattern, when: str, why: str, advice: str) -> Finding | None:
    """The finding if steps over the redline have this pattern: bad, or to watch where controllers scaled steps."""
    sizes = report.step_sizes
    if sizes is None or pattern(sizes, report.steps) != rule:
        return None
    scaled = max((one.count for one in report.interventions if one.action == "scale"), default=0)
    when = f" ({when})" if when else ""
    at = f", at steps {', '.join(map(str, sizes.over_steps))}" if 1 < len(sizes.over_steps) <= _MOST_NAMED else ""
    if scaled:
        seen = (
            f"Over the redline, and held: {sizes.over} of {sizes.measured} measured steps were proposed with r >= 1{at}"
            f"{when}, the longest r = {sizes.highest:.3g} at step {sizes.highest_step}; controllers scaled {scaled} of "
            "all steps."
        )
    else:
        seen = (
            f"Over the redline: {sizes.over} of {sizes.measured} measured steps had r >= 1{at}{when}, the longest "
            f"r = {sizes.highest:.3g} at step {sizes.highest_step}."
        )
    return Finding("watch" if scaled else "bad", rule, seen, why, advice)
