"""StepClamp in the loop: under accumulation, under a scaler of gradients, and without a forward."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from bits import frozen
from step_clamp_runs import Run, batch
from step_lengths import assert_scaled, reference
from torch import nn
from torch.optim import Optimizer

from redline import StepClamp


def test_under_accumulation_r_is_that_of_the_last_micro_batch() -> None:
    def step(run: Run) -> None:
        for seed in (3, 4, 5):
            x, y = batch(seed)
            (F.cross_entropy(run.model(x), y) / 3).backward()
        run.update()

    alone, run = Run(), Run()
    before = run.parameters
    step(alone)
    each = [reference(alone.model, before, alone.parameters, batch(seed)[0]) for seed in (3, 4, 5)]
    assert len({round(r / each[-1], 3) for r in each}) == 3
    with run.attach(StepClamp(0.5 * each[-1])) as session:
        step(run)
    (one,) = session.interventions
    assert one.saw["r"] == pytest.approx(each[-1], rel=1e-4)
    assert_scaled(run.parameters, before, alone.parameters, one.saw["scale"])


@pytest.mark.parametrize("fused", [False, True])
def test_under_a_grad_scaler_the_step_that_is_taken_is_clamped_and_the_skipped_one_is_not(fused: bool) -> None:
    def optimizers(model: nn.Module) -> list[Optimizer]:
        return [torch.optim.AdamW(model.parameters(), 1e-2, fused=fused)]

    def step(run: Run, scaler: torch.amp.GradScaler, seed: int, overflow: bool = False) -> None:
        run.optimizers[0].zero_grad()
        x, y = batch(seed)
        scaler.scale(F.cross_entropy(run.model(x), y)).backward()
        if overflow:
            next(run.model.parameters()).grad.fill_(math.inf)  # type: ignore[union-attr]
        scaler.step(run.optimizers[0])
        scaler.update()

    alone, run = Run(optimizers), Run(optimizers)
    of_alone, of_run = (torch.amp.GradScaler("cpu", init_scale=2.0**10) for _ in range(2))
    before = run.parameters
    for one, scaler in ((alone, of_alone), (run, of_run)):
        if one is run:
            run.attach(StepClamp(0.05))
        step(one, scaler, 1, overflow=True)
        assert frozen(one.parameters) == frozen(before)
        step(one, scaler, 2)
    assert run.session is not None
    run.session.close()
    r = reference(alone.model, before, alone.parameters, batch(2)[0])
    assert r > 0.05
    (one,) = run.session.interventions
    assert one.saw["r"] == pytest.approx(r, rel=1e-4)
    assert_scaled(run.parameters, before, alone.parameters, one.saw["scale"])
    assert of_run.state_dict() == of_alone.state_dict()
