"""Optimizers with weight decay, decoupled from the gradient and not: torch's, and the tests' own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Muon,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
)

Make = Callable[..., Optimizer]


class Descent(Optimizer):
    """Gradient descent; subclasses say how a parameter moves."""

    def __init__(self, params: Any, lr: float = 0.1, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.move(parameter, group, group["lr"], group["weight_decay"])

    def move(self, parameter: Tensor, group: dict[str, Any], lr: float, decay: float) -> None:
        parameter.mul_(1 - lr * decay).sub_(lr * parameter.grad)


class Lion(Descent):
    """Sign updates of an interpolated momentum."""

    def move(self, parameter: Tensor, group: dict[str, Any], lr: float, decay: float) -> None:
        state, gradient = self.state[parameter], parameter.grad
        momentum = state.setdefault("momentum", torch.zeros_like(parameter))
        parameter.mul_(1 - lr * decay).sub_(lr * (0.9 * momentum + 0.1 * gradient).sign())
        momentum.lerp_(gradient, 0.01)


class CoupledLion(Lion):
    """The decay is lost in the sign."""

    def move(self, parameter: Tensor, group: dict[str, Any], lr: float, decay: float) -> None:
        parameter.grad.add_(parameter, alpha=decay)
        super().move(parameter, group, lr, 0.0)


class OwnRate(Descent):
    """Decays by the weight decay alone, whatever the learning rate."""

    def move(self, parameter: Tensor, group: dict[str, Any], lr: float, decay: float) -> None:
        super().move(parameter, group, lr, decay / lr)


class DecayLast(Descent):
    """Shrinks what the update has made of the parameter, not what was there before it."""

    def move(self, parameter: Tensor, group: dict[str, Any], lr: float, decay: float) -> None:
        super().move(parameter, group, lr, 0.0)
        parameter.mul_(1 - lr * decay)


class EverySecond(Descent):
    """Leaves the decay out at every second step."""

    every = 2

    def move(self, parameter: Tensor, group: dict[str, Any], lr: float, decay: float) -> None:
        state = self.state[parameter]
        state["moves"] = state.get("moves", 0) + 1
        super().move(parameter, group, lr, decay if state["moves"] % self.every else 0.0)


class EveryThird(EverySecond):
    every = 3


class Cautious(Descent):
    """Decays only where that goes along with the gradient."""

    def move(self, parameter: Tensor, group: dict[str, Any], lr: float, decay: float) -> None:
        along = (parameter * parameter.grad > 0).to(parameter.dtype)
        parameter.sub_(lr * decay * along * parameter + lr * parameter.grad)


class ByShape(Descent):
    """Adjusts its rate to the shape, and decays by what it makes of it."""

    def move(self, parameter: Tensor, group: dict[str, Any], lr: float, decay: float) -> None:
        rows, columns = parameter.shape
        super().move(parameter, group, lr * (rows / columns) ** 0.5, decay)


class Anchored(Descent):
    """Pulls towards where it started, not towards 0."""

    def move(self, parameter: Tensor, group: dict[str, Any], lr: float, decay: float) -> None:
        start = self.state[parameter].setdefault("start", parameter.clone())
        pull = lr * decay * (parameter - start)
        parameter.sub_(pull + lr * parameter.grad)


class Raising(Descent):
    def move(self, parameter: Tensor, group: dict[str, Any], lr: float, decay: float) -> None:
        raise KeyError("of its own making")


DECOUPLED: list[tuple[Make, dict[str, Any]]] = [
    (AdamW, {}),
    (AdamW, {"foreach": True}),
    (AdamW, {"fused": True}),
    (AdamW, {"amsgrad": True, "maximize": True}),
    (Adam, {"decoupled_weight_decay": True}),
    (NAdam, {"decoupled_weight_decay": True}),
    (RAdam, {"decoupled_weight_decay": True}),
    (Muon, {}),
    (Muon, {"adjust_lr_fn": "original"}),
    (Muon, {"adjust_lr_fn": "match_rms_adamw", "nesterov": False}),
    (SGD, {}),
    (SGD, {"foreach": True, "maximize": True}),
    (Adafactor, {}),
    (ASGD, {"lambd": 0.0}),
    (Descent, {}),
    (Lion, {}),
]
COUPLED: list[tuple[Make, dict[str, Any]]] = [
    (Adam, {}),
    (NAdam, {}),
    (RAdam, {}),
    (SGD, {"momentum": 0.9}),
    (SGD, {"momentum": 0.9, "nesterov": True}),
    (SGD, {"momentum": 0.5, "dampening": 0.9}),
    (Adagrad, {}),
    (RMSprop, {}),
    (Adadelta, {}),
    (Adamax, {}),
    (ASGD, {}),  # its rate falls with time, and the decay with it
    (ASGD, {"lambd": 0.1}),
    (CoupledLion, {}),
    (OwnRate, {}),
    (DecayLast, {}),
    (EverySecond, {}),
    (EveryThird, {}),
    (Cautious, {}),
    (ByShape, {}),
    (Anchored, {}),
]


def ids(value: Any) -> str:
    return value.__name__ if isinstance(value, type) else "-".join(map(str, value.items() if value else ["plain"]))
