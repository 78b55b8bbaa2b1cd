"""What a live view remembers."""

from __future__ import annotations

import pytest

from redline.integrations.watch.trail import Trail
from redline.readings import RunInfo, Series, Snapshot


def snapshot(step: int, time: float, run: str = "one", **values: float) -> Snapshot:
    given = {Series(f"redline_{name}"): value for name, value in values.items()}
    return Snapshot(step, time, RunInfo(run, "0", "f", "s", 1), given, {})


def test_figures_of_each_new_step_are_kept_once():
    trail = Trail()
    for step, r in ((0, 0.1), (0, 0.1), (10, 0.2), (10, 0.2), (20, 0.3)):
        trail.add(snapshot(step, float(step), normalized_step_size=r, loss=1 - r), 100.0)
    assert trail.step_sizes == [0.1, 0.2, 0.3]
    assert trail.losses == pytest.approx([0.9, 0.8, 0.7])


def test_speed_is_that_of_the_last_minute():
    trail = Trail()
    trail.add(snapshot(0, 0.0), 0.0)
    assert trail.steps_per_second is None
    trail.add(snapshot(100, 1000.0), 1000.0)  # slow, and long ago
    for k in range(1, 61):
        trail.add(snapshot(100 + 5 * k, 1000.0 + 2 * k), 1000.0 + 2 * k)
    assert trail.steps_per_second == pytest.approx(2.5)


def test_speed_of_steps_longer_than_a_minute():
    trail = Trail()
    trail.add(snapshot(0, 0.0), 0.0)
    trail.add(snapshot(1, 200.0), 200.0)
    assert trail.steps_per_second == pytest.approx(1 / 200)


def test_waiting_counts_from_the_last_new_step():
    trail = Trail()
    assert trail.seconds_since_step(5.0) is None
    trail.add(snapshot(3, 100.0), 150.0)  # it had stopped 50 s before anybody looked
    assert trail.seconds_since_step(160.0) == 60.0
    trail.add(snapshot(4, 165.0), 170.0)
    trail.add(snapshot(4, 165.0), 190.0)
    assert trail.seconds_since_step(200.0) == 30.0


@pytest.mark.parametrize("other", [snapshot(0, 500.0, loss=9.0), snapshot(50, 500.0, run="two", loss=9.0)])
def test_another_run_or_one_that_starts_over_begins_anew(other: Snapshot):
    trail = Trail()
    for step in (10, 20, 30):
        trail.add(snapshot(step, float(step), loss=1.0), 100.0)
    trail.add(other, 500.0)
    assert trail.losses == [9.0]
    assert trail.steps_per_second is None
    assert trail.seconds_since_step(500.0) == 0.0


def test_memory_is_bounded():
    trail = Trail()
    for step in range(5000):
        trail.add(snapshot(step, float(step), loss=float(step)), float(step))
    assert 500 < len(trail.losses) < 2000
    assert trail.losses[-1] == 4999.0
