"""A scaled step: what is committed is a fraction of what the optimizer proposed, to the bit where a bit is promised."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from bits import assert_same_bits, frozen
from torch import Tensor, nn
from torch.optim import Optimizer
from torch_optimizers import sgd
from transaction_runs import EVERY_OPTIMIZER, Deciding, Joint, Linear, Run, assert_scaled, norm, prepared, scaling

import redline
from redline import ConfigurationError, Need, Scale, Step
from redline.transaction import StepTransaction

# Scale --------------------------------------------------------------------------------------------


@EVERY_OPTIMIZER
@pytest.mark.parametrize("factor", [0.5, 1e-3, 1.7])
def test_scale_commits_a_fraction_of_the_update(
    optimizers: Callable[[nn.Module], list[Optimizer]], factor: float
) -> None:
    alone, run = prepared(optimizers), prepared(optimizers)
    before = run.parameters
    assert_same_bits(alone.parameters, before)
    alone.step(3)
    controller = scaling(factor)
    with run.attach(controller):
        run.step(3)
    after = alone.parameters
    assert_scaled(run.parameters, before, after, dict.fromkeys(before, factor))
    assert not torch.equal(run.parameters["body.weight"], after["body.weight"])
    assert run.state == alone.state, "moments and counters are the optimizer's own"
    for name, seen in controller.seen[0].items():
        assert torch.equal(seen, after[name] - before[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_scale_in_other_precisions(dtype: torch.dtype) -> None:
    alone, run = prepared(sgd, dtype), prepared(sgd, dtype)
    before = run.parameters
    alone.step(3)
    with run.attach(scaling(0.5)):
        run.step(3)
    assert_scaled(run.parameters, before, alone.parameters, dict.fromkeys(before, 0.5))
    assert {tensor.dtype for tensor in run.parameters.values()} == {dtype}


@EVERY_OPTIMIZER
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_of_one_leaves_the_parameters_to_the_bit(
    optimizers: Callable[[nn.Module], list[Optimizer]], dtype: torch.dtype
) -> None:
    alone, run = prepared(optimizers, dtype), prepared(optimizers, dtype)
    every = Deciding(lambda step: [Scale(1.0, "nothing to object to.", name) for name in step.update.tensors])
    with run.attach(scaling(1.0), every) as session:
        for seed in (3, 4, 5):
            alone.step(seed)
            run.step(seed)
    assert_same_bits(run.parameters, alone.parameters)
    assert run.state == alone.state
    assert session.interventions == ()
    assert session.latest.value("redline_step_scale") == 1


def test_scale_of_one_keeps_a_negative_zero() -> None:
    run = Run(lambda model: [torch.optim.SGD(model.parameters(), 0.1)])
    with run.attach(scaling(1.0)):
        run.step(3)
    assert torch.signbit(run.parameters["silent"]).all()
    assert not run.parameters["silent"].any()


@EVERY_OPTIMIZER
def test_scale_of_zero_restores_the_parameters_to_the_bit(
    optimizers: Callable[[nn.Module], list[Optimizer]],
) -> None:
    run = prepared(optimizers)
    before = run.parameters
    with run.attach(scaling(0.0)):
        run.step(3)
    assert_same_bits(run.parameters, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_of_zero_restores_what_the_update_made_nan(dtype: torch.dtype) -> None:
    run = Run(lambda model: [torch.optim.SGD(model.parameters(), 0.1)], dtype)
    before = run.parameters
    controller = scaling(0.0)
    with run.attach(controller):
        run.backward(1)
        for parameter in run.model.parameters():
            parameter.grad = torch.full_like(parameter, float("nan"))
        run.optimizers[0].step()
    assert_same_bits(run.parameters, before)
    assert torch.signbit(run.parameters["silent"]).all()
    assert controller.norms[0] != controller.norms[0], "the controller saw the NaN"


def test_scale_of_zero_on_a_device_hides_an_update_that_is_not_finite() -> None:
    """From whoever asks next; the factor is a tensor that nobody has read."""
    transaction, parameter = StepTransaction(), nn.Parameter(torch.ones(3))
    transaction.save({"one": parameter})
    with torch.no_grad():
        parameter.fill_(float("nan"))
    transaction.scale(torch.tensor(0.0))
    assert transaction.update()["one"].tolist() == [0.0] * 3
    transaction.commit()
    assert parameter.tolist() == [1.0] * 3


@pytest.mark.parametrize("zero", [0.0, torch.tensor(0.0)], ids=["host", "device"])
@pytest.mark.parametrize("decay", [float("inf"), float("nan")])
def test_scale_of_zero_takes_back_a_decay_that_is_not_finite(zero: float | Tensor, decay: float) -> None:
    """As of a rate that is not finite, on whose update a guard then decides."""
    parameter = torch.tensor([1.0, -2.0])
    transaction = StepTransaction()
    transaction.save({"a": parameter})
    parameter += 1
    transaction.shrink("a", decay)
    transaction.scale_net("a", 0.5, decay)
    transaction.scale(zero)
    assert torch.equal(transaction.update()["a"], torch.zeros(2))
    transaction.commit()
    assert parameter.tolist() == [1.0, -2.0]


def test_controller_that_objects_to_nothing_leaves_no_trace() -> None:
    alone, run = prepared(), prepared()
    with run.attach(Deciding()) as session:
        for seed in (3, 4):
            alone.step(seed)
            run.step(seed)
    assert_same_bits(run.parameters, alone.parameters)
    assert session.interventions == ()
    assert sum(session.latest.series("redline_interventions_total").values()) == 0


@pytest.mark.parametrize("factor", [-0.1, float("nan"), float("inf")])
def test_scale_that_is_no_factor_is_refused(factor: float) -> None:
    with pytest.raises(ConfigurationError, match=r"got a scale of .*; expected a finite factor of at least 0"):
        Scale(factor, "as told.")


def test_scales_that_make_up_for_one_another_leave_the_optimizers_own_bits() -> None:
    run, alone = prepared(), prepared()
    with run.attach(scaling(2.0), Joint(lambda step: [Scale(0.5, "as told.")])):
        run.step(3)
        alone.step(3)
    assert_same_bits(run.parameters, alone.parameters)


# Single parameters first --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_parameters_are_scaled_first_and_the_joint_clamp_sees_what_is_left(dtype: torch.dtype) -> None:
    alone, run = prepared(sgd, dtype), prepared(sgd, dtype)
    before = run.parameters
    alone.step(3)
    after = alone.parameters
    joint, single = Joint(lambda step: [Scale(0.5, "joint.")]), scaling(0.25, "body.weight", per_parameter=True)
    with run.attach(joint, single) as session:  # in this order: which decides first is not up to it
        run.step(3)
    assert [one.controller for one in session.interventions] == ["Deciding", "Joint"]
    update = {name: after[name].float() - before[name].float() for name in before}
    assert single.norms[0] == pytest.approx(norm(update), rel=1e-5)
    left = {**update, "body.weight": 0.25 * update["body.weight"]}
    assert joint.norms[0] == pytest.approx(norm(left), rel=1e-5 if dtype is torch.float32 else 2e-2)
    assert joint.norms[0] < 0.9 * single.norms[0]
    if dtype is torch.float32:
        torch.testing.assert_close(joint.seen[0], left, rtol=1e-3, atol=1e-8)
        factors = dict.fromkeys(before, 0.5) | {"body.weight": 0.125}
        assert_scaled(run.parameters, before, after, factors)


def test_several_parameters_each_by_its_own_factor() -> None:
    alone, run = prepared(), prepared()
    before = run.parameters
    alone.step(3)
    factors = {"body.weight": 0.5, "body.bias": 0.0, "head.weight": 1.0, "head.bias": 0.1, "silent": 1.0}
    controller = Deciding(
        lambda step: [Scale(factor, "its own.", name) for name, factor in factors.items()], per_parameter=True
    )
    with run.attach(controller) as session:
        run.step(3)
    assert_scaled(run.parameters, before, alone.parameters, factors)
    assert frozen(run.parameters["body.bias"]) == frozen(before["body.bias"])
    assert frozen(run.parameters["head.weight"]) == frozen(alone.parameters["head.weight"])
    assert [one.action for one in session.interventions] == ["scale"] * 3, "a factor of 1 leaves no trace"


def test_joint_clamp_is_shown_the_tangent_of_what_is_left() -> None:
    run = Run(model=Linear)
    sizes: list[float] = []

    def clamp(step: Step) -> Iterable[Scale]:
        assert step.tangent(None) is not None
        assert step.normalized_step_size is not None
        sizes.append(float(step.normalized_step_size))
        return [Scale(0.5, "half of what is left.")]

    with run.attach(
        Joint(clamp, needs=Need.TANGENT),
        scaling(0.25, "weight", per_parameter=True),
        monitors=[redline.GhostRadius(1, max_samples=None)],
    ) as session:
        run.step(1)
        latest = session.latest
    proposed = latest.value("redline_normalized_step_size")
    assert sizes == [pytest.approx(0.25 * proposed, rel=1e-4)]
    assert latest.value("redline_committed_step_size") == pytest.approx(0.125 * proposed, rel=1e-4)
    assert latest.value("redline_step_scale") == 0.5
