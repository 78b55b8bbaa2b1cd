"""The account of an overhead budget: in debt while observing has taken more than its share of training."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from redline.overhead_budget import OverheadBudget


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
