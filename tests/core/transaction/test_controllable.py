"""Which optimizers may be controlled, and which may only be watched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from torch import Tensor, nn
from torch.optim import Optimizer
from torch_optimizers import adam
from transaction_runs import Deciding, Descent, Run, assert_scaled, norm, scaling, withholding

import redline
from redline import ConfigurationError, Scale


class Lookahead(Descent):
    """Keeps slow weights, and every second step writes the parameters from them."""

    def move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(steps=0, slow_buffer=parameter.clone())
        super().move(parameter, group)
        state["steps"] += 1
        if state["steps"] % 2 == 0:
            parameter.copy_(state["slow_buffer"].lerp_(parameter, 0.5))


class MasterWeights(Descent):
    """Works on float32 copies of half-precision parameters, under a name and a key that nobody knows."""

    def move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["precise"] = parameter.float()
        state["precise"] -= group["lr"] * parameter.grad.float()
        parameter.copy_(state["precise"])


def lookahead(model: nn.Module) -> list[Optimizer]:
    return [Lookahead(model.parameters(), 0.1)]


def master_weights(model: nn.Module) -> list[Optimizer]:
    return [MasterWeights(model.parameters(), 0.1)]


def lbfgs(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.LBFGS(model.parameters(), 0.1, max_iter=3)]


@pytest.mark.parametrize(
    ("optimizers", "message"),
    [
        (lbfgs, "got controllers on LBFGS, which may only be monitored: LBFGS moves the parameters many times"),
        (lookahead, "got controllers on Lookahead, which may only be monitored: Lookahead keeps shadow weights"),
    ],
)
def test_optimizer_known_to_undo_control_is_refused_by_name(
    optimizers: Callable[[nn.Module], list[Optimizer]], message: str
) -> None:
    run = Run(optimizers)
    hooks = len(run.model._forward_pre_hooks), len(run.optimizers[0]._optimizer_step_pre_hooks)
    with pytest.raises(ConfigurationError, match=message):
        run.attach(Deciding())
    assert hooks == (len(run.model._forward_pre_hooks), len(run.optimizers[0]._optimizer_step_pre_hooks))


def test_one_of_several_that_undoes_control_is_refused() -> None:
    run = Run(lambda model: [torch.optim.SGD([model.head.weight], 0.1), Lookahead([model.body.weight], 0.1)])
    with pytest.raises(ConfigurationError, match="got controllers on Lookahead"):
        run.attach(Deciding())


def test_master_weights_are_found_out_when_they_appear() -> None:
    run = Run(master_weights, torch.bfloat16)
    with (
        run.attach(scaling(0.5)),
        pytest.raises(ConfigurationError, match=r"on MasterWeights.*keeps shadow weights \(state 'precise'\)"),
    ):
        run.step(1)


def test_master_weights_of_a_resumed_run_are_refused_at_once() -> None:
    run = Run(master_weights, torch.bfloat16)
    run.step(1)
    with pytest.raises(ConfigurationError, match="got controllers on MasterWeights, which may only be monitored"):
        run.attach(Deciding())


def test_master_weights_that_appear_after_a_withheld_step_are_found_out() -> None:
    run = Run(master_weights, torch.bfloat16)
    controller = Deciding(lambda step: [Scale(0.5, "as told.")], withhold=withholding(0))
    with run.attach(controller):
        run.step(1)
        with pytest.raises(ConfigurationError, match="got controllers on MasterWeights, which may only be monitored"):
            run.step(2)


@pytest.mark.parametrize(
    ("optimizers", "dtype"), [(lookahead, torch.float32), (master_weights, torch.bfloat16), (lbfgs, torch.float32)]
)
def test_optimizers_that_must_not_be_controlled_may_be_watched(
    optimizers: Callable[[nn.Module], list[Optimizer]], dtype: torch.dtype
) -> None:
    alone, run = Run(optimizers, dtype), Run(optimizers, dtype)

    def step(run: Run, seed: int) -> None:
        def closure() -> Tensor:
            run.optimizers[0].zero_grad()
            run.backward(seed)
            return torch.tensor(1.0)

        run.optimizers[0].step(closure) if optimizers is lbfgs else run.step(seed)

    with run.attach(monitors=[redline.UpdateSpectrum(1), redline.GhostRadius(1), redline.StepHealth(1)]) as session:
        for seed in range(3):
            before = run.parameters
            step(alone, seed)
            step(run, seed)
            update = {name: tensor.double() - before[name].double() for name, tensor in run.parameters.items()}
            assert session.latest.value("redline_update_norm") == pytest.approx(norm(update), rel=1e-3)
    assert_same_bits(run.parameters, alone.parameters)
    assert session.latest.value("redline_measurements_total", monitor="GhostRadius") == 3
    assert session.notes == ()


@pytest.mark.parametrize(
    "kind",
    [
        torch.optim.Adadelta,
        torch.optim.Adafactor,
        torch.optim.Adagrad,
        torch.optim.Adam,
        torch.optim.Adamax,
        torch.optim.ASGD,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.RMSprop,
        torch.optim.Rprop,
        torch.optim.SGD,
    ],
)
def test_optimizers_of_torch_may_be_controlled(kind: type[Optimizer]) -> None:
    """An average that is not read back, such as ASGD's, is no shadow weight."""
    alone, run = (Run(lambda model: [kind(model.parameters())]) for _ in range(2))
    before = run.parameters
    alone.step(1)
    with run.attach(scaling(0.5)) as session:
        run.step(1)
    assert_scaled(run.parameters, before, alone.parameters, dict.fromkeys(before, 0.5))
    assert len(session.interventions) == 1


def test_step_counter_that_equals_a_scalar_parameter_is_no_shadow_weight() -> None:
    """A gate of 1 behind a layer that starts at 0 has no gradient at first, and Adam's first count is 1."""
    run = Run(adam)
    run.model.gate = nn.Parameter(torch.tensor(1.0))
    run.model.gate.grad = torch.zeros(())
    run.optimizers[0].add_param_group({"params": [run.model.gate]})
    with run.attach(scaling(0.5)) as session:
        run.step(1)
    assert len(session.interventions) == 1
