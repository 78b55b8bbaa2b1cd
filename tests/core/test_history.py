"""The history a report is made of: bounded, exact where it counts, and not confused by NaN."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from itertools import pairwise

import pytest

from redline.history import RunHistory
from redline.readings import Series

R = "redline_normalized_step_size"
WEIGHT = "redline_weight_spectral_norm"
RATIO = "redline_update_to_weight_ratio"
NAN, INF = math.nan, math.inf


def history_of(values: Iterable[float], metric: str = R, labels: tuple[str, ...] = ()) -> RunHistory:
    history = RunHistory()
    for step, value in enumerate(values):
        history.record(Series(metric, labels), step, value)
    return history


# First, last, highest ------------------------------------------------------------------------------------------------


def test_a_course_keeps_first_last_and_highest_with_its_step():
    history = RunHistory()
    for step, value in ((10, 2.0), (20, 5.0), (30, 3.0)):
        history.record(Series(WEIGHT, ("a",)), step, value)
    course = history.layers(WEIGHT)["a"]
    assert (course.first, course.last, course.highest, course.highest_step) == (2.0, 3.0, 5.0, 20)


def test_of_equal_maxima_the_first_one_is_named():
    course = history_of([1.0, 4.0, 4.0, 2.0]).course(R)
    assert course is not None
    assert (course.highest, course.highest_step) == (4.0, 1)


def test_the_highest_of_values_below_zero_is_not_zero():
    course = history_of([-3.0, -1.0, -2.0]).course(R)
    assert course is not None
    assert (course.highest, course.highest_step) == (-1.0, 1)


def test_layers_and_metrics_are_kept_apart():
    history = RunHistory()
    history.record(Series(WEIGHT, ("a",)), 0, 1.0)
    history.record(Series(WEIGHT, ("b",)), 0, 2.0)
    history.record(Series(RATIO, ("a",)), 0, 3.0)
    assert {name: course.last for name, course in history.layers(WEIGHT).items()} == {"a": 1.0, "b": 2.0}
    assert {name: course.last for name, course in history.layers(RATIO).items()} == {"a": 3.0}


def test_what_was_never_recorded_has_no_course():
    history = RunHistory()
    assert history.course(R) is None
    assert history.layers(WEIGHT) == {}
    assert history.step_sizes == []


# Bounded -------------------------------------------------------------------------------------------------------------


def test_every_step_size_is_kept_in_order_while_there_are_few():
    values = [0.001 * step for step in range(2000)]
    assert history_of(values).step_sizes == list(enumerate(values))


def test_other_metrics_are_no_step_sizes():
    assert history_of([1.0, 2.0], metric="redline_committed_step_size").step_sizes == []


@pytest.fixture(scope="module")
def long_history() -> RunHistory:
    """Of 100,000 steps, with its highest value at a step that any regular thinning drops."""
    return history_of(7.5 if step == 77_777 else 0.1 + 1e-6 * step for step in range(100_000))


def test_memory_is_bounded(long_history: RunHistory):
    assert 1000 < len(long_history.step_sizes) <= 8192
    assert len(json.dumps(long_history.state_dict())) < 1_000_000


def test_the_maximum_survives_thinning(long_history: RunHistory):
    course = long_history.course(R)
    assert course is not None
    assert (course.highest, course.highest_step) == (7.5, 77_777)
    assert course.first == pytest.approx(0.1)
    assert course.last == pytest.approx(0.199999)


def test_what_thinning_leaves_is_evenly_spread_over_the_run(long_history: RunHistory):
    steps = [step for step, _ in long_history.step_sizes]
    gaps = {later - earlier for earlier, later in pairwise(steps)}
    assert len(gaps) == 1
    assert steps[0] == 0
    assert steps[-1] > 99_900


def test_radii_that_bind_are_kept_step_by_step_and_bounded():
    history = RunHistory()
    for step in range(0, 300_000, 10):
        for radius, value in (("output", 0.1), ("attention", 1e-6 * step)):
            history.record(Series("redline_binding_step_size", (radius,)), step, value)
        if step == 90:
            assert history.binding == [(at, {"output": 0.1, "attention": 1e-6 * at}) for at in range(0, 100, 10)]
    steps = [step for step, _ in history.binding]
    assert 1000 < len(steps) <= 8192
    assert len({later - earlier for earlier, later in pairwise(steps)}) == 1
    assert steps[-1] > 299_900
    assert all(sizes == {"output": 0.1, "attention": 1e-6 * step} for step, sizes in history.binding)
    resumed = RunHistory()
    resumed.load_state_dict(json.loads(json.dumps(history.state_dict())))
    for one in (history, resumed):
        for step in range(300_000, 300_200, 10):
            one.record(Series("redline_binding_step_size", ("output",)), step, 0.2)
    assert resumed.binding == history.binding


def test_steps_over_the_redline_and_losses_are_kept_and_bounded():
    history = RunHistory()
    for step in range(100_000):
        history.record(Series(R), step, 2.0 if step % 10 == 7 else 0.999)
        history.record(Series("redline_loss"), step, 1e-5 * step)
    over, losses = history.long_steps, history.losses
    assert 512 < len(over) <= 1024
    assert {step % 10 for step, _ in over} == {7}
    assert {value for _, value in over} == {2.0}
    assert 4096 < len(losses) <= 8192
    for pairs in (over, losses):
        assert len({later[0] - earlier[0] for earlier, later in pairwise(pairs)}) == 1
        assert pairs[-1][0] > 99_000
    assert all(value == pytest.approx(1e-5 * step) for step, value in losses)


def test_a_step_over_the_redline_that_thinning_drops_is_still_known():
    history = history_of(1.0 if step == 33_333 else 0.1 for step in range(100_000))
    assert history.long_steps == [(33_333, 1.0)]
    assert history_of([0.99, NAN, INF, -1.0]).long_steps == []


# Not finite ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "highest", "highest_step"),
    [
        ([0.1, NAN, 0.3], 0.3, 2),
        ([0.3, NAN, 0.1], 0.3, 0),
        ([NAN, 0.2, 0.1], 0.2, 1),
        ([NAN, NAN, 0.2], 0.2, 2),
        ([0.2, INF, 0.3], 0.3, 2),
        ([INF, 0.2, 0.3], 0.3, 2),
        ([-INF, -2.0, -3.0], -2.0, 1),
    ],
)
def test_a_value_that_is_not_finite_is_never_the_highest(values: list[float], highest: float, highest_step: int):
    course = history_of(values).course(R)
    assert course is not None
    assert (course.highest, course.highest_step) == (highest, highest_step)


@pytest.mark.parametrize(
    ("values", "step"), [([0.1, 0.2], None), ([NAN, 0.2], 0), ([0.1, INF, NAN], 1), ([0.1, -INF], 1)]
)
def test_the_first_step_at_which_a_value_was_not_finite_is_kept(values: list[float], step: int | None):
    course = history_of(values).course(R)
    assert course is not None
    assert course.first_nonfinite == step


def test_a_nan_does_not_vanish():
    history = history_of([0.1, NAN])
    course = history.course(R)
    assert course is not None
    assert math.isnan(course.last)
    assert [math.isnan(value) for _, value in history.step_sizes] == [False, True]


# State ---------------------------------------------------------------------------------------------------------------


def test_state_is_plain_data():
    history = history_of([0.1, 0.2])
    history.record(Series(WEIGHT, ("a",)), 0, 1.0)
    assert json.loads(json.dumps(history.state_dict())) == history.state_dict()


@pytest.mark.parametrize("split", [0, 1, 3000, 8192, 8193, 12_001])
def test_a_history_that_was_saved_and_loaded_goes_on_as_if_it_had_not_been(split: int):
    values = [0.1 + math.sin(step) * 0.05 for step in range(20_000)]
    whole, before, after = history_of(values), history_of(values[:split]), RunHistory()
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    for step, value in enumerate(values[split:], start=split):
        after.record(Series(R), step, value)
    assert after.step_sizes == whole.step_sizes
    assert after.long_steps == whole.long_steps
    assert after.course(R) == whole.course(R)


@pytest.mark.parametrize("split", [0, 1, 5000, 8193])
def test_losses_and_long_steps_go_on_after_loading(split: int):
    values = [1.0 + 0.05 * math.sin(step) for step in range(20_000)]
    for metric in (R, "redline_loss"):
        whole, before, after = history_of(values, metric), history_of(values[:split], metric), RunHistory()
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        for step, value in enumerate(values[split:], start=split):
            after.record(Series(metric), step, value)
        assert (after.losses, after.long_steps) == (whole.losses, whole.long_steps)


def test_loading_replaces_what_was_there():
    saved = history_of([0.1, 0.2])
    history = history_of([5.0, 6.0, 7.0])
    history.record(Series(WEIGHT, ("gone",)), 0, 1.0)
    history.load_state_dict(saved.state_dict())
    assert history.layers(WEIGHT) == {}
    assert history.step_sizes == saved.step_sizes
    course = history.course(R)
    assert course is not None
    assert course.highest == 0.2


def test_a_saved_state_does_not_change_with_the_history_it_was_taken_of():
    history = history_of([0.1, 0.2])
    state = history.state_dict()
    kept = json.dumps(state)
    history.record(Series(R), 2, 9.0)
    assert json.dumps(state) == kept
