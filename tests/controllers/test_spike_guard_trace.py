"""SpikeGuard: what it tells of its decisions."""

from __future__ import annotations

import math

import pytest
from spike_guard_runs import Run

import redline
from redline import RunStoppedError

COUNTER = "redline_interventions_total"


def test_every_decision_is_told_in_words_and_numbers_and_counted() -> None:
    guarded = Run(controllers=[redline.SpikeGuard(max_roll_backs=1, every=10)])
    assert guarded.session.latest.series(COUNTER) == {
        ("SpikeGuard", action): 0.0 for action in ("scale", "decay", "withhold", "reject", "rollback", "stop")
    }
    for index in range(16):
        guarded.step(shown=1.0 + 0.1 * (-1) ** index)
    for loss in (9.0, 9.0, math.nan):
        if math.isnan(loss):
            with pytest.raises(RunStoppedError, match="the loss jumped to nan from 1, and 1 roll-backs did not help"):
                guarded.step(shown=loss)
        else:
            guarded.step(shown=loss)
    first, second, third = guarded.session.interventions
    assert {one.controller for one in (first, second, third)} == {"SpikeGuard"}
    assert [(one.step, one.action) for one in (first, second, third)] == [
        (16, "withhold"),
        (17, "rollback"),
        (18, "stop"),
    ]
    assert first.reason == "the loss jumped to 9 from 1: the step was withheld."
    assert second.reason == "the loss jumped to 9 from 1 and stayed: the run was rolled back to step 10."
    for one in (first, second):
        assert one.saw == pytest.approx({"loss": 9.0, "median": 1.0, "z": 8.0 / (1.4826 * 0.1)})
    assert math.isnan(third.saw["loss"])
    counted = guarded.session.latest.series(COUNTER)
    assert {action: count for (_, action), count in counted.items() if count} == {
        "withhold": 1,
        "rollback": 1,
        "stop": 1,
    }
    tallies = guarded.session.report().interventions
    assert [(one.action, one.count, one.first_step) for one in tallies] == [
        ("withhold", 1, 16),
        ("rollback", 1, 17),
        ("stop", 1, 18),
    ]


def test_of_a_jump_before_there_is_a_median_the_loss_alone_is_told() -> None:
    guarded = Run(controllers=[redline.SpikeGuard()])
    guarded.step(shown=math.inf)
    (one,) = guarded.session.interventions
    assert one.reason == "the loss jumped to inf: the step was withheld."
    assert one.saw == {"loss": math.inf}
