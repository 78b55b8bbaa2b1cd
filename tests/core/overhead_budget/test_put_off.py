"""What an overhead budget puts off, when that is made up for, and what comes back of it from a state."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from budgeted_runs import Clock, Costing, Keeping, Rare, Run

from redline import Need


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
