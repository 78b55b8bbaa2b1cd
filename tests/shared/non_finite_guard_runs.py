"""What the tests of NonFiniteGuard share: optimizers, batches, and a run whose gradients or rate can be spoiled.

Most tests train two identical models: one is guarded and meets something that is not finite, the other never does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bits import frozen
from torch import Tensor, nn
from torch.optim import Optimizer
from torch_optimizers import adamw_foreach, adamw_fused, muon_and_adamw, sgd

import redline
from redline import NonFiniteGuard

Spoil = Callable[[nn.Module], None]


FEATURES, CLASSES = 6, 3


class Net(nn.Module):
    """With running statistics, which a NaN in the inputs would poison for good."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(FEATURES, 8)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.body(x))))


def sgd_fused(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-2, fused=True)]


def adamw(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.AdamW(model.parameters(), 1e-2, foreach=False)]


EVERY_OPTIMIZER = pytest.mark.parametrize(
    "optimizers", [sgd, adamw, adamw_foreach, adamw_fused, muon_and_adamw], ids=lambda make: make.__name__
)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, FEATURES, generator=generator)
    return x, torch.randint(0, CLASSES, (16,), generator=generator)


def bad_batch(seed: int) -> tuple[Tensor, Tensor]:
    x, y = batch(seed)
    x[3, 1] = math.nan
    return x, y


class Run:
    """A model with its optimizers; two made alike are alike."""

    def __init__(
        self, optimizers: Callable[[nn.Module], list[Optimizer]] = sgd, model: Callable[[], nn.Module] = Net
    ) -> None:
        torch.manual_seed(0)
        self.model = model()
        self.optimizers = optimizers(self.model)

    def step(self, data: tuple[Tensor, Tensor], spoil: Spoil | None = None) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        F.cross_entropy(self.model(data[0]), data[1]).backward()
        if spoil is not None:
            spoil(self.model)
        for optimizer in self.optimizers:
            optimizer.step()

    def attach(self, guard: redline.Controller | None = None, **arguments: Any) -> redline.Session:
        controllers = [NonFiniteGuard() if guard is None else guard]
        return redline.attach(self.model, self.optimizers, monitors=[], controllers=controllers, **arguments)

    def set_rate(self, rate: float) -> list[float]:
        """Of every group; gives the rates there were."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        rates = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = rate
        return rates

    def step_at_rate(self, data: tuple[Tensor, Tensor], rate: float) -> None:
        """A step whose gradients are finite, and whose update is not, if the rate is not."""
        rates = iter(self.set_rate(rate))
        try:
            self.step(data)
        finally:
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = next(rates)

    @property
    def parameters(self) -> Any:
        return frozen(dict(self.model.named_parameters()))

    @property
    def buffers(self) -> Any:
        return frozen(dict(self.model.named_buffers()))

    @property
    def state(self) -> Any:
        return [frozen(optimizer.state_dict()) for optimizer in self.optimizers]

    @property
    def everything(self) -> Any:
        return {"parameters": self.parameters, "buffers": self.buffers, "state": self.state}


def is_finite(model: nn.Module) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())


def gradients_of(value: float, *names: str) -> Spoil:
    """Writes ``value`` into one entry of the gradient of each parameter named."""

    def spoil(model: nn.Module) -> None:
        for name in names:
            gradient = model.get_parameter(name).grad
            assert gradient is not None
            gradient.view(-1)[-1] = value

    return spoil


def actions(session: redline.Session) -> list[tuple[int, str]]:
    return [(one.step, one.action) for one in session.interventions]
