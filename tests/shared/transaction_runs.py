"""What the tests of the step transaction share: controllers that decide as told, and runs that compare bit by bit.

Each test trains two identical models: one is left alone and says what the optimizer proposes, the other is controlled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bits import frozen
from torch import Tensor, nn
from torch.optim import Optimizer
from torch_optimizers import adam, adamw_foreach, adamw_fused, muon_and_adamw, sgd

import redline
from redline import Need, Scale, Step, Withhold

Answer = Callable[[Step], Iterable[Any]]


class Deciding(redline.Controller):
    """Answers what it is told to, and keeps what it was shown."""

    def __init__(
        self,
        answer: Answer = lambda step: (),
        *,
        withhold: Callable[[Step], Withhold | None] = lambda step: None,
        per_parameter: bool = False,
        snapshots_state: bool = False,
        needs: Need = Need.UPDATE,
    ) -> None:
        self.answer, self.withhold = answer, withhold
        self.per_parameter, self.snapshots_state, self.needs = per_parameter, snapshots_state, needs
        self.seen: list[dict[str, Tensor]] = []
        self.norms: list[float] = []

    def before_update(self, step: Step) -> Withhold | None:
        return self.withhold(step)

    def inspect(self, step: Step) -> Iterable[Any]:
        if Need.UPDATE in self.needs:
            self.seen.append({name: tensor.clone() for name, tensor in step.update.tensors.items()})
            self.norms.append(float(step.update.norm))
        return self.answer(step)


class Joint(Deciding):
    """Another class, so that it has another name in a session."""


def scaling(factor: float, parameter: str | None = None, **options: Any) -> Deciding:
    return Deciding(lambda step: [Scale(factor, "as told.", parameter, {"factor": factor})], **options)


def at(index: int, decision: Any) -> Answer:
    return lambda step: [decision] if step.index == index else []


def withholding(index: int) -> Callable[[Step], Withhold | None]:
    return lambda step: Withhold("as told.", {"index": float(index)}) if step.index == index else None


class Net(nn.Module):
    """A matrix large enough for rounding to show, a head, and a parameter of -0.0 whose gradient is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(200, 150)
        self.head = nn.Linear(150, 4)
        self.silent = nn.Parameter(torch.full((3,), -0.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


class Linear(nn.Module):
    """Logits that are linear in the one parameter: a scaled step has exactly a scaled r."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 200) / 20)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class Descent(Optimizer):
    """Gradient descent, and what subclasses do about it."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.move(parameter, group)

    def move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        parameter -= group["lr"] * parameter.grad


EVERY_OPTIMIZER = pytest.mark.parametrize("optimizers", [sgd, adam, adamw_foreach, adamw_fused, muon_and_adamw])


class Run:
    """A model with its optimizers; two made alike are alike."""

    def __init__(
        self,
        optimizers: Callable[[nn.Module], list[Optimizer]] = sgd,
        dtype: torch.dtype = torch.float32,
        model: Callable[[], nn.Module] = Net,
    ) -> None:
        torch.manual_seed(0)
        self.model = model().to(dtype)
        self.dtype = dtype
        self.optimizers = optimizers(self.model)

    def backward(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(16, 200, generator=generator).to(self.dtype)
        y = torch.randint(0, 4, (16,), generator=generator)
        F.cross_entropy(self.model(x).float(), y).backward()
        if isinstance(self.model, Net):
            self.model.silent.grad = torch.zeros_like(self.model.silent)

    def step(self, seed: int) -> None:
        self.backward(seed)
        for optimizer in self.optimizers:
            optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def attach(self, *controllers: redline.Controller, monitors: Sequence[redline.Monitor] = ()) -> redline.Session:
        return redline.attach(self.model, self.optimizers, monitors=monitors, controllers=controllers)

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    @property
    def state(self) -> list[Any]:
        return [frozen(optimizer.state_dict()) for optimizer in self.optimizers]


def assert_scaled(
    actual: dict[str, Tensor], before: dict[str, Tensor], after: dict[str, Tensor], factors: dict[str, float]
) -> None:
    """``theta_before + factor * p`` to the rounding of the parameters' own type; computed in float64."""
    for name, factor in factors.items():
        update = after[name].double() - before[name].double()
        expected = before[name].double() + factor * update
        error = (actual[name].double() - expected).abs()
        bound = 2 * torch.finfo(actual[name].dtype).eps * (expected.abs() + factor * update.abs())
        assert bool((error <= bound).all()), f"{name} is off by up to {float(error.max()):.3g}"


def norm(tensors: dict[str, Tensor]) -> float:
    return float(torch.stack([tensor.double().norm() for tensor in tensors.values()]).norm())


def prepared(optimizers: Callable[[nn.Module], list[Optimizer]] = sgd, dtype: torch.dtype = torch.float32) -> Run:
    """Two steps in, so that moments are there."""
    run = Run(optimizers, dtype)
    run.step(1)
    run.step(2)
    return run
