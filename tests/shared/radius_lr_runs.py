"""What the tests of RadiusLR share: its runs, of every model and under every optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from runs import ControlledRun
from step_lengths import BATCH, CLASSES, FEATURES, adamw, adamw_fused, dropping, muon_and_adamw, normalizing, plain, sgd
from torch import Tensor, nn
from torch.optim import Optimizer

import redline
from redline import RadiusLR

R, COMMITTED, SCALE = "redline_normalized_step_size", "redline_committed_step_size", "redline_step_scale"


EVERY_MODEL = pytest.mark.parametrize("model", [plain, dropping, normalizing], ids=lambda make: make.__name__)


def unlimited(r: float = 1.0, **arguments: Any) -> RadiusLR:
    """As in the paper: without the two limits that go with it."""
    return RadiusLR(r, **{"max_update_to_weight": None, "max_growth": None, **arguments})


def bare_sgd(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.SGD(model.parameters(), 0.1)]


EVERY_OPTIMIZER = pytest.mark.parametrize(
    "optimizers", [bare_sgd, sgd, adamw, adamw_fused, muon_and_adamw], ids=lambda make: make.__name__
)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(BATCH, FEATURES, generator=torch.Generator().manual_seed(seed))
    return x, x[:, :CLASSES].argmax(1)


class Run(ControlledRun):
    """A model with its optimizers; two made alike are alike."""

    def __init__(
        self, optimizers: Callable[[nn.Module], list[Optimizer]] = sgd, model: Callable[[], nn.Module] = plain
    ) -> None:
        torch.manual_seed(0)
        self.model = model()
        self.optimizers = optimizers(self.model)
        self.session: redline.Session | None = None

    def times_rate(self, factor: float) -> Run:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] *= factor
        return self

    def backward(self, seed: int) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        x, y = batch(seed)
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


def prepared(optimizers: Callable[[nn.Module], list[Optimizer]] = sgd, model: Callable[[], nn.Module] = plain) -> Run:
    """Two steps in, so that moments are there."""
    run = Run(optimizers, model)
    run.steps_of([1, 2])
    return run
