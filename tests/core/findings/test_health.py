"""Rules on losses, values that are not finite, and overhead."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from reports import Key, report_of

from redline.findings.health import loss_rising, loss_rising_on_long_steps, no_step, overhead, values_not_finite
from redline.report import StabilityReport

NAN, INF = math.nan, math.inf
STEPS = 1000


def losing(loss: Callable[[int], float], r: float | None = None, steps: int = STEPS) -> StabilityReport:
    sizes = [] if r is None else [(step, r if step >= 0.8 * steps else 0.1) for step in range(0, steps, 10)]
    return report_of(steps, losses=[(step, loss(step)) for step in range(steps)], r=sizes)


def up_at_the_end(step: int) -> float:
    return 2.3 - 1.3 * step / 700 if step < 700 else 1.0 + 2.0 * (step - 700) / 300


def test_a_loss_that_goes_up_on_long_steps_is_bad():
    found = loss_rising_on_long_steps(losing(up_at_the_end, 0.7))
    assert found is not None
    assert found.level == "bad"
    assert "2.66 at the end, 1.09 at its best, with r up to 0.7" in found.seen
    assert loss_rising(losing(up_at_the_end, 0.7)) is None


def test_a_loss_that_goes_up_on_short_steps_is_to_watch_and_points_at_the_data():
    found = loss_rising(losing(up_at_the_end, 0.2))
    assert found is not None
    assert (found.level, "r was at most 0.2 meanwhile" in found.seen, "data" in found.advice) == ("watch", True, True)
    assert loss_rising_on_long_steps(losing(up_at_the_end, 0.2)) is None


def test_where_r_is_not_known_that_is_said():
    found = loss_rising(losing(up_at_the_end))
    assert found is not None
    assert "r was not measured then" in found.seen
    assert "GhostRadius" in found.advice


@pytest.mark.parametrize(
    "loss",
    [
        lambda step: 2.3 - 2 * step / STEPS,
        lambda step: 2.3 + 0.2 * math.sin(step),  # noise around what it was
        lambda step: 2.3 * 0.99**step + (1e-3 if step >= 900 else 0.0),  # near zero it doubles for nothing
        lambda step: 9.0 if step == 999 else 1.0,  # one bad batch
        lambda step: NAN,
    ],
)
def test_losses_that_do_not_go_up(loss: Callable[[int], float]):
    for r in (None, 0.2, 0.7):
        report = losing(loss, r)
        assert loss_rising(report) is None
        assert loss_rising_on_long_steps(report) is None


def test_a_run_that_only_ever_diverged_goes_up():
    assert loss_rising_on_long_steps(losing(lambda step: 2.3 + 5 * step / STEPS, 0.9)) is not None


def test_short_runs_are_not_judged():
    assert loss_rising(losing(lambda step: 1.0 + step, steps=99)) is None
    assert loss_rising(losing(lambda step: 1.0 + step, steps=100)) is not None


def test_losses_are_summed_up_by_tenths():
    report = losing(lambda step: NAN if step < 100 else float(step // 100), steps=1000)
    assert report.losses == (None, *map(float, range(1, 10)))
    assert report_of(0).losses == ()


# Not finite ----------------------------------------------------------------------------------------------------------


def broken(courses: dict[Key, list[tuple[int, float]]], **counts: float) -> StabilityReport:
    values: dict[Key, float] = {("redline_nonfinite_total", source): count for source, count in counts.items()}
    return report_of(STEPS, courses=courses, values=values)


def test_values_that_were_not_finite_are_named_by_source_and_first_step():
    found = values_not_finite(
        broken(
            {
                "redline_loss": [(0, 2.0), (7, 3.0), (8, NAN), (9, INF)],
                ("redline_weight_spectral_norm", "head"): [(0, 1.0), (50, NAN)],
            },
            loss=2.0,
            weight=1.0,
            update=0.0,
        )
    )
    assert found is not None
    assert (found.level, found.seen) == (
        "bad",
        "Values were not finite: loss 2 times, weight 1 times. It was seen first in the loss, at step 8.",
    )


def test_of_one_step_the_loss_is_named_ahead_of_what_follows_from_it():
    report = broken(
        {
            ("redline_weight_spectral_norm", "head"): [(8, NAN)],
            "redline_gradient_norm": [(8, INF)],
            "redline_loss": [(8, NAN)],
        },
        loss=1.0,
    )
    assert (report.first_nonfinite.what, report.first_nonfinite.step) == ("the loss", 8)


def test_a_layer_is_named():
    report = broken({("redline_weight_spectral_norm", "head"): [(0, 1.0), (50, NAN)]}, weight=1.0)
    assert "first in head, at step 50" in values_not_finite(report).seen


def test_where_it_began_is_left_out_where_it_is_not_known():
    assert values_not_finite(broken({}, gradient=3.0)).seen == "Values were not finite: gradient 3 times."
    assert values_not_finite(broken({}, gradient=0.0)) is None


# Steps and overhead --------------------------------------------------------------------------------------------------


def test_a_run_without_a_step():
    assert no_step(report_of(0)).level == "watch"
    assert no_step(report_of(1)) is None


@pytest.mark.parametrize(
    ("monitoring", "budget", "steps", "told"),
    [
        (0.051, None, 100, True),
        (0.05, None, 100, False),
        (0.5, None, 99, False),
        (0.026, 0.02, 100, True),
        (0.025, 0.02, 100, False),
        (0.12, 0.1, 100, False),
    ],
)
def test_overhead_above_its_budget_or_five_percent(monitoring: float, budget: float | None, steps: int, told: bool):
    values = {"redline_monitoring_ratio": monitoring, "redline_overhead_ratio": 0.9}
    found = overhead(report_of(steps, values=values, budget=budget))
    assert (found is not None) == told
    if found:
        assert found.level == "watch"
        assert f"{100 * monitoring:.3g} %" in found.seen
        assert ("allowed" in found.seen) == (budget is not None)


def test_overhead_of_controllers_is_not_monitorings():
    assert overhead(report_of(STEPS, values={"redline_overhead_ratio": 0.9, "redline_monitoring_ratio": 0.01})) is None
    assert overhead(report_of(STEPS)) is None
