"""RadiusLR on steps that have no length to go by."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from bits import frozen
from radius_lr_runs import COMMITTED, EVERY_OPTIMIZER, SCALE, Run, bare_sgd, batch, prepared, unlimited
from step_lengths import plain, reference
from torch import Tensor, nn
from torch.optim import Optimizer
from torch_optimizers import adamw

import redline
from redline import NonFiniteGuard, RunStoppedError


@EVERY_OPTIMIZER
def test_a_step_that_moves_nothing_is_left_alone(optimizers: Callable[[nn.Module], list[Optimizer]]) -> None:
    """As at the start of a warm-up from 0; the next is of the length asked for."""
    alone, run = Run(optimizers).times_rate(0), Run(optimizers).times_rate(0)
    with run.attach(unlimited()) as session:
        for seed in (1, 2):
            alone.step(seed)
            run.step(seed)
            assert run.everything == alone.everything
            assert session.latest.value(COMMITTED) == 0
            assert session.latest.value(SCALE) == 1
        assert session.interventions == ()
        for optimizer in run.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 1e-3
        before = run.parameters
        run.step(3)
    assert reference(run.model, before, run.parameters, batch(3)[0]) == pytest.approx(1, rel=2e-3)


class Beside(nn.Module):
    """Has a parameter that the logits do not depend on, but the loss does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = plain()
        self.beside = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_a_step_that_moves_no_logit_is_left_alone() -> None:
    def step(run: Run) -> None:
        run.optimizers[0].zero_grad()
        (0 * run.model(batch(1)[0]).sum() + run.model.get_parameter("beside").square().sum()).backward()
        run.update()

    alone, run = Run(bare_sgd, Beside), Run(bare_sgd, Beside)
    step(alone)
    with run.attach(unlimited()) as session:
        step(run)
    assert run.everything == alone.everything
    assert session.interventions == ()


@pytest.mark.parametrize("rate", [1e-30, 1e-38, 1e-40])
def test_a_step_that_hardly_moves_a_logit_does_not_end_the_run(rate: float) -> None:
    """Its factor may be more than a float32 holds."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.SGD(model.parameters(), rate)
    with redline.attach(model, optimizer, monitors=[], controllers=[unlimited()]):
        F.cross_entropy(model(torch.randn(8, 4)), torch.arange(8) % 3).backward()
        optimizer.step()
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_of_a_step_that_is_infinitely_too_long_nothing_is_committed() -> None:
    """As under StepClamp: the update is finite, the logits' tangent along it is not."""
    run = Run(bare_sgd, lambda: nn.Linear(4, 3)).times_rate(1e-9)
    before = frozen(run.parameters)
    x = 1e25 * torch.ones(1, 4)
    with run.attach(unlimited()) as session:
        F.cross_entropy(run.model(x), run.model(x).argmin(-1)).backward()
        run.update()
        assert frozen(run.parameters) == before
        assert session.latest.value(COMMITTED) == 0


def test_a_step_of_which_no_position_says_anything_is_left_alone() -> None:
    alone, run = Run(), Run()
    with run.attach(unlimited(), logits=lambda output: output * math.nan) as session:
        for seed in (1, 2):
            alone.step(seed)
            run.step(seed)
    assert run.everything == alone.everything
    assert session.interventions == ()


@EVERY_OPTIMIZER
@pytest.mark.parametrize("rate", [math.nan, math.inf])
def test_an_update_that_is_not_finite_is_rejected(
    optimizers: Callable[[nn.Module], list[Optimizer]], rate: float
) -> None:
    run = prepared(optimizers)
    before = frozen(run.parameters)
    with run.attach(unlimited()) as session:
        run.times_rate(rate)
        with pytest.raises(RunStoppedError, match=r"RadiusLR rejected step 0: the update was not finite \(norm"):
            run.step(3)
    assert frozen(run.parameters) == before
    assert [one.action for one in session.interventions] == ["reject"]


def test_a_rejected_step_is_no_step_where_a_guard_restores_the_state() -> None:
    alone, run = prepared(adamw), prepared(adamw)
    with run.attach(unlimited(0.5), NonFiniteGuard(restore_state=True)) as session:
        before = run.everything
        run.times_rate(math.nan)
        run.step(3)
        for one in run.optimizers:
            one.param_groups[0]["lr"] = 1e-2
        assert run.everything == before
        run.step(4)
    with alone.attach(unlimited(0.5)):
        alone.step(4)
    assert run.everything == alone.everything
    assert [one.action for one in session.interventions] == ["reject", "scale"]
