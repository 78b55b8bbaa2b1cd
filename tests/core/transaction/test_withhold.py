"""A withheld step is no step at all: parameters, gradients and optimizer state stay as they were."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from bits import assert_same_bits
from torch import Tensor, nn
from torch.optim import Optimizer
from torch_optimizers import adam, muon_and_adamw
from transaction_runs import EVERY_OPTIMIZER, Deciding, Joint, Run, prepared, withholding

import redline
from redline import Need, Step, Withhold


@EVERY_OPTIMIZER
def test_withheld_step_is_no_step_at_all(optimizers: Callable[[nn.Module], list[Optimizer]]) -> None:
    run, alone = prepared(optimizers), prepared(optimizers)
    before, state = run.parameters, run.state
    with run.attach(Deciding(withhold=withholding(1))) as session:
        run.step(3)
        alone.step(3)
        before, state = run.parameters, run.state
        run.backward(4)
        gradients = {name: parameter.grad for name, parameter in run.model.named_parameters()}
        values = {name: grad.clone() for name, grad in gradients.items() if grad is not None}
        for optimizer in run.optimizers:
            optimizer.step()
        assert_same_bits(run.parameters, before)
        assert run.state == state, "moments, step counters, everything"
        for name, parameter in run.model.named_parameters():
            assert parameter.grad is gradients[name], "the gradients come back as the same objects"
        assert_same_bits({name: gradients[name] for name in values}, values)  # type: ignore[misc]
        for optimizer in run.optimizers:
            optimizer.zero_grad()
        run.step(5)
        alone.step(5)  # which never saw the batch that was withheld
        assert session.latest.value("redline_step_scale") == 1
    assert_same_bits(run.parameters, alone.parameters)
    assert run.state == alone.state
    assert session.interventions == (redline.Intervention(1, "Deciding", "withhold", "as told.", {"index": 1.0}),)
    assert session.latest.value("redline_interventions_total", controller="Deciding", action="withhold") == 1
    assert session.latest.value("redline_steps_total") == 3


@EVERY_OPTIMIZER
def test_withholding_the_first_step_leaves_no_state(optimizers: Callable[[nn.Module], list[Optimizer]]) -> None:
    run, fresh = Run(optimizers), Run(optimizers)
    with run.attach(Deciding(withhold=withholding(0))) as session:
        run.step(1)
        assert session.latest.value("redline_step_scale") == 0
    assert_same_bits(run.parameters, fresh.parameters)
    assert run.state == fresh.state


def test_withheld_gradients_go_on_accumulating() -> None:
    run = Run()
    with run.attach(Deciding(withhold=withholding(0))):
        run.backward(1)
        once = run.model.get_parameter("body.weight").grad.clone()  # type: ignore[union-attr]
        run.optimizers[0].step()
        run.backward(1)
    torch.testing.assert_close(run.model.get_parameter("body.weight").grad, 2 * once)


@pytest.mark.parametrize("keyword", [False, True])
def test_closure_is_withheld_from_too(keyword: bool) -> None:
    run = prepared(adam)
    before, state = run.parameters, run.state

    def closure() -> Tensor:
        run.optimizers[0].zero_grad()
        run.backward(3)
        return torch.tensor(1.25)

    with run.attach(Deciding(withhold=withholding(0))):
        loss = run.optimizers[0].step(closure=closure) if keyword else run.optimizers[0].step(closure)
    assert loss == 1.25
    assert_same_bits(run.parameters, before)
    assert run.state == state
    assert run.model.get_parameter("body.weight").grad is not None


def test_withheld_step_is_not_measured_but_its_gradient_is() -> None:
    run = Run()
    monitors = [redline.UpdateSpectrum(1), redline.GhostRadius(1), redline.WeightSpectrum(1), redline.StepHealth(1)]
    with run.attach(Deciding(withhold=withholding(0)), monitors=monitors) as session:
        run.step(1)
        latest = session.latest
    assert latest.series("redline_measurements_total") == {
        ("UpdateSpectrum",): 0,
        ("GhostRadius",): 0,
        ("WeightSpectrum",): 1,
        ("StepHealth",): 1,
    }
    assert latest.value("redline_gradient_norm") > 0
    assert "redline_update_norm" not in latest


def test_all_are_asked_ahead_of_the_update_and_each_decision_is_traced() -> None:
    """A guard learns from every step, also from one that another has withheld."""
    run = Run()
    first, second = Deciding(withhold=withholding(0)), Joint(withhold=withholding(0))
    with run.attach(first, second) as session:
        run.step(1)
    assert [one.controller for one in session.interventions] == ["Deciding", "Joint"]
    assert first.seen == second.seen == [], "there is no update to inspect"


def test_withholding_by_the_joint_gradient_withholds_from_every_optimizer() -> None:
    """The norm that crosses the limit is that of the joint step, of which the first optimizer holds a part only."""
    run, probe = prepared(muon_and_adamw), prepared(muon_and_adamw)
    probe.backward(3)
    squares = [
        [float(p.grad.double().square().sum()) for p in group["params"] if p.grad is not None]
        for optimizer in probe.optimizers
        for group in optimizer.param_groups
    ]
    first, whole = sum(squares[0]) ** 0.5, sum(map(sum, squares)) ** 0.5
    limit = (first + whole) / 2
    assert first < limit < whole

    def over(step: Step) -> Withhold | None:
        assert step.gradient_norm is not None
        return Withhold("over the limit.") if float(step.gradient_norm) > limit else None

    before, state = run.parameters, run.state
    with run.attach(Deciding(withhold=over, needs=Need.GRADIENTS)) as session:
        run.step(3)
    assert [one.action for one in session.interventions] == ["withhold"]
    assert_same_bits(run.parameters, before)
    assert run.state == state
