"""StepClamp: the step is as long as the radius allows, and otherwise the optimizer's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from bits import frozen
from step_clamp_runs import EVERY_OPTIMIZER, Run, batch, prepared
from step_lengths import assert_scaled, dropping, normalizing, plain, reference
from torch import nn
from torch.optim import Optimizer

import redline
from redline import StepClamp

R = "redline_normalized_step_size"


@EVERY_OPTIMIZER
@pytest.mark.parametrize("model", [plain, dropping, normalizing], ids=lambda make: make.__name__)
@pytest.mark.parametrize("share", [0.4, 0.01])
def test_the_step_is_scaled_by_max_r_over_r(
    optimizers: Callable[[nn.Module], list[Optimizer]], model: Callable[[], nn.Module], share: float
) -> None:
    alone, run = prepared(optimizers, model), prepared(optimizers, model)
    before = alone.parameters
    assert frozen(before) == frozen(run.parameters)
    torch.manual_seed(5)
    alone.step(3)
    r = reference(alone.model, before, alone.parameters, batch(3)[0])
    max_r = share * r
    torch.manual_seed(5)
    with run.attach(StepClamp(max_r), monitors=[redline.GhostRadius(1)]) as session:
        run.step(3)
        latest = session.latest
    (one,) = session.interventions
    assert (one.step, one.controller, one.action) == (0, "StepClamp", "scale")
    assert one.saw["r"] == pytest.approx(r, rel=1e-4)
    assert one.saw["scale"] == pytest.approx(share, rel=1e-4)
    assert one.saw["max_r"] == max_r
    assert one.reason == f"r = {r:.3g} was over {max_r:.3g}: the step was scaled by {share:.3g}."
    assert_scaled(run.parameters, before, alone.parameters, one.saw["scale"])
    assert frozen([o.state_dict() for o in run.optimizers]) == frozen([o.state_dict() for o in alone.optimizers])
    assert frozen(dict(run.model.named_buffers())) == frozen(dict(alone.model.named_buffers()))
    assert latest.value(R) == pytest.approx(r, rel=1e-4), "r is of the step as proposed"
    assert latest.value("redline_committed_step_size") == pytest.approx(max_r, rel=1e-4)
    assert latest.value("redline_step_scale") == one.saw["scale"]


@EVERY_OPTIMIZER
def test_every_step_is_scaled_by_the_lesser_of_1_and_max_r_over_r(
    optimizers: Callable[[nn.Module], list[Optimizer]],
) -> None:
    """Along a run in which some steps are too long; those that are not are the optimizer's own."""
    run, max_r, clamped = prepared(optimizers), 0.1, []
    with run.attach(StepClamp(max_r)) as session:
        for seed in range(3, 13):
            alone, before = run.uncontrolled(), run.parameters
            if seed % 3 == 0:
                rates = [group["lr"] for o in (*run.optimizers, *alone.optimizers) for group in o.param_groups]
                for o in (*run.optimizers, *alone.optimizers):
                    for group in o.param_groups:
                        group["lr"] *= 30
            alone.step(seed)
            run.step(seed)
            if seed % 3 == 0:
                for o in (*run.optimizers, *alone.optimizers):
                    for group in o.param_groups:
                        group["lr"] = rates.pop(0)
            after = alone.parameters
            factor = min(1.0, max_r / reference(alone.model, before, after, batch(seed)[0]))
            assert session.latest.value("redline_step_scale") == pytest.approx(factor, rel=1e-4)
            clamped.append(factor < 1)
            if factor == 1:
                assert frozen(run.parameters) == frozen(after)
            else:
                assert_scaled(run.parameters, before, after, session.latest.value("redline_step_scale"))
    assert 0 < sum(clamped) < len(clamped)
    assert [one.step for one in session.interventions] == [step for step, was in enumerate(clamped) if was]


@EVERY_OPTIMIZER
@pytest.mark.parametrize("model", [plain, dropping, normalizing], ids=lambda make: make.__name__)
def test_a_run_of_short_steps_is_its_own_to_the_bit(
    optimizers: Callable[[nn.Module], list[Optimizer]], model: Callable[[], nn.Module]
) -> None:
    alone, run = Run(optimizers, model), Run(optimizers, model)
    torch.manual_seed(5)
    for seed in range(5):
        alone.step(seed)
    random_state = torch.get_rng_state()
    torch.manual_seed(5)
    with run.attach(StepClamp(1e4)) as session:
        for seed in range(5):
            run.step(seed)
        assert session.latest.value("redline_step_scale") == 1
        assert session.latest.value("redline_committed_step_size") > 0, "it was measured"
    assert run.everything == alone.everything
    assert torch.equal(torch.get_rng_state(), random_state)
    assert session.interventions == ()


def test_a_step_exactly_as_long_as_allowed_is_left_alone() -> None:
    probe = prepared()
    with probe.attach(StepClamp(1e-3)) as session:
        probe.step(3)
    r = session.interventions[0].saw["r"]
    alone, exact, below = prepared(), prepared(), prepared()
    alone.step(3)
    with exact.attach(StepClamp(r)) as session:
        exact.step(3)
    assert exact.everything == alone.everything
    assert session.interventions == ()
    with below.attach(StepClamp(r * (1 - 1e-6))) as session:
        below.step(3)
    assert len(session.interventions) == 1


def test_the_default_is_the_redline() -> None:
    assert StepClamp().max_r == 1.0
    run = Run(lambda model: [torch.optim.SGD(model.parameters(), 100.0)])
    with run.attach(StepClamp()) as session:
        run.step(1)
    (one,) = session.interventions
    assert one.saw["r"] > 1
    assert one.saw["scale"] * one.saw["r"] == pytest.approx(1)
