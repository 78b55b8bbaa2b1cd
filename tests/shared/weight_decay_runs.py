"""What the tests of WeightDecayControl share: optimizers, nets, and runs of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import ControlledRun
from torch import Tensor, nn
from torch.optim import Optimizer

import redline

IN_FORCE = "redline_weight_decay_in_force"


FEATURES, CLASSES, BATCH = 6, 3, 16


BODY, HEAD = "body.weight", "head.weight"


def true_sigma(tensor: Tensor) -> float:
    return float(torch.linalg.matrix_norm(tensor.detach().double(), 2))


class Net(nn.Module):
    """Two matrices, and vectors that nobody holds."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


class Stack(nn.Module):
    """A convolution, and a stack of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3)
        self.experts = nn.Parameter(torch.randn(3, 4, 4))
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x.reshape(-1, 2, 3)).flatten(1)
        return self.head(torch.tanh(torch.einsum("eij,bj->bi", self.experts, x)))


class Invariant(nn.Module):
    """Indifferent to the scale of its matrices: each is followed by an RMS norm. The readout does not train."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(2))
        self.register_buffer("readout", 3 * torch.randn(10, width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.rms_norm(layer(x), (x.shape[-1],))
        return x @ self.readout.T


LAYERS = ["layers.0.weight", "layers.1.weight"]


class Lion(Optimizer):
    """Chen et al. (arXiv 2302.06675), by hand: sign updates with decoupled decay."""

    def __init__(self, parameters: Iterable[Tensor], lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            fast, slow = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(group["lr"] * torch.sign(momentum.lerp(parameter.grad, 1 - fast)))
                momentum.lerp_(parameter.grad, 1 - slow)


def adamw(model: nn.Module, **settings: Any) -> list[Optimizer]:
    return [torch.optim.AdamW(model.parameters(), **{"lr": 2e-2, "weight_decay": 0.3, **settings})]


def adamw_fused(model: nn.Module) -> list[Optimizer]:
    return adamw(model, fused=True)


def adamw_foreach(model: nn.Module) -> list[Optimizer]:
    return adamw(model, foreach=True)


def adamw_with_a_rate_in_a_tensor(model: nn.Module) -> list[Optimizer]:
    return adamw(model, lr=torch.tensor(2e-2), foreach=False)


def adamw_in_groups(model: nn.Module) -> list[Optimizer]:
    """Whose rates and decays differ."""
    parameters = list(model.parameters())
    groups = [
        {"params": parameters[:2], "lr": 1e-2, "weight_decay": 0.7},
        {"params": parameters[2:], "lr": 4e-2, "weight_decay": 0.2},
    ]
    return [torch.optim.AdamW(groups)]


def sgd(model: nn.Module) -> list[Optimizer]:
    """Without momentum, so that its decay is decoupled."""
    return [torch.optim.SGD(model.parameters(), 0.2, weight_decay=0.1)]


def lion(model: nn.Module) -> list[Optimizer]:
    return [Lion(model.parameters(), 1e-2, 0.5)]


def muon_and_adamw(model: nn.Module) -> list[Optimizer]:
    body, *rest = model.parameters()
    return [torch.optim.Muon([body], 0.05, weight_decay=0.2), torch.optim.AdamW(rest, 2e-2, weight_decay=0.3)]


EVERY_OPTIMIZER = pytest.mark.parametrize(
    "optimizers",
    [
        adamw,
        adamw_fused,
        adamw_foreach,
        adamw_with_a_rate_in_a_tensor,
        adamw_in_groups,
        sgd,
        lion,
        muon_and_adamw,
    ],
    ids=lambda make: make.__name__,
)


class Run(ControlledRun):
    """A model with its optimizers; two made alike are alike."""

    def __init__(
        self,
        optimizers: Callable[[nn.Module], list[Optimizer]] = adamw,
        model: Callable[[], nn.Module] = Net,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        torch.manual_seed(0)
        self.model = model().to(dtype)
        self.dtype = dtype
        self.optimizers = optimizers(self.model)
        self.session: redline.Session | None = None

    def backward(self, seed: int) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        x = torch.randn(BATCH, FEATURES, generator=torch.Generator().manual_seed(seed)).to(self.dtype)
        F.cross_entropy(self.model(x).float(), x[:, :CLASSES].argmax(1)).backward()  # can be learned

    def step(self, seed: int) -> None:
        self.backward(seed)
        for optimizer in self.optimizers:
            optimizer.step()

    def steps(self, first: int, last: int) -> None:
        for seed in range(first, last):
            self.step(seed)

    def group_of(self, name: str) -> dict[str, Any]:
        parameter = self.model.get_parameter(name)
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        return next(group for group in groups if any(one is parameter for one in group["params"]))

    def in_force(self) -> dict[str, float]:
        assert self.session is not None
        return self.session.latest.layers(IN_FORCE)


def assert_decayed_by(
    actual: Tensor, before: Tensor, proposed: Tensor, lr: float, group_decay: float, decay: float
) -> None:
    """``W + q - lr wd W`` with ``q`` the update net of the group's decay; in float64, to the rounding of the dtype."""
    w, p = before.double(), proposed.double() - before.double()
    expected = w + (p + lr * group_decay * w) - lr * decay * w
    bound = 2 * torch.finfo(actual.dtype).eps * (w.abs() + p.abs() + lr * (decay + group_decay) * w.abs())
    assert bool(((actual.double() - expected).abs() <= bound).all())


class Feedback:
    """The equation of the docstring for one matrix, in float64 and with true singular values."""

    def __init__(
        self, target: float, group_decay: float, every: int, horizon: int, bounds: tuple[float, float] = (0.0, 10.0)
    ) -> None:
        self.target, self.decay, self.every, self.horizon, self.bounds = target, group_decay, every, horizon, bounds
        self.at: int | None = None
        self.x: float | None = None
        self.rates: list[float] = []
        self.shrunk = 0.0

    def decide(self, index: int, weight: Tensor, lr: float, *, moves: bool = True) -> float:
        """The decay in force at a step; ``lr``: that the matrix is moved with, if it is moved."""
        if self.at is None or index >= self.at + self.every:
            self.at = index
            if moves:
                self.measure(true_sigma(weight) ** 2, lr)
        in_force = min(self.decay, 1 / (self.every * lr)) if lr else self.decay
        if moves:
            self.rates.append(lr)
            self.shrunk += lr * in_force
        return in_force

    def measure(self, x: float, lr: float) -> None:
        rate = float(np.mean(self.rates)) if self.rates else lr
        if self.x is None:
            self.growth = 2 * lr * self.decay * x
        else:
            self.growth *= min((rate / self.rate) ** 2, 1.0) if self.rate else 1.0
            kept = math.exp(-2 * self.shrunk)
            mean = (1 - kept) / (2 * self.shrunk) if self.shrunk else 1.0  # of exp(-2 s) over the interval
            self.growth = (self.growth + max((x - self.x * kept) / (len(self.rates) * mean), 0.0)) / 2
        wanted = self.growth + (x - self.target**2) / self.horizon
        self.decay = float(np.clip(wanted / (2 * rate * x) if rate and x else self.decay, *self.bounds))
        self.x, self.rate, self.rates, self.shrunk = x, rate, [], 0.0
