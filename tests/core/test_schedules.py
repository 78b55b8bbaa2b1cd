"""Schedules: callables ``step -> bool``, made from an int or taken as they are."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from redline import ConfigurationError
from redline.schedules import Every, as_schedule


def test_int_means_every_n_steps_from_the_first_on() -> None:
    due = as_schedule(3)
    assert [step for step in range(10) if due(step)] == [0, 3, 6, 9]


def test_one_means_every_step() -> None:
    assert all(map(as_schedule(1), range(5)))


def test_callable_is_a_schedule_already() -> None:
    def powers_of_two(step: int) -> bool:
        return step > 0 and step & (step - 1) == 0

    assert as_schedule(powers_of_two) is powers_of_two
    every = Every(7)
    assert as_schedule(every) is every


def test_schedule_of_an_int_can_be_pickled_and_compared() -> None:
    assert pickle.loads(pickle.dumps(as_schedule(5))) == as_schedule(5) == Every(5)
    assert as_schedule(5) != as_schedule(6)


@pytest.mark.parametrize("every", [0, -1])
def test_int_below_one_is_refused(every: int) -> None:
    with pytest.raises(ConfigurationError, match=rf"got a schedule of {every}; expected at least 1 .*leave it out"):
        as_schedule(every)


@pytest.mark.parametrize("every", [None, 2.0, "2", True, False, [1, 2]])
def test_anything_else_is_refused(every: Any) -> None:
    with pytest.raises(
        ConfigurationError, match=r"as a schedule; expected an int \(every n steps\) or a callable `step"
    ):
        as_schedule(every)
