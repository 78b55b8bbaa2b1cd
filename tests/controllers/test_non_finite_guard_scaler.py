"""NonFiniteGuard beside a GradScaler, whose skipped steps are left to it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from non_finite_guard_runs import Run, actions, adamw, batch, gradients_of, is_finite, sgd_fused
from torch import nn
from torch.optim import Optimizer
from torch_optimizers import adamw_foreach, adamw_fused, sgd

from redline import NonFiniteGuard


class Scaled(Run):
    """A run under a GradScaler; a step can be made to overflow in the gradients of the parameters named."""

    def __init__(self, optimizers: Callable[[nn.Module], list[Optimizer]], clip: bool = False) -> None:
        super().__init__(optimizers)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=3)
        self.clip = clip

    def scaled_step(self, seed: int, *overflowing: str) -> None:
        x, y = batch(seed)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.scaler.scale(F.cross_entropy(self.model(x), y)).backward()
        gradients_of(math.inf, *overflowing)(self.model)
        if self.clip:
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.05)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()

    @property
    def scaler_state(self) -> dict[str, Any]:
        return self.scaler.state_dict()


def test_a_grad_scaler_that_is_switched_off_skips_nothing_and_the_guard_does() -> None:
    run = Scaled(adamw)
    run.scaler = torch.amp.GradScaler("cpu", enabled=False)
    run.scaled_step(0)
    before = run.everything
    with run.attach(NonFiniteGuard()) as session:
        run.scaled_step(1, "head.weight")
    assert actions(session) == [(0, "withhold")]
    assert run.everything == before


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(
    "optimizers", [sgd, sgd_fused, adamw, adamw_foreach, adamw_fused], ids=lambda make: make.__name__
)
def test_a_grad_scalers_skip_is_left_to_it(optimizers: Callable[[nn.Module], list[Optimizer]], clip: bool) -> None:
    """Also in a row of overflows longer than the guard's own patience, and at the first step.

    (Not for fused SGD at the first: torch leaves its momentum uninitialized there.)
    """
    run, alone = Scaled(optimizers, clip), Scaled(optimizers, clip)
    at = {4, 5, 6, 9} if optimizers is sgd_fused else {0, 4, 5, 6, 9}
    with run.attach(NonFiniteGuard(stop_after=2, restore_state=True)) as session:
        for seed in range(12):
            overflowing = ("norm.bias", "head.weight") if seed in at else ()
            run.scaled_step(seed, *overflowing)
            alone.scaled_step(seed, *overflowing)
            assert run.everything == alone.everything
            assert run.scaler_state == alone.scaler_state
    assert session.interventions == ()
    assert is_finite(run.model)
    assert run.scaler_state["scale"] < 2.0**12, "it did skip"


def body_and_head(fused: bool) -> Callable[[nn.Module], list[Optimizer]]:
    """``body`` and ``norm`` belong to the first, ``head`` to the second."""

    def optimizers(model: nn.Module) -> list[Optimizer]:
        return [
            torch.optim.AdamW([p for n, p in model.named_parameters() if n.startswith(which)], 1e-2, fused=fused)
            for which in (("body", "norm"), ("head",))
        ]

    return optimizers


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("overflowing", "mine"), [("body.weight", 0), ("head.bias", 1)])
def test_an_overflow_in_one_of_two_optimizers(overflowing: str, mine: int, fused: bool) -> None:
    """It is not stepped, the scaler goes its own way as without the guard, and the run goes on."""
    run, alone = Scaled(body_and_head(fused)), Scaled(body_and_head(fused))
    with run.attach(NonFiniteGuard(stop_after=2)) as session:
        for seed in (1, 2):
            run.scaled_step(seed)
            alone.scaled_step(seed)
        before = run.everything
        run.scaled_step(3, overflowing)
        alone.scaled_step(3, overflowing)
        assert run.scaler_state == alone.scaler_state
        assert run.scaler_state["scale"] == 2.0**11
        assert run.state[mine] == alone.state[mine] == before["state"][mine]
        moved = [name for name, bits in run.parameters.items() if bits != before["parameters"][name]]
        assert not [name for name in moved if name.startswith("head") == bool(mine)]
        for seed in (4, 5):
            run.scaled_step(seed)
    assert is_finite(run.model)
    assert session.latest.value("redline_steps_total") == 5
    assert sum(one.action != "withhold" for one in session.interventions) == 0


def test_what_an_overflow_in_one_does_to_the_other_is_the_same_fused_or_not_and_in_either_order() -> None:
    stepped: dict[tuple[str, bool], bool] = {}
    for overflowing, other in (("body.weight", 1), ("head.bias", 0)):
        for fused in (False, True):
            run = Scaled(body_and_head(fused))
            with run.attach():
                run.scaled_step(1)
                before = run.state[other]
                run.scaled_step(2, overflowing)
                stepped[overflowing, fused] = run.state[other] != before
    assert len(set(stepped.values())) == 1, stepped


@pytest.mark.parametrize("optimizers", [adamw, adamw_fused], ids=lambda make: make.__name__)
def test_a_large_loss_scale_is_no_overflow(optimizers: Callable[[nn.Module], list[Optimizer]]) -> None:
    """Without half precision nothing keeps a GradScaler from growing: gradients times the scale are finite still."""
    run, alone = Scaled(optimizers), Scaled(optimizers)
    for one in (run, alone):
        one.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**80)
    with run.attach() as session:
        for seed in (1, 2, 3):
            run.scaled_step(seed)
            alone.scaled_step(seed)
    assert run.scaler_state["scale"] == 2.0**80, "nothing overflowed"
    assert session.interventions == ()
    assert run.everything == alone.everything
