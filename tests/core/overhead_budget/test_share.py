"""What monitoring takes of a run under an overhead budget, by a clock that is set by hand."""

from __future__ import annotations

import pytest
import torch
from budgeted_runs import Clock, Costing, Keeping, Run
from hypothesis import given, settings
from hypothesis import strategies as st

import redline
from redline.own_time import OwnTime


@pytest.mark.parametrize("cost", [0.3, 5.0, 20.0])
@pytest.mark.parametrize("budget", [0.02, 0.1])
def test_the_share_comes_down_to_the_budget(cost: float, budget: float, clock: Clock) -> None:
    """A measurement at every step would take many times as much."""
    run, monitor = Run(clock), Costing(clock, cost)
    shares = []
    with run.attach(monitor, budget=budget) as session:
        for _ in range(4):
            run.steps(1000)
            shares.append(session.latest.value("redline_monitoring_ratio"))
            assert monitor.steps[0] == 0
            assert cost * len(monitor.steps) <= budget * 1000 * len(shares) + cost
    assert shares[-1] == pytest.approx(budget, rel=0.2)
    assert len(monitor.steps) > 1
    assert shares[-1] == pytest.approx(cost * len(monitor.steps) / 4000)


def test_the_share_comes_up_to_the_budget_when_measuring_becomes_dear(clock: Clock) -> None:
    run = Run(clock)
    monitor = Costing(clock, lambda step: 0.001 if step < 200 else 0.5)
    shares = []
    with run.attach(monitor, budget=0.1) as session:
        for _ in range(20):
            run.steps(200)
            shares.append(session.latest.value("redline_monitoring_ratio"))
    assert shares[0] == pytest.approx(0.001)
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(0.1, rel=0.1)
    assert monitor.steps[:200] == list(range(200)), "what it can afford, it measures"


def test_what_is_under_budget_keeps_its_schedule(clock: Clock) -> None:
    run, monitor, sink = Run(clock), Costing(clock, 0.05, 5), Keeping(clock, 0.01, 7)
    with run.attach(monitor, budget=0.1, sinks=[sink]) as session:
        run.steps(50)
    assert monitor.steps == list(range(0, 50, 5))
    assert sink.steps == list(range(0, 50, 7))
    assert session.report().put_off == {"Costing": 0}


def test_what_sinks_take_counts(clock: Clock) -> None:
    run, monitor, sink = Run(clock), Costing(clock, 0.0), Keeping(clock, 1.0)
    with run.attach(monitor, budget=0.125, sinks=[sink]):
        run.steps(20)
    assert monitor.steps == sink.steps == [0, 8, 16]


@settings(max_examples=30, deadline=None)
@given(
    budget=st.floats(0.01, 0.5),
    steps=st.lists(st.tuples(st.floats(0.01, 5), st.floats(0, 5), st.floats(0, 2)), min_size=1, max_size=25),
    every=st.tuples(st.integers(1, 3), st.integers(1, 5)),
)
def test_in_a_run_observing_takes_at_most_its_share_and_one_step(
    budget: float, steps: list[tuple[float, float, float]], every: tuple[int, int]
) -> None:
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("redline.session.OwnTime", lambda device: OwnTime(device, clock))
        run = Run(clock)
        monitor, sink = Costing(clock, lambda step: steps[step][1], every[0]), Keeping(clock, 0.0, every[1])
        with run.attach(monitor, budget=budget, sinks=[sink]):
            training = observing = dearest = 0.0
            for seconds, _, told in steps:
                sink.cost = told
                before = clock.now
                run.steps(1, seconds)
                cost = clock.now - before - seconds
                training, observing, dearest = training + seconds, observing + cost, max(dearest, cost)
                assert observing <= budget * training + dearest + 1e-9


@pytest.mark.parametrize("share", [None, 0.02])
@pytest.mark.parametrize("controllers", [[], [redline.NonFiniteGuard]], ids=["watched", "guarded"])
def test_what_time_keeps_does_not_grow_with_a_run_that_nobody_reads(share, controllers):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    made = [one() for one in controllers]
    with redline.attach(model, optimizer, monitors=[], controllers=made, overhead_budget=share) as session:
        for _ in range(200):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert len(session._time._unknown) < 20
