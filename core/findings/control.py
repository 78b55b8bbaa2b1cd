"""What the controllers' interventions say of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from redline.findings.finding import Finding
from redline.findings.thresholds import CARRIED, ENOUGH_INTERVENTIONS, OFTEN_REJECTED, REPEATED

if TYPE_CHECKING:
    from redline.report import StabilityReport

_REFUSALS = ("withhold", "reject", "rollback")


def run_stopped(report: StabilityReport) -> Finding | None:
    """A controller stopped the run."""
    found = [one for one in report.interventions if one.action == "stop"]
    if not found:
        return None
    one = found[-1]
    return Finding(
        "bad",
        "run_stopped",
        f"{one.controller} stopped the run at step {one.last_step}: {one.last_reason}",
        "It had met the same trouble too often to go on.",
        "Go back to a checkpoint before it began, and look at the data and the rate from there.",
    )


def clamp_carries_the_run(report: StabilityReport) -> Finding | None:
    """A controller that only has to catch what goes wrong scaled a large share of all steps."""
    found = [
        one
        for one in report.interventions
        if one.action == "scale"
        and not one.by_design
        and one.count >= max(ENOUGH_INTERVENTIONS, CARRIED * report.steps)
    ]
    if not found:
        return None
    words = ", ".join(f"{one.controller} {one.count} of {report.steps} steps" for one in found)
    return Finding(
        "watch",
        "clamp_carries_the_run",
        f"Controllers scaled a large share of the steps: {words}.",
        "The clamp, not the rate, decides how long steps are: the rate is too high, its schedule without effect.",
        "Lower the rate until the clamp acts on few steps; if it is meant to set the length, RadiusLR does so evenly.",
    )


def repeated_rejections(report: StabilityReport) -> Finding | None:
    """Guards withheld batches, rejected steps or rolled the run back several times."""
    found = [one for one in report.interventions if one.action in _REFUSALS]
    count = sum(one.count for one in found)
    if count < REPEATED:
        return None
    words = ", ".join(
        f"{one.controller} {one.action} ×{one.count} (steps {one.first_step} to {one.last_step})" for one in found
    )
    return Finding(
        "bad" if count >= OFTEN_REJECTED * report.steps else "watch",
        "repeated_rejections",
        f"Guards turned steps away {count} times: {words}.",
        "Single bad batches happen; when it goes on, data or rate are at fault, and what is withheld is not learned.",
        "Look at the batches of these steps (session.interventions has each), then lower the rate.",
    )
