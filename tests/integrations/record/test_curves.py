"""Thinned curves: bounded, even, and no spike is lost."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from redline import Series
from redline.integrations.record.curves import MOST_BUCKETS, Curve, Curves

SERIES = Series("redline_loss")


def points(values: list[float], **bounds: int) -> list[tuple[int, float]]:
    curves = Curves(**bounds)
    for step, value in enumerate(values):
        curves.add(SERIES, step, value)
    return curves[SERIES].points()


@pytest.mark.parametrize("count", [0, 1, 2, 100, MOST_BUCKETS])
def test_a_short_series_is_kept_whole(count: int):
    values = [random.Random(step).random() for step in range(count)]
    if count:
        assert points(values) == list(enumerate(values))
    else:
        assert Curve().points() == []


@pytest.mark.parametrize("count", [MOST_BUCKETS + 1, 10_000, 100_001])
def test_a_long_series_is_shown_by_2000_to_4000_points_spread_evenly(count: int):
    kept = points([random.Random(step).random() for step in range(count)])
    assert 2_000 <= len(kept) <= 4_100
    steps = [step for step, _ in kept]
    assert steps == sorted(set(steps))
    gaps = [after - before for before, after in itertools.pairwise(steps)]
    assert max(gaps) <= 4 * math.ceil(count / MOST_BUCKETS)


@pytest.mark.parametrize("seed", range(5))
def test_spikes_survive_with_their_steps(seed: int):
    draw = random.Random(seed)
    values = [draw.random() for _ in range(50_000)]
    high, low = draw.sample(range(50_000), 2)
    values[high], values[low] = 100.0, -100.0
    kept = dict(points(values))
    assert kept[high] == 100.0
    assert kept[low] == -100.0
    assert all(kept[step] == values[step] for step in kept)
    assert 49_999 in kept, "the last value stands"


def test_what_was_not_finite_leaves_a_gap():
    values = [1.0] * 20_000
    values[7_777] = math.nan
    values[15_000] = math.inf
    kept = points(values)
    assert sorted(step for step, value in kept if math.isnan(value)) == [7_777, 15_000]
    assert all(math.isnan(value) for _, value in points([math.nan] * 5_000))


@pytest.mark.parametrize(("most", "count"), [(8, 9), (8, 100), (8, 101), (7, 50)])
def test_thinning_is_as_if_it_had_been_known_from_the_start(most: int, count: int):
    """Against buckets of equal size, made at the end."""
    values = [random.Random(step).random() for step in range(count)]
    stride = 1
    while math.ceil(count / stride) > most:
        stride *= 2
    expected: dict[int, float] = {count - 1: values[-1]}
    for at in range(0, count, stride):
        steps = range(at, min(at + stride, count))
        for pick in (min, max):
            step = pick(steps, key=lambda step: values[step])
            expected[step] = values[step]
    assert dict(points(values, most=most)) == expected


def test_many_series_together_are_bounded():
    curves = Curves(most=64, in_all=1_000)
    for step in range(200):
        for layer in range(50):
            curves.add(Series("redline_weight_spectral_norm", (str(layer),)), step, float(step == layer))
    assert sum(len(curve) for curve in curves.values()) <= 1_000
    assert all(max(value for _, value in curve.points()) == 1.0 for curve in curves.values())
