"""What happened since a sink's last snapshot: all of it, once, whatever the sink's schedule and the others'."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from recorded_runs import RecordedRun
from runs import HostReads
from sinks import Keep

from redline import Series, Snapshot
from redline.margins import StepMargins, fragile_samples
from redline.trail import Trail

LOSS, R = Series("redline_loss"), Series("redline_normalized_step_size")


class Keeping(Keep):
    """Keeps its last snapshot too, if it asks for it."""

    def __init__(self, every: Any = 1) -> None:
        super().__init__(every)
        self.last: list[Snapshot] = []

    def finish(self, snapshot: Snapshot) -> None:
        self.last.append(snapshot)

    def steps_of(self, series: Series) -> list[int]:
        everything = [*self.snapshots, *self.last]
        return [one.step for snapshot in everything for one in snapshot.since.measurements if one.series == series]


@pytest.fixture
def run() -> RecordedRun:
    return RecordedRun()


def test_every_tracked_value_reaches_every_sink_once(run: RecordedRun):
    sinks = [Keeping(1), Keeping(7), Keeping(lambda step: False)]
    with run.attach(*sinks):
        run.steps(0, 40)
    for sink in sinks:
        assert sink.steps_of(LOSS) == list(range(40))
        assert sink.steps_of(R) == list(range(0, 40, 2))
    assert [snapshot.step for snapshot in sinks[1].snapshots] == [0, 7, 14, 21, 28, 35]


def test_what_is_told_are_the_values_measured(run: RecordedRun):
    sink = Keeping(5)
    losses = []
    with run.attach(sink):
        for step in range(20):
            run.steps(step, step + 1)
            losses.append(run.session.latest.value("redline_loss"))
    told = [
        one.value
        for snapshot in (*sink.snapshots, *sink.last)
        for one in snapshot.since.measurements
        if one.series == LOSS
    ]
    assert told == losses


def test_interventions_and_samples_reach_every_sink_once(run: RecordedRun):
    sinks = [Keeping(1), Keeping(9)]
    with run.attach(*sinks) as session:
        run.steps(0, 40)
    assert session.interventions, "the run is clamped"
    for sink in sinks:
        everything = [*sink.snapshots, *sink.last]
        assert tuple(one for snapshot in everything for one in snapshot.since.interventions) == session.interventions
        steps = [one.step for snapshot in everything for one in snapshot.since.samples]
        assert sorted(set(steps)) == list(range(40)), "the clamp measures each step"
        assert len(steps) == 5 * 40


def test_the_samples_are_the_most_fragile_of_the_margins(run: RecordedRun):
    sink = Keeping(1)
    with run.attach(sink) as session:
        for step in range(6):
            run.steps(step, step + 1)
            expected = session.margins.most_fragile(5)
            told = sink.snapshots[-1].since.samples
            assert [one.sample for one in told] == [one.sample for one in expected]
            assert [one.r for one in told] == pytest.approx([one.r for one in expected])


@pytest.mark.parametrize(
    ("r", "exact"),
    [
        ([0.1, 2.0, 0.5, 1.5], None),
        ([0.1, float("nan"), 0.5, 1.5], None),
        ([0.9, 2.0, 0.5, 3.0], [0.8, float("nan"), 0.4, float("nan")]),
        ([float("inf"), 2.0, 0.5, 3.0], [float("nan"), 1.0, float("nan"), 2.0]),
    ],
)
def test_leading_samples_come_in_the_order_of_the_margins(r: list[float], exact: list[float] | None):
    margins = StepMargins(
        3, torch.tensor([4, -1, 2, 9]), torch.tensor(r), None if exact is None else torch.tensor(exact)
    )
    told = fragile_samples(3, margins.leading(3).double().reshape(-1).tolist())
    known = [math.nan] * 4 if exact is None else exact
    # First what is NaN or known exactly, and of these what is NaN or largest.
    sizes = [(math.isnan(a) or not math.isnan(b), math.inf if math.isnan(a) else a if math.isnan(b) else b)
             for a, b in zip(r, known, strict=True)]  # fmt: skip
    order = sorted(range(4), key=lambda place: sizes[place], reverse=True)[:3]
    assert [one.sample for one in told] == [[4, None, 2, 9][place] for place in order]
    assert [str(one.r) for one in told] == [str(torch.tensor(r[place]).item()) for place in order]
    assert [str(one.exact_r) for one in told] == [
        "None" if math.isnan(known[place]) else str(torch.tensor(known[place]).item()) for place in order
    ]


def test_choosing_the_samples_makes_nobody_wait():
    margins = StepMargins(
        3, torch.arange(40), torch.rand(40), torch.rand(40).masked_fill(torch.arange(40) < 9, torch.nan)
    )
    with HostReads() as reads:
        margins.leading()
    assert reads.seen == []


def test_a_session_without_sinks_keeps_nothing(run: RecordedRun):
    with run.attach() as session:
        run.steps(0, 20)
        delivery = session._delivery
        assert delivery._measurements.since(0) == ()
        assert delivery._margins == []


def test_nothing_is_kept_that_all_have_seen(run: RecordedRun):
    with run.attach(Keeping(1), Keeping(4)) as session:
        run.steps(0, 21)  # both have just been due
        assert session._delivery._measurements.since(0) == ()
        run.steps(21, 23)
        assert [one.step for one in session._delivery._measurements.since(0) if one.series == LOSS] == [21, 22]


def test_a_resumed_session_says_where_it_began(run: RecordedRun):
    with run.attach() as session:
        run.steps(0, 10)
        state = session.state_dict()
    sink = Keeping(1)
    with run.attach(sink) as session:
        session.load_state_dict(state)
        run.steps(10, 12)
    assert [snapshot.first_step for snapshot in sink.snapshots] == [10, 10]
    assert sink.steps_of(LOSS) == [10, 11]
    assert all(one.step >= 10 for snapshot in sink.snapshots for one in snapshot.since.interventions)


def test_what_came_before_another_state_was_loaded_is_none_of_its_run(run: RecordedRun):
    with run.attach() as session:
        run.steps(0, 10)
        state = session.state_dict()
    sink = Keeping(lambda step: step == 11)
    with run.attach(sink) as session:
        run.steps(0, 3)
        session.load_state_dict(state)
        run.steps(10, 12)
    assert sink.steps_of(LOSS) == [10, 11]
    assert {one.step for one in sink.snapshots[0].since.interventions} <= {10, 11}
    assert {one.step for one in sink.snapshots[0].since.samples} == {10, 11}


def test_a_trail_keeps_so_many_and_counts_all():
    trail: Trail[int] = Trail(4)
    trail.extend(range(10))
    assert trail.total == 10
    assert trail.since(8) == (8, 9)
    assert trail.since(0) == (6, 7, 8, 9)
    assert trail.since(10) == ()
    trail.forget(8)
    assert trail.since(0) == (8, 9)
    trail.forget(3)
    assert trail.since(0) == (8, 9)
