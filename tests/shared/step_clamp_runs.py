"""What the tests of StepClamp share: its runs, a model that answers as told, and a step far too long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from step_lengths import BATCH, CLASSES, FEATURES, LengthRun, plain
from torch import Tensor, nn
from torch.optim import Optimizer
from torch_optimizers import adamw, adamw_fused, muon_and_adamw, sgd

EVERY_OPTIMIZER = pytest.mark.parametrize(
    "optimizers", [sgd, adamw, adamw_fused, muon_and_adamw], ids=lambda make: make.__name__
)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, FEATURES, generator=generator)
    return x, torch.randint(0, CLASSES, (BATCH,), generator=generator)


class Run(LengthRun):
    """On labels drawn at random."""

    batch = staticmethod(batch)


def prepared(optimizers: Callable[[nn.Module], list[Optimizer]] = sgd, model: Callable[[], nn.Module] = plain) -> Run:
    """Two steps in, so that moments are there."""
    run = Run(optimizers, model)
    run.step(1)
    run.step(2)
    return run


class Answering(nn.Module):
    """Its output is made of the logits."""

    def __init__(self, answer: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net = plain()
        self.answer = answer

    def forward(self, x: Tensor) -> Any:
        return self.answer(self.net(x))


def overlong() -> tuple[Run, Callable[[Run], None]]:
    """A run, and a step of it whose update is finite, along which the logits' tangent is not."""
    run = Run(lambda model: [torch.optim.SGD(model.parameters(), 1e-10, momentum=0.9)], lambda: nn.Linear(4, 3))
    run.model.get_parameter("bias").data[0] = -0.0  # whose sign a sum with 0 would lose

    def step(run: Run) -> None:
        run.optimizers[0].zero_grad()
        x = 1e25 * torch.ones(1, 4)
        F.cross_entropy(run.model(x), run.model(x).argmin(-1)).backward()
        run.update()

    return run, step
