"""SpikeGuard: a jump of the parameters is rolled back, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from spike_guard_runs import (
    EVERY_OPTIMIZER,
    Run,
    adamw_foreach,
    adamw_with_a_rate_in_a_tensor,
    assert_same,
    differing,
    falling,
    no_schedulers,
    one_cycle,
    sgd,
)
from torch import nn
from torch.optim import Optimizer
from torch_optimizers import adamw_fused, muon_and_adamw

import redline


@pytest.mark.parametrize("spoil", ["parameters", "rate"])
@pytest.mark.parametrize(
    ("optimizers", "schedulers"),
    [
        (sgd, no_schedulers),
        (sgd, one_cycle),
        (adamw_foreach, falling),
        (adamw_fused, no_schedulers),
        (adamw_fused, one_cycle),
        (adamw_with_a_rate_in_a_tensor, falling),
        (muon_and_adamw, no_schedulers),
        (muon_and_adamw, falling),
    ],
)
def test_jumped_parameters_are_rolled_back_to_the_snapshot_and_the_run_goes_on(
    optimizers: Callable[[nn.Module], list[Optimizer]],
    schedulers: Callable[[Sequence[Optimizer]], list[Any]],
    spoil: str,
) -> None:
    guarded, twin = Run(optimizers, schedulers, [redline.SpikeGuard()]), Run(optimizers, schedulers)
    for run in (guarded, twin):
        run.steps(29)
    if spoil == "rate":  # seen at the next step
        guarded.step(spoil=["rate"])
        guarded.step()
    else:
        guarded.step()
        guarded.step(spoil=["parameters"])
    guarded.step()
    assert guarded.did == [(30, "withhold"), (31, "rollback")]
    at_snapshot, back = guarded.before[20], guarded.after[31]
    moved = {"model", *(f"optimizer {k}" for k in range(len(guarded.optimizers)))}
    moved |= {f"scheduler {k}" for k in range(len(guarded.schedulers))}
    assert differing(at_snapshot, guarded.before[31]) == moved
    assert_same(back, at_snapshot)

    twin.steps(1)
    twin.skip()
    twin.skip(at_snapshot)
    for run in (guarded, twin):
        run.steps(15)
    assert len(guarded.did) == 2
    assert_same(guarded.state(), twin.state())
    assert guarded.losses[32:] == twin.losses[32:]
    assert guarded.losses[-1] < guarded.losses[0]


@EVERY_OPTIMIZER
def test_without_patience_it_rolls_back_at_once(optimizers: Callable[[nn.Module], list[Optimizer]]) -> None:
    guarded = Run(optimizers, falling, [redline.SpikeGuard(patience=0, every=8)])
    guarded.steps(30)
    guarded.step(spoil=["parameters"])
    assert guarded.did == [(30, "rollback")]
    assert_same(guarded.after[30], guarded.before[24])


@EVERY_OPTIMIZER
def test_a_snapshot_can_be_gone_back_to_twice(optimizers: Callable[[nn.Module], list[Optimizer]]) -> None:
    guarded = Run(optimizers, falling, [redline.SpikeGuard(patience=0)])
    guarded.steps(30)
    guarded.step(spoil=["parameters"])
    guarded.steps(5)
    assert_same(guarded.after[30], guarded.before[20])
    assert differing(guarded.before[20], guarded.after[35]) == guarded.before[20].keys()
    guarded.step(spoil=["parameters"])
    guarded.step(spoil=["parameters"])
    assert guarded.did == [(30, "rollback"), (36, "rollback"), (37, "rollback")]
    assert_same(guarded.after[36], guarded.before[20])
    assert_same(guarded.after[37], guarded.before[20])


@EVERY_OPTIMIZER
def test_state_that_was_taken_away_since_comes_back_twice(optimizers: Callable[[nn.Module], list[Optimizer]]) -> None:
    guarded = Run(optimizers, falling, [redline.SpikeGuard(patience=0)])
    guarded.steps(30)
    for optimizer in guarded.optimizers:
        optimizer.state.clear()
    guarded.step(spoil=["parameters"])
    guarded.steps(3)
    guarded.step(spoil=["parameters"])
    assert guarded.did == [(30, "rollback"), (34, "rollback")]
    assert_same(guarded.after[30], guarded.before[20])
    assert_same(guarded.after[34], guarded.before[20])


@EVERY_OPTIMIZER
def test_back_at_the_first_step_there_is_no_state_again(optimizers: Callable[[nn.Module], list[Optimizer]]) -> None:
    guarded = Run(optimizers, falling, [redline.SpikeGuard(patience=0, every=1000)])
    guarded.steps(20)
    guarded.step(spoil=["parameters"])
    assert all(guarded.before[19][f"optimizer {k}"]["state"] for k in range(len(guarded.optimizers)))
    assert_same(guarded.after[20], guarded.before[0])
    assert not any(optimizer.state for optimizer in guarded.optimizers)
    guarded.steps(10)
    assert len(guarded.did) == 1


def test_a_guard_that_served_another_run_begins_anew() -> None:
    guard = redline.SpikeGuard(patience=0)
    first = Run(controllers=[guard])
    first.steps(45)
    first.session.close()
    second = Run(controllers=[guard])
    second.steps(18)
    second.step(spoil=["parameters"])
    assert second.did == [(18, "rollback")]
    assert_same(second.after[18], second.before[0])
