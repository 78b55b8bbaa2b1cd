"""StepClamp on steps that are infinitely too long, or not finite."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from bits import frozen
from step_clamp_runs import EVERY_OPTIMIZER, overlong, prepared
from torch import nn
from torch.optim import Optimizer

from redline import RunStoppedError, StepClamp


def test_of_a_step_that_is_infinitely_too_long_nothing_is_committed() -> None:
    (alone, step), (run, _) = overlong(), overlong()
    before = frozen(run.parameters)
    step(alone)
    assert frozen(alone.parameters) != before
    assert all(bool(tensor.isfinite().all()) for tensor in alone.parameters.values())
    with run.attach(StepClamp()) as session:
        step(run)
        assert frozen(run.parameters) == before
        assert session.latest.value("redline_committed_step_size") == 0
        assert session.latest.value("redline_step_scale") == 0
    (one,) = session.interventions
    assert (one.action, one.saw["r"], one.saw["scale"]) == ("scale", math.inf, 0)
    assert frozen(run.optimizers[0].state_dict()) == frozen(alone.optimizers[0].state_dict())


@EVERY_OPTIMIZER
@pytest.mark.parametrize("rate", [math.nan, math.inf])
def test_an_update_that_is_not_finite_is_rejected(
    optimizers: Callable[[nn.Module], list[Optimizer]], rate: float
) -> None:
    run = prepared(optimizers)
    before = frozen(run.parameters)
    with run.attach(StepClamp()) as session:
        for optimizer in run.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        with pytest.raises(RunStoppedError, match=r"StepClamp rejected step 0: the update was not finite \(norm"):
            run.step(3)
    assert frozen(run.parameters) == before
    assert [one.action for one in session.interventions] == ["reject"]
