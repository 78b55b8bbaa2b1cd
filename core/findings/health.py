"""What steps, losses, values that are not finite and overhead say of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from redline.findings.finding import Finding
from redline.findings.thresholds import LOSS_RISE, LOSS_RISE_OF_FALL, NEAR, OVER_BUDGET, OVERHEAD, SETTLED_STEPS

if TYPE_CHECKING:
    from redline.report import StabilityReport

_LATE_TENTHS = 3


def no_step(report: StabilityReport) -> Finding | None:
    """No optimizer step was taken."""
    if report.steps:
        return None
    return Finding(
        "watch",
        "no_step",
        "No optimizer step was taken.",
        "There is nothing to measure.",
        "Check that the optimizer that is stepped is the one that was attached, and that the loop was entered.",
    )


def values_not_finite(report: StabilityReport) -> Finding | None:
    """Losses, gradients, updates or weights were NaN or infinite."""
    broken = {source: count for source, count in report.nonfinite.items() if count}
    if not broken:
        return None
    sources = ", ".join(f"{source} {count} times" for source, count in broken.items())
    first = report.first_nonfinite
    where = f" It was seen first in {first.what}, at step {first.step}." if first else ""
    return Finding(
        "bad",
        "values_not_finite",
        f"Values were not finite: {sources}.{where}",
        "One such value spreads to every parameter within a step, and to the optimizer's moments for good.",
        "Look at the data and the rate of those steps first; NonFiniteGuard withholds such gradients.",
    )


def loss_rising_on_long_steps(report: StabilityReport) -> Finding | None:
    """The loss went up towards the end while steps were near the redline or over it."""
    rise, r = _rise(report), _late_step_size(report)
    if rise is None or r is None or r < NEAR:
        return None
    return Finding(
        "bad",
        "loss_rising_on_long_steps",
        f"The loss goes up: {rise[1]:.3g} at the end, {rise[0]:.3g} at its best, with r up to {r:.3g} meanwhile.",
        "Steps as long as the radius of the loss do not follow it: the run is leaving what it had learned.",
        "Go back to a checkpoint from before the rise with a lower rate, or with StepClamp.",
    )


def loss_rising(report: StabilityReport) -> Finding | None:
    """The loss went up towards the end, and r was small or unknown."""
    rise, r = _rise(report), _late_step_size(report)
    if rise is None or (r is not None and r >= NEAR):
        return None
    known = "r was not measured then" if r is None else f"r was at most {r:.3g} meanwhile"
    return Finding(
        "watch",
        "loss_rising",
        f"The loss goes up: {rise[1]:.3g} at the end, {rise[0]:.3g} at its best; {known}.",
        "The length of steps does not explain it." if r is not None else "Whether steps are too long is not known.",
        "Look at the data (its order, labels, a new source) and at what the schedule changed there."
        if r is not None
        else "Measure r (GhostRadius) to tell steps that are too long from data that changed.",
    )


def overhead(report: StabilityReport) -> Finding | None:
    """Monitoring took more of the training time than its budget, or than 5 % where none was given."""
    taken = report.overhead_ratio if report.monitoring_ratio is None else report.monitoring_ratio
    budget = report.overhead_budget
    if taken is None or report.steps < SETTLED_STEPS:
        return None
    if taken <= (OVERHEAD if budget is None else OVER_BUDGET * budget):
        return None
    limit = "" if budget is None else f", of {100 * budget:.3g} % allowed"
    return Finding(
        "watch",
        "overhead",
        f"Monitoring took {100 * taken:.3g} % of training time{limit}.",
        "It slows the run by as much, and changes nothing else.",
        "Measure less often, or r on fewer samples; overhead_budget=0.02 keeps monitoring to a share."
        if budget is None
        else "What hooks take at every step cannot be put off: leave out monitors that are due at every step.",
    )


def _rise(report: StabilityReport) -> tuple[float, float] | None:
    """The median loss of the best tenth and of the last, if that is going up."""
    losses = [loss for loss in report.losses if loss is not None]
    if report.steps < SETTLED_STEPS or len(losses) < 3 or report.losses[-1] is None:
        return None
    first, best, last = losses[0], min(losses), losses[-1]
    if best <= 0 or last < LOSS_RISE * best or last - best < LOSS_RISE_OF_FALL * (first - best):
        return None
    return best, last


def _late_step_size(report: StabilityReport) -> float | None:
    """The highest r in the last tenths of the run, or None if there was none."""
    late = [] if report.step_sizes is None else report.step_sizes.highest_by_tenth[-_LATE_TENTHS:]
    return max((r for r in late if r is not None), default=None)
