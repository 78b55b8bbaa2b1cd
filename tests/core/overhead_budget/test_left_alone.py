"""What an overhead budget leaves alone: schedules where there is none, controllers, and the run itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from budgeted_runs import Clock, Costing, Keeping, Run, Slow
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import redline
from redline import Need
from redline.own_time import OwnTime


def test_without_a_budget_schedules_are_kept(clock: Clock) -> None:
    run, monitor, sink = Run(clock), Costing(clock, 100.0, 2), Keeping(clock, 100.0, 3)
    with run.attach(monitor, budget=None, sinks=[sink]) as session:
        run.steps(7)
    assert monitor.steps == [0, 2, 4, 6]
    assert sink.steps == [0, 3, 6]
    assert session.latest.series("redline_put_off_total") == {("Costing",): 0}


def test_controllers_are_never_put_off_and_their_time_is_not_monitoring(clock: Clock) -> None:
    controller, monitor = Slow(clock, 3.0), Costing(clock, 0.01, needs=Need.TANGENT)
    run = Run(clock, [controller])
    with run.attach(monitor, budget=0.1) as session:
        run.steps(30)
        latest = session.latest
    assert controller.asked == monitor.steps == list(range(30))
    assert latest.value("redline_monitoring_ratio") == pytest.approx(0.01)
    assert latest.value("redline_overhead_ratio") == pytest.approx(3.01)


@settings(max_examples=15, deadline=None)
@given(
    budget=st.sampled_from([None, 0.001, 0.02, 0.5]),
    costs=st.lists(st.floats(0, 5), min_size=1, max_size=7),
    every=st.integers(1, 4),
)
def test_the_run_is_the_same_with_any_budget(budget: float | None, costs: list[float], every: int) -> None:
    def run(monitored: bool) -> tuple[list[Tensor], list[int], Any]:
        clock = Clock()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("redline.session.OwnTime", lambda device: OwnTime(device, clock))
            controller = Slow(clock, 1.0)
            run = Run(clock, [controller, redline.StepClamp(0.03, max_samples=8, remember=3)], batch=64)
            monitors = [
                Costing(clock, lambda step: costs[step % len(costs)], every, Need.TANGENT),
                redline.GhostRadius(1, max_samples=8, remember=3),
                redline.WeightSpectrum(every),
                redline.StepHealth(1),
            ]
            with run.attach(*(monitors if monitored else []), budget=budget) as session:
                run.steps(12)
            return run.parameters, controller.asked, session.interventions

    (parameters, asked, did), (alone, asked_alone, did_alone) = run(True), run(False)
    assert all(torch.equal(one, other) for one, other in zip(parameters, alone, strict=True))
    assert (asked, did) == (asked_alone, did_alone)
