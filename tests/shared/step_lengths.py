"""What the tests of StepClamp and RadiusLR share: models, optimizers, and ``r`` by a Jacobian in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F
from runs import ControlledRun
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.optim import Optimizer
from torch_optimizers import sgd

import redline

FEATURES, CLASSES, BATCH = 6, 3, 16


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, CLASSES))


def normalizing() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, CLASSES))


def spreads(model: nn.Module, before: dict[str, Tensor], after: dict[str, Tensor], x: Tensor) -> np.ndarray:
    """Of each sample's logit tangent along the update, by the whole Jacobian in float64; dropout off."""
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    point = {name: tensor.double() for name, tensor in before.items()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def logits(parameters: dict[str, Tensor]) -> Tensor:
        state = {**parameters, **{name: buffer.clone() for name, buffer in buffers.items()}}
        return functional_call(model, state, (x.double(),))

    jacobian = jacrev(logits)(point)
    tangent = sum((jacobian[name].flatten(2) @ (after[name].double() - point[name]).flatten()) for name in point)
    return (tangent.amax(-1) - tangent.amin(-1)).numpy()


def reference(model: nn.Module, before: dict[str, Tensor], after: dict[str, Tensor], x: Tensor) -> float:
    return float(spreads(model, before, after, x).max() / math.pi)


def assert_scaled(
    actual: dict[str, Tensor], before: dict[str, Tensor], after: dict[str, Tensor], factor: float
) -> None:
    """``theta_before + factor * p`` to the rounding of float32; computed in float64."""
    for name in before:
        update = after[name].double() - before[name].double()
        expected = before[name].double() + factor * update
        bound = 2 * torch.finfo(torch.float32).eps * (expected.abs() + factor * update.abs())
        assert bool(((actual[name].double() - expected).abs() <= bound).all()), name


class LengthRun(ControlledRun):
    """A model with its optimizers; two made alike are alike."""

    batch: Callable[[int], tuple[Tensor, Tensor]]
    """The data of a step, by its seed."""

    def __init__(
        self, optimizers: Callable[[nn.Module], list[Optimizer]] = sgd, model: Callable[[], nn.Module] = plain
    ) -> None:
        torch.manual_seed(0)
        self.model = model()
        self.optimizers = optimizers(self.model)
        self.session: redline.Session | None = None

    def backward(self, seed: int) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        x, y = self.batch(seed)
        loss = F.cross_entropy(self.model(x), y)
        if self.session is not None:
            self.session.observe(loss=loss)
        loss.backward()

    def update(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def step(self, seed: int) -> None:
        self.backward(seed)
        self.update()

    def steps_of(self, seeds: Iterable[int]) -> None:
        for seed in seeds:
            self.step(seed)
