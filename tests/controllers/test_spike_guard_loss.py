"""SpikeGuard: the loss that the loop has to observe for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from spike_guard_runs import EVERY_OPTIMIZER, Run, assert_same, batch
from torch import nn
from torch.optim import Optimizer

import redline
from redline import ConfigurationError


@EVERY_OPTIMIZER
def test_a_loop_that_observes_no_loss_is_told_how_to(optimizers: Callable[[nn.Module], list[Optimizer]]) -> None:
    guarded = Run(optimizers, controllers=[redline.SpikeGuard()])
    guarded.session.close()
    before = guarded.state()
    with redline.attach(guarded.model, guarded.optimizers, monitors=[], controllers=[redline.SpikeGuard()]) as session:
        x, y = batch(0)
        F.cross_entropy(guarded.model(x), y).backward()
        with pytest.raises(ConfigurationError, match=r"session\.observe\(loss=loss\) before each optimizer\.step\(\)"):
            guarded.optimizers[0].step()
        assert session.interventions == ()
    after = guarded.state()
    for name, parameter in guarded.model.named_parameters():
        assert_same(parameter, before["model"][name])
    assert_same({**after, "model": {}}, {**before, "model": {}})


def test_a_later_step_without_a_loss_is_taken_as_it_is() -> None:
    guarded, twin = Run(controllers=[redline.SpikeGuard(patience=0)]), Run()
    for run in (guarded, twin):
        run.steps(20)
        F.cross_entropy(run.model(batch(100)[0]), batch(100)[1]).backward()
        run.optimizers[0].step()
        run.optimizers[0].zero_grad()
        run.steps(5)
    assert guarded.did == []
    assert_same(guarded.state(), twin.state())


@pytest.mark.parametrize("kind", [float, torch.tensor, lambda value: torch.tensor([value], dtype=torch.float64)])
def test_a_loss_may_be_observed_as_a_number_or_a_tensor(kind: Callable[[float], Any]) -> None:
    guarded = Run(controllers=[redline.SpikeGuard()])
    for _ in range(20):
        guarded.step(shown=kind(1.0))
    guarded.step(shown=kind(4.0))
    assert guarded.did == [(20, "withhold")]
