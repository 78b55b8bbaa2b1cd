"""Controllers that fail: the step is left as it is, and the error names who failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from bits import assert_same_bits
from torch import nn
from torch.optim import Optimizer
from transaction_runs import EVERY_OPTIMIZER, Deciding, Joint, norm, prepared, scaling

import redline
from redline import ConfigurationError, ControllerError, Scale, Step, Withhold


def fail(step: Step) -> Any:
    raise ZeroDivisionError("of its own making")


@EVERY_OPTIMIZER
def test_controller_that_raises_leaves_the_step_as_it_is(
    optimizers: Callable[[nn.Module], list[Optimizer]],
) -> None:
    alone, run = prepared(optimizers), prepared(optimizers)
    alone.step(3)
    with run.attach(Deciding(fail)):
        with pytest.raises(
            ControllerError, match=r"Deciding failed at step 0 with ZeroDivisionError: of its own making"
        ):
            run.step(3)
        assert_same_bits(run.parameters, alone.parameters)
        assert run.state == alone.state


def test_controller_that_raises_before_the_update_leaves_parameters_and_gradients() -> None:
    run = prepared()
    before, state = run.parameters, run.state
    with run.attach(Deciding(withhold=fail)):
        run.backward(3)
        gradient = run.model.get_parameter("body.weight").grad
        with pytest.raises(ControllerError, match="Deciding failed at step 0 with ZeroDivisionError"):
            run.optimizers[0].step()
        assert_same_bits(run.parameters, before)
        assert run.state == state
        assert run.model.get_parameter("body.weight").grad is gradient


def test_controller_that_raises_undoes_what_others_decided_before_it() -> None:
    """The error says that the parameters are as the optimizer left them: then they are."""
    alone, run = prepared(), prepared()
    alone.step(3)
    with run.attach(scaling(0.5), Joint(fail)):
        with pytest.raises(ControllerError, match="The parameters are as the optimizer left them"):
            run.step(3)
        assert_same_bits(run.parameters, alone.parameters)


@pytest.mark.parametrize("moment", ["answer", "withhold"])
def test_run_can_go_on_after_a_controller_failed(moment: str) -> None:
    run = prepared()

    def once(step: Step) -> Any:
        if step.index == 0 and not failed:
            failed.append(True)
            raise ZeroDivisionError("of its own making")
        return [Scale(0.5, "as told.")] if moment == "answer" else None

    failed: list[bool] = []
    controller = Deciding(once) if moment == "answer" else Deciding(withhold=once)
    with run.attach(controller, monitors=[redline.StepHealth(1)]) as session:
        with pytest.raises(ControllerError, match="ZeroDivisionError"):
            run.step(3)
        run.optimizers[0].zero_grad()
        run.backward(4)
        expected = norm({name: p.grad for name, p in run.model.named_parameters() if p.grad is not None})
        before = run.parameters
        run.optimizers[0].step()
        assert session.latest.value("redline_gradient_norm") == pytest.approx(expected, rel=1e-5)
        moved = {name: tensor - before[name] for name, tensor in run.parameters.items()}
        factor = 0.5 if moment == "answer" else 1.0
        assert norm(moved) == pytest.approx(factor * controller.norms[-1], rel=1e-3)


@pytest.mark.parametrize(
    "controller",
    [
        pytest.param(lambda: scaling(0.5, "no.such.parameter"), id="a parameter that is none"),
        pytest.param(lambda: Deciding(lambda step: None), id="no list"),  # type: ignore[arg-type,return-value]
        pytest.param(lambda: Deciding(lambda step: [0.5]), id="a bare number"),
        pytest.param(lambda: Deciding(lambda step: [Withhold("too late.")]), id="a withhold after the update"),
        pytest.param(lambda: Deciding(withhold=lambda step: True), id="a bare yes"),  # type: ignore[arg-type,return-value]
    ],
)
def test_answer_that_is_no_decision_is_refused_by_name(controller: Callable[[], Deciding]) -> None:
    run = prepared()
    with (
        run.attach(controller()),
        pytest.raises((ControllerError, ConfigurationError), match=r"Deciding|no\.such\.parameter"),
    ):
        run.step(3)
