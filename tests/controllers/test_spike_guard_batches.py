"""SpikeGuard: a run without incident is left alone, and a jump of the batch costs one step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from spike_guard_runs import EVERY_OPTIMIZER, Run, assert_same, differing, falling
from torch import nn
from torch.optim import Optimizer

import redline


@EVERY_OPTIMIZER
@pytest.mark.parametrize("memory", ["device", "host"])
def test_a_healthy_run_is_its_own_to_the_bit(optimizers: Callable[[nn.Module], list[Optimizer]], memory: Any) -> None:
    alone = Run(optimizers, falling, drop=0.1)
    alone.steps(50)
    random = torch.get_rng_state()
    guarded = Run(optimizers, falling, [redline.SpikeGuard(every=5, memory=memory)], drop=0.1)
    guarded.steps(50)
    assert guarded.did == []
    assert guarded.session.report().snapshots[0].step == 45
    assert guarded.losses == alone.losses
    assert_same(guarded.state(), alone.state())
    assert torch.equal(torch.get_rng_state(), random)


@EVERY_OPTIMIZER
@pytest.mark.parametrize("spoil", ["batch", "nan"])
def test_a_jump_of_the_batch_alone_costs_one_step(
    optimizers: Callable[[nn.Module], list[Optimizer]], spoil: str
) -> None:
    guarded, twin = Run(optimizers, falling, [redline.SpikeGuard()]), Run(optimizers, falling)
    for run in (guarded, twin):
        run.steps(30)
    guarded.step(spoil=[spoil])
    twin.skip()
    assert_same(guarded.state(), twin.state())
    assert differing(guarded.before[30], guarded.after[30]) == {"model"}  # the running statistics had seen the batch
    for run in (guarded, twin):
        run.steps(10)
    assert guarded.did == [(30, "withhold")]
    assert_same(guarded.state(), twin.state())
    assert guarded.losses[31:] == twin.losses[31:]


def test_so_many_jumps_in_a_row_as_patience_says_are_withheld() -> None:
    guarded = Run(controllers=[redline.SpikeGuard(patience=3)])
    guarded.steps(30)
    for spoil in ("batch", "nan", "batch", ""):
        guarded.step(spoil=[spoil])
    guarded.steps(1)
    for _ in range(4):
        guarded.step(spoil=["batch"])
    assert [step for step, _ in guarded.did] == [30, 31, 32, 35, 36, 37, 38]
    assert [action for _, action in guarded.did] == ["withhold"] * 6 + ["rollback"]
