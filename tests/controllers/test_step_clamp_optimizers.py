"""StepClamp: optimizers that would undo it are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from step_clamp_runs import Answering, Run, batch
from torch import Tensor
from torch.optim import Optimizer

from redline import ConfigurationError, StepClamp


class Descent(Optimizer):
    """Gradient descent, for others to build on."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.move(parameter, group["lr"])

    def move(self, parameter: Tensor, rate: float) -> None:
        parameter -= rate * parameter.grad


class SGDScheduleFree(Descent):
    """The parameters are an average of a sequence ``z`` that is kept in the state."""

    def move(self, parameter: Tensor, rate: float) -> None:
        state = self.state[parameter]
        if not state:
            state["z"] = parameter.clone()
        state["z"] -= rate * parameter.grad
        parameter.lerp_(state["z"], 0.1)


class Averaging(SGDScheduleFree):
    """The same under a name that says nothing."""


class Lookahead(Descent):
    def move(self, parameter: Tensor, rate: float) -> None:
        state = self.state[parameter]
        if not state:
            state["slow"] = parameter.clone()
        super().move(parameter, rate)
        parameter.copy_(state["slow"].lerp_(parameter, 0.5))


class Precise(Descent):
    """Keeps float32 masters of half-precision parameters, under a key that nobody knows."""

    def move(self, parameter: Tensor, rate: float) -> None:
        state = self.state[parameter]
        if not state:
            state["wide"] = parameter.float()
        state["wide"] -= rate * parameter.grad.float()
        parameter.copy_(state["wide"])


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (SGDScheduleFree, "SGDScheduleFree keeps shadow weights"),
        (Lookahead, "Lookahead keeps shadow weights"),
        (torch.optim.LBFGS, "LBFGS moves the parameters many times within one step"),
    ],
)
def test_an_optimizer_known_to_undo_it_is_refused_at_once(kind: type[Optimizer], reason: str) -> None:
    run = Run(lambda model: [kind(model.parameters(), lr=0.1)])  # type: ignore[call-arg]
    untouched = run.everything
    with pytest.raises(
        ConfigurationError, match=f"got controllers on {kind.__name__}, which may only be monitored: {reason}"
    ):
        run.attach(StepClamp())
    assert run.everything == untouched
    with run.attach():  # watching is fine
        pass


@pytest.mark.parametrize(("kind", "dtype", "key"), [(Averaging, torch.float32, "z"), (Precise, torch.bfloat16, "wide")])
def test_an_optimizer_found_to_undo_it_is_refused_at_the_first_step(
    kind: type[Descent], dtype: torch.dtype, key: str
) -> None:
    alone, run = (
        Run(lambda model: [kind(model.parameters(), 0.1)], lambda: Answering(Tensor.float).to(dtype)) for _ in range(2)
    )

    def step(run: Run) -> None:
        x, y = batch(1)
        F.cross_entropy(run.model(x.to(dtype)), y).backward()
        run.update()

    step(alone)
    with (
        run.attach(StepClamp(1e-6)) as session,
        pytest.raises(ConfigurationError, match=rf"on {kind.__name__}.*keeps shadow weights \(state '{key}'\)"),
    ):
        step(run)
    assert run.everything == alone.everything, "nothing was scaled"
    assert session.interventions == ()
