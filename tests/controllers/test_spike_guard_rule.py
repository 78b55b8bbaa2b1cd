"""SpikeGuard: what is a jump, by numpy, and limits that cannot work."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spike_guard_runs import Run

import redline
from redline import ConfigurationError
from redline.step import StepStart


def shown(guard: redline.SpikeGuard, index: int, loss: float) -> Any:
    return guard.before_update(SimpleNamespace(index=index, start=StepStart(loss, None, False)))  # type: ignore[arg-type]


class Reference:
    """The rule, by numpy, with the window as a plain list."""

    def __init__(self, threshold: float, min_jump: float, window: int, patience: int, most: int, every: int) -> None:
        self.threshold, self.min_jump, self.window = threshold, min_jump, window
        self.patience, self.most, self.every = patience, most, every
        self.good: list[float] = []
        self.in_a_row, self.kept_at = 0, -math.inf

    def numbers(self, loss: float) -> dict[str, float]:
        last = np.array(self.good[-self.window :])
        if len(last) < 16:
            return {}
        median = float(np.median(last))
        mad = float(np.median(np.abs(last - median)))
        with np.errstate(divide="ignore", invalid="ignore"):
            return {"median": median, "z": float(np.float64(loss - median) / (1.4826 * mad))}

    def answer(self, index: int, loss: float) -> str:
        seen = self.numbers(loss)
        is_jump = not np.isfinite(loss) or bool(
            seen and loss - seen["median"] > self.min_jump and seen["z"] > self.threshold
        )
        if not is_jump:
            self.good.append(loss)
            self.in_a_row = 0
            if index >= self.kept_at + self.every:
                self.kept_at = index
                return "Keep"
            return "None"
        self.in_a_row += 1
        if self.in_a_row <= self.patience:
            return "Withhold"
        if self.in_a_row <= self.patience + self.most:
            return "RollBack" if self.kept_at >= 0 else "Withhold"
        self.in_a_row = 0
        if not np.isfinite(loss):
            return "Stop"
        self.good = [loss]
        return "Withhold"


LOSSES = st.lists(
    st.one_of(
        *[st.floats(0, 2, width=32)] * 6,
        *[st.sampled_from([0.5, 1.0, 1.0, 1.25])] * 3,
        st.floats(-1, 60, width=32),
        st.lists(st.sampled_from([math.nan, math.inf, -math.inf, 40.0, 41.0]), min_size=1, max_size=7),
    ),
    min_size=30,
    max_size=90,
).map(lambda parts: [loss for part in parts for loss in (part if isinstance(part, list) else [part])])


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    losses=LOSSES,
    threshold=st.sampled_from([0.0, 3.0, 8.0]),
    min_jump=st.sampled_from([0.0, 0.5, 4.0]),
    window=st.integers(16, 40),
    patience=st.integers(0, 2),
    most=st.integers(1, 3),
    every=st.integers(1, 30),
)
def test_jumps_and_answers_are_those_of_numpy(
    losses: list[float], threshold: float, min_jump: float, window: int, patience: int, most: int, every: int
) -> None:
    guard = redline.SpikeGuard(
        threshold=threshold, min_jump=min_jump, window=window, patience=patience, max_roll_backs=most, every=every
    )
    reference = Reference(threshold, min_jump, window, patience, most, every)
    for index, loss in enumerate(losses):
        numbers = reference.numbers(loss)
        answer = shown(guard, index, loss)
        assert type(answer).__name__.replace("NoneType", "None") == reference.answer(index, loss), (index, loss)
        if hasattr(answer, "saw"):
            saw = dict(answer.saw)
            assert saw.pop("loss") == pytest.approx(loss, nan_ok=True)
            if np.isfinite(loss):
                assert saw == pytest.approx(numbers, rel=1e-12)
            else:
                assert saw.keys() == numbers.keys()


@pytest.mark.parametrize(
    ("loss", "is_jump"),
    [(1.0 + 0.75 + 1e-6, True), (1.0 + 0.75 - 1e-6, False), (-50.0, False), (math.nan, True), (-math.inf, True)],
)
def test_a_jump_is_so_many_robust_deviations_above_the_median(loss: float, is_jump: bool) -> None:
    deviation = 0.75 / 8.0 / 1.4826  # eight robust deviations are 0.75
    guard = redline.SpikeGuard()
    for index in range(40):
        assert not isinstance(shown(guard, index, 1.0 + deviation * (-1) ** index), redline.Withhold)
    assert isinstance(shown(guard, 40, loss), redline.Withhold) is is_jump


@pytest.mark.parametrize(("loss", "is_jump"), [(1.5, False), (1.5 + 1e-6, True)])
def test_on_a_level_loss_a_jump_is_more_than_min_jump(loss: float, is_jump: bool) -> None:
    guard = redline.SpikeGuard(min_jump=0.5)
    for index in range(20):
        shown(guard, index, 1.0)
    assert isinstance(shown(guard, 20, loss), redline.Withhold) is is_jump


def test_no_finite_loss_is_a_jump_before_sixteen() -> None:
    guard = redline.SpikeGuard()
    for index in range(15):
        shown(guard, index, 1.0)
    assert isinstance(shown(guard, 15, math.inf), redline.Withhold)
    assert shown(guard, 16, 100.0) is None
    assert isinstance(shown(guard, 17, 100.0), redline.Withhold)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_losses_that_are_not_finite_do_not_poison_the_window(value: float) -> None:
    """They are rolled back or withheld; a jump is still one afterwards, and a good loss still good."""
    guarded = Run(controllers=[redline.SpikeGuard(window=16, max_roll_backs=100)])
    guarded.steps(20)
    for _ in range(40):
        guarded.step(shown=value)
    (state,) = guarded.session.state_dict()["control"]["controllers"].values()
    assert state["losses"] == pytest.approx(guarded.losses[4:20])
    guarded.steps(3)
    assert len(guarded.did) == 40
    guarded.step(spoil=["batch"])
    assert guarded.did[-1] == (63, "withhold")
    assert all(torch.isfinite(tensor).all() for tensor in guarded.model.state_dict().values())


def test_jumps_do_not_raise_the_bar_for_the_next() -> None:
    guarded = Run(controllers=[redline.SpikeGuard(window=16, patience=1)])
    guarded.steps(20)
    for _ in range(30):
        guarded.step(spoil=["batch"])
        guarded.step()
    assert guarded.did == [(20 + 2 * index, "withhold") for index in range(30)]


@pytest.mark.parametrize(
    ("argument", "match"),
    [
        ({"threshold": -1.0}, "got threshold=-1.0; expected at least 0"),
        ({"threshold": math.inf}, "got threshold=inf"),
        ({"threshold": math.nan}, "got threshold=nan"),
        ({"min_jump": -0.1}, "got min_jump=-0.1; expected at least 0"),
        ({"window": 15}, "got window=15; expected at least 16"),
        ({"patience": -1}, "got patience=-1; expected at least 0"),
        ({"max_roll_backs": 0}, "got max_roll_backs=0; expected at least 1"),
        ({"every": 0}, "got every=0; expected at least 1"),
        ({"memory": "disk"}, "got memory='disk'; expected 'device' or 'host'"),
    ],
)
def test_limits_that_cannot_work_are_refused(argument: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        redline.SpikeGuard(**argument)


@pytest.mark.parametrize(
    "argument",
    [{"threshold": 0}, {"min_jump": 0}, {"window": 16}, {"patience": 0}, {"max_roll_backs": 1}, {"every": 1}],
)
def test_the_least_limits_are_accepted(argument: dict[str, Any]) -> None:
    redline.SpikeGuard(**argument)
