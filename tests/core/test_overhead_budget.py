"""The overhead budget, by a clock that is set by hand: what monitoring takes, what is put off, what is left alone."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import redline
from redline import ConfigurationError, Need, Readings, Scale, Snapshot, Step
from redline.overhead_budget import OverheadBudget
from redline.own_time import OwnTime

# The account ----------------------------------------------------------------------------------------------


def test_without_a_share_there_is_never_any_debt() -> None:
    budget = OverheadBudget(None)
    budget.settle(1.0, 1e9)
    assert not budget.in_debt


def test_it_opens_out_of_debt_and_comes_out_of_it_by_training() -> None:
    budget = OverheadBudget(0.1)
    assert not budget.in_debt
    budget.settle(10, 2)
    assert budget.in_debt
    budget.settle(19.9, 2)
    assert budget.in_debt
    budget.settle(20.1, 2)
    assert not budget.in_debt


def test_a_long_quiet_time_buys_no_burst() -> None:
    budget = OverheadBudget(0.1)
    budget.settle(0, 5)
    budget.settle(1_000_000, 5)
    measured = 0
    for step in range(1, 50):
        if not budget.in_debt:
            measured += 1
        budget.settle(1_000_000, 5 + 5 * measured)
        assert measured <= 2, step


times = st.floats(0, 10, allow_nan=False)


@settings(max_examples=200, deadline=None)
@given(
    st.floats(0.001, 0.999),
    st.lists(st.tuples(times, times, st.booleans()), min_size=1, max_size=60),
)
def test_observing_takes_at_most_its_share_and_one_step(share: float, steps: list[tuple[float, float, bool]]) -> None:
    budget = OverheadBudget(share)
    training = observing = dearest = 0.0
    for trains, cost, due in steps:
        training += trains
        if due and not budget.in_debt:
            observing, dearest = observing + cost, max(dearest, cost)
        budget.settle(training, observing)
        assert observing <= share * training + dearest + 1e-9 * (1 + observing)


# A run by the clock ----------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Costing(redline.Monitor):
    """Takes its time, and draws a tangent where it is told to need one."""

    def __init__(
        self,
        clock: Clock,
        cost: float | Callable[[int], float],
        every: int | Callable[[int], bool] = 1,
        needs: Need = Need.NOTHING,
    ) -> None:
        super().__init__(every)
        self.clock, self.cost, self.needs = clock, cost, needs
        self.steps: list[int] = []

    def measure(self, step: Step, readings: Readings) -> None:
        self.steps.append(step.index)
        if Need.TANGENT in self.needs:
            assert step.tangent(None) is not None
        self.clock.now += self.cost(step.index) if callable(self.cost) else self.cost


class Rare(Costing):
    """Another, with a name of its own."""


class Keeping(redline.Sink):
    def __init__(self, clock: Clock, cost: float = 0.0, every: int | Callable[[int], bool] = 1) -> None:
        super().__init__(every)
        self.clock, self.cost = clock, cost
        self.snapshots: list[Snapshot] = []

    def emit(self, snapshot: Snapshot) -> None:
        self.clock.now += self.cost
        self.snapshots.append(snapshot)

    @property
    def steps(self) -> list[int]:
        return [snapshot.step for snapshot in self.snapshots]


class Slow(redline.Controller):
    """Takes long to decide, and holds every step."""

    needs = Need.TANGENT

    def __init__(self, clock: Clock, cost: float) -> None:
        self.clock, self.cost = clock, cost
        self.asked: list[int] = []

    def inspect(self, step: Step) -> Iterable[Scale]:
        self.clock.now += self.cost
        self.asked.append(step.index)
        tangent = step.tangent(None)
        assert tangent is not None
        return [Scale(1 / (1 + tangent.normalized_step_size), "as told.")]


class Run:
    """A step of training takes 1 second."""

    def __init__(self, clock: Clock, controllers: Sequence[redline.Controller] = (), batch: int = 5) -> None:
        torch.manual_seed(0)
        self.clock, self.controllers, self.batch = clock, controllers, batch
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.5)

    def attach(self, *monitors: redline.Monitor, budget: float | None, **more: Any) -> redline.Session:
        return redline.attach(
            self.model,
            self.optimizer,
            monitors=monitors,
            controllers=self.controllers,
            overhead_budget=budget,
            run="run",
            **more,
        )

    def steps(self, count: int, seconds: float = 1.0) -> None:
        for seed in range(count):
            x = torch.randn(self.batch, 3, generator=torch.Generator().manual_seed(seed))
            loss = nn.functional.cross_entropy(self.model(x), torch.arange(self.batch) % 3)
            self.clock.now += seconds
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    @property
    def parameters(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """By which every session times itself."""
    clock = Clock()
    monkeypatch.setattr("redline.session.OwnTime", lambda device: OwnTime(device, clock))
    return clock


def test_without_a_budget_schedules_are_kept(clock: Clock) -> None:
    run, monitor, sink = Run(clock), Costing(clock, 100.0, 2), Keeping(clock, 100.0, 3)
    with run.attach(monitor, budget=None, sinks=[sink]) as session:
        run.steps(7)
    assert monitor.steps == [0, 2, 4, 6]
    assert sink.steps == [0, 3, 6]
    assert session.latest.series("redline_put_off_total") == {("Costing",): 0}


def test_the_budget_is_a_reading_from_the_start_and_absent_without_one(clock: Clock) -> None:
    sink = Keeping(clock)
    with Run(clock).attach(budget=0.125, sinks=[sink]) as given:
        assert given.latest.value("redline_overhead_budget_ratio") == 0.125
        state = given.state_dict()
    with Run(clock).attach(budget=None) as without:
        assert "redline_overhead_budget_ratio" not in without.latest
        without.load_state_dict(state)
        assert "redline_overhead_budget_ratio" not in without.latest
    run = Run(clock)
    with run.attach(budget=0.25, sinks=[sink]) as resumed:
        resumed.load_state_dict(state)  # the budget is the session's own
        run.steps(2)
        assert resumed.latest.value("redline_overhead_budget_ratio") == 0.25
    assert [snapshot.value("redline_overhead_budget_ratio") for snapshot in sink.snapshots] == [0.25, 0.25]


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


def test_what_is_put_off_happens_once_and_at_the_first_step_out_of_debt(clock: Clock) -> None:
    run = Run(clock)
    often, rare, sink = Costing(clock, 1.0), Rare(clock, 0.0, lambda step: step == 3), Keeping(clock, 0.0, 3)
    with run.attach(often, rare, budget=0.125, sinks=[sink]) as session:
        run.steps(40)
    assert often.steps == [0, 8, 16, 24, 32], "a second is paid back by eight steps"
    assert rare.steps == [8], "it fell due once, at step 3, and is made up for once"
    assert sink.steps == [0, 8, 16, 24, 32], "it fell due at 3 and at 6"
    latest = session.latest
    assert latest.value("redline_put_off_total", monitor="Rare") == 1
    assert latest.value("redline_put_off_total", monitor="Costing") == 35
    assert latest.value("redline_measurements_total", monitor="Costing") == 5
    assert [snapshot.value("redline_put_off_total", monitor="Costing") for snapshot in sink.snapshots[:2]] == [0, 7]


def test_the_first_step_measures_and_shows_all_that_is_due(clock: Clock) -> None:
    run = Run(clock)
    monitors, sinks = [Costing(clock, 50.0), Rare(clock, 70.0)], [Keeping(clock, 90.0), Keeping(clock, 90.0)]
    with run.attach(*monitors, budget=0.01, sinks=sinks):
        run.steps(5)
    assert [one.steps for one in (*monitors, *sinks)] == [[0]] * 4


def test_what_sinks_take_counts(clock: Clock) -> None:
    run, monitor, sink = Run(clock), Costing(clock, 0.0), Keeping(clock, 1.0)
    with run.attach(monitor, budget=0.125, sinks=[sink]):
        run.steps(20)
    assert monitor.steps == sink.steps == [0, 8, 16]


def test_each_schedule_is_asked_once_a_step(clock: Clock) -> None:
    asked: dict[str, list[int]] = {"monitor": [], "sink": []}

    def schedule(whose: str) -> Callable[[int], bool]:
        return lambda step: asked[whose].append(step) or True  # type: ignore[func-returns-value]

    run = Run(clock)
    monitor = Costing(clock, 2.0, schedule("monitor"), Need.TANGENT)
    with run.attach(monitor, budget=0.1, sinks=[Keeping(clock, 1.0, schedule("sink"))]):
        run.steps(12)
    assert asked == {"monitor": list(range(13)), "sink": list(range(13))}


def test_inputs_are_kept_for_steps_that_measure_and_for_no_others(clock: Clock) -> None:
    run = Run(clock)
    monitor = Costing(clock, 1.0, needs=Need.TANGENT)
    armed = []
    run.optimizer.register_step_pre_hook(lambda *_: armed.append(session._capture.armed))
    with run.attach(monitor, budget=0.125) as session:
        run.steps(20)
    assert [step for step, kept in enumerate(armed) if kept] == monitor.steps == [0, 8, 16]


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


# What is said of it ----------------------------------------------------------------------------------------


def test_the_report_says_what_was_allowed_and_what_was_put_off(clock: Clock) -> None:
    from rich.console import Console

    controller = Slow(clock, 0.5)
    run, monitor = Run(clock, [controller]), Costing(clock, 1.0)
    with run.attach(monitor, budget=0.125) as session:
        run.steps(16)
    report = session.report()
    assert (report.overhead_ratio, report.monitoring_ratio) == (0.5 + 2 / 16, 2 / 16)
    assert report.overhead_budget == 0.125
    assert report.put_off == {"Costing": 14}
    assert {"overhead_ratio", "monitoring_ratio", "overhead_budget", "put_off"} <= report.to_dict().keys()
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report)
    text = " ".join(console.export_text().split())
    assert "62.5% of training time was spent in Redline; 12.5% on monitoring, of 12.5% allowed" in text
    assert "put off Costing ×14" in text


def test_without_a_budget_the_report_speaks_of_none(clock: Clock) -> None:
    from rich.console import Console

    run = Run(clock)
    with run.attach(Costing(clock, 1.0), budget=None) as session:
        run.steps(16)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(session.report())
    text = console.export_text()
    assert session.report().overhead_budget is None
    assert "100.0% on monitoring" in text
    assert "allowed" not in text
    assert "put off" not in text


def test_counters_come_back_and_the_account_starts_anew(clock: Clock) -> None:
    run, often, rare = Run(clock), Costing(clock, 1.0), Rare(clock, 0.0, lambda step: step == 3)
    with run.attach(often, rare, budget=0.01) as session:
        run.steps(6)
        state = session.state_dict()
    assert (often.steps, rare.steps) == ([0], [])
    with run.attach(often, rare, budget=0.01) as resumed:
        resumed.load_state_dict(state)
        assert resumed.latest.value("redline_put_off_total", monitor="Costing") == 5
        run.steps(3)
        assert often.steps == [0, 6]
        assert rare.steps == [6], "what was put off is not lost"
        assert resumed.latest.value("redline_put_off_total", monitor="Costing") == 7
        assert resumed.latest.value("redline_put_off_total", monitor="Rare") == 1


def test_what_is_to_be_made_up_for_at_the_next_step_survives_a_state(clock: Clock) -> None:
    run, often, rare = Run(clock), Costing(clock, 1.0), Rare(clock, 0.0, lambda step: step == 3)
    with run.attach(often, rare, budget=0.125) as session:
        run.steps(8)
        assert rare.steps == []
        state = session.state_dict()
    with run.attach(often, rare, budget=0.125) as resumed:
        resumed.load_state_dict(state)
        run.steps(2)
    assert rare.steps == [8]


def test_a_step_that_is_given_up_is_planned_and_counted_once(clock: Clock) -> None:
    run, monitor = Run(clock), Costing(clock, 1.0)
    with run.attach(monitor, budget=0.1) as session:
        run.steps(1)
        fails = run.optimizer.register_step_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run.steps(1)
        fails.remove()
        run.steps(1)
    assert session.latest.value("redline_put_off_total", monitor="Costing") == 1


# Refusals --------------------------------------------------------------------------------------------------

NONE = [0, 0.0, -0.1, 1, 1.0, 2, math.nan, math.inf, -math.inf, True, False, "0.02", [0.02]]


@pytest.mark.parametrize("budget", NONE)
def test_a_budget_that_is_no_share_is_refused(budget: Any, clock: Clock) -> None:
    hooks = Run(clock)
    with pytest.raises(ConfigurationError, match=r"got overhead_budget=.*; expected a share of training time above 0"):
        hooks.attach(budget=budget)


@pytest.mark.parametrize("budget", NONE)
def test_the_callback_refuses_it_when_it_is_made(budget: Any) -> None:
    pytest.importorskip("lightning")
    from redline.integrations.lightning import RedlineCallback

    with pytest.raises(ConfigurationError, match=r"such as 0\.02\. Leave it out to measure whenever it is due"):
        RedlineCallback(overhead_budget=budget)


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
