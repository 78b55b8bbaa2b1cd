"""SpikeGuard: rates, group settings and whatever has a state go back together with the schedulers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from spike_guard_runs import Net, Run, assert_same, differing, falling, sgd
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LinearLR, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel

import redline


def test_a_rate_spiked_in_the_very_step_of_the_snapshot_does_not_come_back() -> None:
    guarded = Run(sgd, falling, [redline.SpikeGuard(patience=0)])
    guarded.steps(20)
    guarded.step(spoil=["rate"])
    guarded.step()
    assert guarded.did == [(21, "rollback")]
    assert guarded.after[21]["optimizer 0"]["param_groups"][0]["lr"] == pytest.approx(0.05 * 0.99**20, rel=1e-12)
    for name in ("model", "scheduler 0"):
        assert_same(guarded.after[21][name], guarded.before[20][name])


def warm_up_and_plateau(optimizers: Sequence[Optimizer]) -> list[Any]:
    """Two schedulers of one optimizer: the first steps each time, the second only at the end of an epoch."""

    class AtTheEndOfAnEpoch(ReduceLROnPlateau):
        def step(self, *_: Any) -> None:
            pass

    return [LinearLR(optimizers[0], 0.1, total_iters=100), AtTheEndOfAnEpoch(optimizers[0])]


def plateau_and_warm_up(optimizers: Sequence[Optimizer]) -> list[Any]:
    """The same the other way round."""
    return warm_up_and_plateau(optimizers)[::-1]


@pytest.mark.parametrize("schedulers", [warm_up_and_plateau, plateau_and_warm_up])
def test_with_two_schedulers_of_one_optimizer_its_rate_is_that_of_the_snapshot(
    schedulers: Callable[[Sequence[Optimizer]], list[Any]],
) -> None:
    guarded = Run(sgd, schedulers, [redline.SpikeGuard(patience=0)])
    guarded.steps(30)
    guarded.step(spoil=["parameters"])
    assert guarded.did == [(30, "rollback")]
    rates = [state["optimizer 0"]["param_groups"][0]["lr"] for state in (guarded.before[20], guarded.after[30])]
    assert rates[0] == rates[1] == pytest.approx(0.05 * (0.1 + 0.9 * 20 / 100))


@pytest.mark.parametrize("told_of_schedulers", [True, False])
def test_group_settings_come_back_only_together_with_schedulers(told_of_schedulers: bool) -> None:
    guarded = Run(sgd, falling, [redline.SpikeGuard(patience=0)], told_of_schedulers=told_of_schedulers)
    guarded.steps(30)
    guarded.groups[0]["weight_decay"] = 0.25
    guarded.step(spoil=["parameters"])
    assert guarded.did == [(30, "rollback")]
    (back,) = guarded.after[30]["optimizer 0"]["param_groups"]
    (then,) = guarded.before[20]["optimizer 0"]["param_groups"]
    (late,) = guarded.before[30]["optimizer 0"]["param_groups"]
    assert late["lr"] != then["lr"]
    if told_of_schedulers:
        assert (back["lr"], back["weight_decay"]) == (then["lr"], 1e-3)
        assert guarded.after[30]["scheduler 0"] == guarded.before[20]["scheduler 0"]
    else:
        assert (back["lr"], back["weight_decay"]) == (late["lr"], 0.25)
        assert guarded.after[30]["scheduler 0"] == guarded.before[30]["scheduler 0"]
    for part in ("model", "optimizer 0"):
        kept, found = (dict(state[part]) for state in (guarded.before[20], guarded.after[30]))
        assert_same(kept.pop("state", kept), found.pop("state", found))


def test_anything_with_a_state_dict_comes_back_too() -> None:
    average = AveragedModel(Net())

    def averaging(optimizers: Sequence[Optimizer]) -> list[Any]:
        average.step = lambda: average.update_parameters(guarded.model)  # type: ignore[assignment]
        return [average]

    guarded = Run(sgd, averaging, [redline.SpikeGuard(patience=0)])
    guarded.steps(30)
    guarded.step(spoil=["parameters"])
    assert guarded.did == [(30, "rollback")]
    assert differing(guarded.before[20], guarded.before[30]) == {"model", "optimizer 0", "scheduler 0"}
    assert_same(guarded.after[30], guarded.before[20])


class Course:
    """Has a state that it changes in place."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def step(self) -> None:
        self.taken.append(len(self.taken))

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]


def test_what_changes_its_state_in_place_comes_back_twice() -> None:
    course = Course()
    guarded = Run(sgd, lambda _: [course], [redline.SpikeGuard(patience=0)])
    lengths = []
    for index in range(36):
        guarded.step(spoil=["parameters"] if index in (30, 35) else [])
        lengths.append(len(course.taken))
    assert guarded.did == [(30, "rollback"), (35, "rollback")]
    assert (lengths[19], lengths[29], lengths[30], lengths[34], lengths[35]) == (20, 30, 21, 25, 21)
