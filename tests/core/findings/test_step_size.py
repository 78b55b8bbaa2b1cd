"""Rules on r: which of them speaks, at what level, and with which figures."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from reports import report_of, tally

from redline.findings import RULES, Finding
from redline.findings.step_size import (
    few_samples,
    over_at_the_start,
    over_in_spikes,
    over_late,
    over_the_redline,
    over_throughout,
    tangent_fallback,
)
from redline.findings.thresholds import FEW_SAMPLES, ROUGH_NEAR
from redline.report import StabilityReport

NAN = math.nan
ON_THE_STEP_SIZE = {
    "over_at_the_start", "over_in_spikes", "over_late", "over_throughout", "over_the_redline", "near_the_redline",
    "within_limits", "step_size_not_measured",
}  # fmt: skip


def run(size: Callable[[int], float], steps: int = 1000, every: int = 10) -> StabilityReport:
    return report_of(steps, r=[(step, size(step)) for step in range(0, steps, every)])


def spoke(report: StabilityReport) -> Finding:
    """The one finding on the step size: never two of them, never none."""
    (finding,) = [one for one in report.verdicts if one.rule in ON_THE_STEP_SIZE]
    return finding


@pytest.mark.parametrize(
    ("size", "rule", "level"),
    [
        (lambda step: 0.1, "within_limits", "good"),
        (lambda step: 0.6 if step == 500 else 0.1, "near_the_redline", "watch"),
        (lambda step: 3.0 if step < 50 else 0.1, "over_at_the_start", "bad"),
        (lambda step: 3.0 if step < 100 else 0.1, "over_at_the_start", "bad"),
        (lambda step: 3.0 if step <= 100 else 0.1, "over_the_redline", "bad"),  # past the first tenth, too many
        (lambda step: 3.0 if step in (330, 700) else 0.1, "over_in_spikes", "bad"),
        (lambda step: 3.0 if step in (330, 700) else 0.8, "over_in_spikes or other", "bad"),
        (lambda step: 3.0 if step >= 800 else 0.1, "over_late", "bad"),
        (lambda step: 1.5 if step % 40 == 0 else 0.4, "over_throughout", "bad"),
        (lambda step: 1.5, "over_throughout", "bad"),
        (lambda step: 1.5 if 300 <= step < 450 else 0.1, "over_the_redline", "bad"),  # one stretch
        (lambda step: 1.5 if 260 <= step < 740 else 0.1, "over_the_redline", "bad"),  # long, and not all over the run
        (lambda step: 1.5 if 240 <= step < 740 else 0.1, "over_throughout", "bad"),
    ],
)
def test_which_rule_speaks(size: Callable[[int], float], rule: str, level: str):
    finding = spoke(run(size))
    if rule == "over_in_spikes or other":  # the typical step is near the redline itself
        rule = "over_the_redline"
    assert (finding.rule, finding.level) == (rule, level)


def test_a_hundredth_of_steps_over_is_a_spike_and_a_tenth_is_not():
    few = run(lambda step: 2.0 if step in (450, 460, 470, 480, 490) else 0.1)
    many = run(lambda step: 2.0 if 400 <= step < 500 else 0.1)
    assert (spoke(few).rule, spoke(many).rule) == ("over_in_spikes", "over_the_redline")


def test_spikes_are_named_by_their_steps_as_long_as_there_are_few():
    assert "at steps 330, 700 " in spoke(run(lambda step: 3.0 if step in (330, 700) else 0.1)).seen
    assert "at steps" not in spoke(run(lambda step: 1.5)).seen


def test_a_spike_is_not_lost_in_a_long_run():
    report = run(lambda step: 3.0 if step == 33_001 else 0.1, steps=50_000, every=1)
    assert (spoke(report).rule, report.step_sizes.over_steps) == ("over_in_spikes", (33_001,))


def test_too_few_measurements_make_no_pattern():
    assert spoke(run(lambda step: 3.0 if step == 0 else 0.1, steps=90)).rule == "over_the_redline"
    assert spoke(run(lambda step: 3.0 if step == 0 else 0.1, steps=100)).rule == "over_at_the_start"


def test_a_run_measured_at_its_start_only_is_not_said_to_have_recovered():
    report = report_of(1000, r=[(step, 3.0 if step < 30 else 0.1) for step in range(90)])
    assert spoke(report).rule != "over_at_the_start"


@pytest.mark.parametrize("rule", [over_at_the_start, over_in_spikes, over_late, over_throughout, over_the_redline])
def test_no_rule_speaks_of_steps_over_where_there_are_none(rule: Callable[[StabilityReport], Finding | None]):
    for report in (run(lambda step: 0.1), run(lambda step: 0.99), report_of(10), report_of(0), run(lambda step: NAN)):
        assert rule(report) is None


def test_what_controllers_held_is_to_watch():
    clamped = report_of(
        1000,
        r=[(step, 3.0 if step < 50 else 0.1) for step in range(0, 1000, 10)],
        interventions=[tally("StepClamp", "scale", 7), tally("Guard", "withhold", 1)],
    )
    finding = spoke(clamped)
    assert (finding.rule, finding.level) == ("over_at_the_start", "watch")
    assert "controllers scaled 7 of all steps" in finding.seen


def test_figures_are_those_of_the_run():
    finding = spoke(run(lambda step: {330: 3.25, 700: 2.0}.get(step, 0.1)))
    assert "2 of 100 measured steps had r >= 1" in finding.seen
    assert "the longest r = 3.25 at step 330" in finding.seen


@pytest.mark.parametrize("size", [lambda step: NAN, lambda step: math.inf if step == 40 else 0.1])
def test_r_that_was_not_finite_is_bad_and_its_first_step_is_named(size: Callable[[int], float]):
    report = run(size)
    (finding,) = [one for one in report.verdicts if one.rule == "step_size_not_finite"]
    assert finding.level == "bad"
    assert f"first at step {0 if size(0) != 0.1 else 40}" in finding.seen
    assert not [one for one in report.verdicts if one.level == "good"]


# How well it was measured --------------------------------------------------------------------------------------------


def sampled(samples: int, batch: int, r: float) -> StabilityReport:
    values = {"redline_tangent_samples": float(samples), "redline_batch_samples": float(batch)}
    return report_of(10, r=[(0, r)], values=values)


def test_few_samples_matter_near_the_redline_only():
    found = few_samples(sampled(36, 512, 0.4))
    assert found is not None
    assert found.level == "watch"
    assert "36 samples of batches of 512, and reached 0.4" in found.seen
    assert few_samples(sampled(36, 512, 0.9 * ROUGH_NEAR)) is None
    assert few_samples(sampled(36, 128, 0.4)) is None
    assert few_samples(sampled(int(FEW_SAMPLES * 512), 512, 0.4)) is None
    assert few_samples(report_of(10, r=[(0, 0.4)])) is None  # it is not known on how many
    assert few_samples(sampled(36, 512, NAN)) is None


def test_a_finite_difference_is_told_of_and_exact_ways_are_not():
    def by(method: str) -> StabilityReport:
        return report_of(10, r=[(s, 0.1) for s in range(10)], values={("redline_tangent_fallbacks_total", method): 4.0})

    found = tangent_fallback(by("finite_difference"))
    assert found is not None
    assert (found.level, "4 of 10 measured steps" in found.seen) == ("watch", True)
    assert tangent_fallback(by("math_attention")) is None
    assert tangent_fallback(report_of(10)) is None


def test_every_rule_can_be_asked_of_an_empty_run():
    for rule in RULES:
        found = rule(report_of(0))
        assert (found is not None) == (rule.__name__ == "no_step"), rule.__name__
