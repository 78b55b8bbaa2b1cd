"""All rules, and asking them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from redline.findings.control import clamp_carries_the_run, repeated_rejections, run_stopped
from redline.findings.finding import LEVELS, Finding, Rule
from redline.findings.health import loss_rising, loss_rising_on_long_steps, no_step, overhead, values_not_finite
from redline.findings.layers import layer_grew_alone, layer_pushed_hard, stable_rank_collapsed
from redline.findings.step_size import (
    few_samples,
    near_the_redline,
    over_at_the_start,
    over_in_spikes,
    over_late,
    over_the_redline,
    over_throughout,
    step_size_not_finite,
    step_size_not_measured,
    tangent_fallback,
    within_limits,
)

if TYPE_CHECKING:
    from redline.report import StabilityReport

RULES: tuple[Rule, ...] = (
    values_not_finite,
    step_size_not_finite,
    run_stopped,
    no_step,
    over_throughout,
    over_late,
    over_at_the_start,
    over_in_spikes,
    over_the_redline,
    near_the_redline,
    within_limits,
    step_size_not_measured,
    loss_rising_on_long_steps,
    loss_rising,
    clamp_carries_the_run,
    repeated_rejections,
    layer_pushed_hard,
    layer_grew_alone,
    stable_rank_collapsed,
    few_samples,
    tangent_fallback,
    overhead,
)
"""In the order in which findings of one level are told."""


def findings_of(report: StabilityReport) -> tuple[Finding, ...]:
    """What the rules find in a report, the worst first."""
    found = [finding for rule in RULES if (finding := rule(report)) is not None]
    return tuple(sorted(found, key=lambda finding: LEVELS.index(finding.level)))
