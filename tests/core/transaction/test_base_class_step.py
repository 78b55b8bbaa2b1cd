"""An optimizer whose step calls its base class's step takes one step, not two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bits import assert_same_bits
from torch import nn
from torch.optim import Optimizer
from transaction_runs import Deciding, assert_scaled, at, norm, prepared, scaling

import redline
from redline import Reject, Step, Withhold


class Shrinking(torch.optim.SGD):
    """Calls its base class's step, as many do, and moves the parameters once more."""

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter *= 0.5
        return result


def shrinking(model: nn.Module) -> list[Optimizer]:
    torch.optim.SGD([torch.zeros(1)], 0.1)  # from the first instance on, the base class's step runs hooks of its own
    return [Shrinking(model.parameters(), 0.1, momentum=0.9)]


def test_step_that_calls_its_base_class_is_one_step() -> None:
    alone, run = prepared(shrinking), prepared(shrinking)
    before = run.parameters
    alone.step(3)
    monitors = [redline.GhostRadius(1), redline.UpdateSpectrum(1), redline.StepHealth(1)]
    with run.attach(monitors=monitors) as session:
        run.step(3)
        latest = session.latest
    update = {name: tensor - before[name] for name, tensor in alone.parameters.items()}
    assert latest.value("redline_steps_total") == 1
    assert latest.value("redline_update_norm") == pytest.approx(norm(update), rel=1e-5)
    assert latest.value("redline_measurements_total", monitor="GhostRadius") == 1
    assert "redline_normalized_step_size" in latest


def test_step_that_calls_its_base_class_is_scaled_as_a_whole() -> None:
    alone, run = prepared(shrinking), prepared(shrinking)
    before = run.parameters
    alone.step(3)
    controller = scaling(0.5)
    with run.attach(controller):
        run.step(3)
    assert len(controller.seen) == 1
    assert_scaled(run.parameters, before, alone.parameters, dict.fromkeys(before, 0.5))


def test_step_that_calls_its_base_class_is_withheld_once_as_a_whole() -> None:
    run = prepared(shrinking)
    before, state = run.parameters, run.state
    asked: list[int] = []

    def first_time(step: Step) -> Withhold | None:
        asked.append(step.index)
        return Withhold("as told.") if len(asked) == 1 else None

    with run.attach(Deciding(withhold=first_time)):
        run.step(3)
    assert asked == [0]
    assert_same_bits(run.parameters, before)
    assert run.state == state


def test_step_that_calls_its_base_class_is_taken_back_as_a_whole() -> None:
    run = prepared(shrinking)
    before, state = run.parameters, run.state
    with run.attach(Deciding(at(0, Reject("as told.")), snapshots_state=True)):
        run.step(3)
    assert_same_bits(run.parameters, before)
    assert run.state == state
