"""NonFiniteGuard: an update that is not finite is rejected."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch.nn.functional as F
from non_finite_guard_runs import (
    CLASSES,
    EVERY_OPTIMIZER,
    FEATURES,
    Run,
    actions,
    adamw,
    bad_batch,
    batch,
    gradients_of,
)
from torch import nn
from torch.optim import Optimizer
from torch_optimizers import muon_and_adamw

from redline import NonFiniteGuard, RunStoppedError


@EVERY_OPTIMIZER
@pytest.mark.parametrize("rate", [math.nan, math.inf])
def test_an_update_that_is_not_finite_stops_the_run(
    optimizers: Callable[[nn.Module], list[Optimizer]], rate: float
) -> None:
    run = Run(optimizers)
    with run.attach() as session:
        run.step(batch(1))
        run.step(batch(2))
        parameters = run.parameters
        with pytest.raises(
            RunStoppedError,
            match=r"NonFiniteGuard rejected step 2: the update was not finite \(norm (nan|inf)\)\. The parameters are "
            r"as they were before it; the optimizer's moments are not",
        ):
            run.step_at_rate(batch(3), rate)
        assert run.parameters == parameters
        assert session.latest.value("redline_step_scale") == 0
    assert actions(session) == [(2, "reject")]


@EVERY_OPTIMIZER
@pytest.mark.parametrize("rate", [math.nan, math.inf])
def test_with_its_state_restored_a_rejected_step_never_happened(
    optimizers: Callable[[nn.Module], list[Optimizer]], rate: float
) -> None:
    def plain() -> nn.Module:
        return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))

    run, alone = Run(optimizers, plain), Run(optimizers, plain)
    with run.attach(NonFiniteGuard(restore_state=True)) as session:
        for seed in (1, 2):
            run.step(batch(seed))
            alone.step(batch(seed))
        before = run.everything
        run.step_at_rate(batch(3), rate)
        assert run.everything == before
        for seed in (4, 5):
            run.step(batch(seed))
            alone.step(batch(seed))
    assert run.everything == alone.everything
    assert actions(session) == [(2, "reject")]


@EVERY_OPTIMIZER
def test_a_rejected_first_step_leaves_no_state(optimizers: Callable[[nn.Module], list[Optimizer]]) -> None:
    run, fresh = Run(optimizers), Run(optimizers)
    with run.attach(NonFiniteGuard(restore_state=True)):
        run.step_at_rate(batch(1), math.nan)
        assert run.parameters == fresh.parameters
        assert run.state == fresh.state


def test_with_its_state_restored_a_rejected_step_leaves_no_running_statistics() -> None:
    run = Run()
    with run.attach(NonFiniteGuard(restore_state=True)):
        run.step(batch(1))
        before = run.everything
        run.step_at_rate(batch(2), math.nan)
        assert run.parameters == before["parameters"]
        assert run.buffers == before["buffers"]


def test_rejections_in_a_row_stop_the_run_and_a_good_step_begins_anew() -> None:
    run, alone = Run(adamw), Run(adamw)
    with run.attach(NonFiniteGuard(stop_after=2, restore_state=True)) as session:
        run.step_at_rate(batch(1), math.nan)
        run.step(batch(2))
        run.step_at_rate(batch(3), math.nan)
        run.step_at_rate(batch(4), math.nan)
        alone.step(batch(2))
        assert (run.parameters, run.state) == (alone.parameters, alone.state)
        with pytest.raises(RunStoppedError, match="at step 4: the updates were not finite, at 2 steps in a row"):
            run.step_at_rate(batch(5), math.nan)
        assert (run.parameters, run.state) == (alone.parameters, alone.state)
    assert actions(session) == [(0, "reject"), (2, "reject"), (3, "reject"), (4, "stop")]


def test_steps_withheld_and_rejected_count_together() -> None:
    run = Run(adamw)
    with run.attach(NonFiniteGuard(stop_after=3, restore_state=True)) as session:
        run.step_at_rate(batch(1), math.nan)
        run.step(bad_batch(2))
        with pytest.raises(RunStoppedError, match="at 3 steps in a row"):
            run.step(bad_batch(3))
    assert actions(session) == [(0, "reject"), (1, "withhold"), (2, "stop")]


def test_gradients_that_turn_bad_between_two_optimizers_of_one_step_are_rejected() -> None:
    """The question whether to withhold is asked ahead of the first; of the second there is still the update to see."""
    run = Run(muon_and_adamw)
    with run.attach() as session:
        run.step(batch(1))
        before = run.parameters
        for optimizer in run.optimizers:
            optimizer.zero_grad()
        x, y = batch(2)
        F.cross_entropy(run.model(x), y).backward()
        run.optimizers[0].step()
        assert run.parameters != before
        gradients_of(math.nan, "head.bias")(run.model)
        with pytest.raises(RunStoppedError, match="rejected step 1"):
            run.optimizers[1].step()
    assert run.parameters == before, "of both"
    assert actions(session) == [(1, "reject")]
