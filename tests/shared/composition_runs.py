"""What the tests of controllers together share: runs under five of them, each of which acts."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from runs import ControlledRun
from step_lengths import BATCH, CLASSES, FEATURES
from torch import Tensor, nn
from torch.optim import Optimizer
from weight_decay_runs import BODY, HEAD, Net, adamw, muon_and_adamw

import redline
from redline import NonFiniteGuard, RadiusLR, StepClamp, UpdateClamp, WeightDecayControl

COMMITTED, SCALE = "redline_committed_step_size", "redline_step_scale"
EVERY_OPTIMIZER = pytest.mark.parametrize("optimizers", [adamw, muon_and_adamw], ids=lambda make: make.__name__)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(BATCH, FEATURES, generator=torch.Generator().manual_seed(seed))
    return x, x[:, :CLASSES].argmax(1)


class Run(ControlledRun):
    """A model with its optimizers; two made alike are alike."""

    def __init__(self, optimizers: Callable[[nn.Module], list[Optimizer]] = adamw) -> None:
        torch.manual_seed(0)
        self.model = Net()
        self.optimizers = optimizers(self.model)
        self.session: redline.Session | None = None

    def step(self, seed: int, broken: bool = False) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        x, y = batch(seed)
        loss = F.cross_entropy(self.model(x), y)
        if self.session is not None:
            self.session.observe(loss=loss)
        loss.backward()
        if broken:
            next(self.model.parameters()).grad.view(-1)[0] = math.nan  # type: ignore[union-attr]
        for optimizer in self.optimizers:
            optimizer.step()

    def steps(self, first: int, last: int) -> None:
        for seed in range(first, last):
            self.step(seed)


def radius_lr(r: float) -> RadiusLR:
    return RadiusLR(r, max_update_to_weight=None, max_growth=None)


# Each acts: the length, the whole, single matrices, decay, and a batch that is not finite.
FIVE: dict[str, Callable[[], redline.Controller]] = {
    "UpdateClamp": lambda: UpdateClamp(0.02),
    "WeightDecayControl": lambda: WeightDecayControl({BODY: 1.3, HEAD: 0.8}, every=2, horizon=20),
    "RadiusLR": lambda: radius_lr(0.5),
    "StepClamp": lambda: StepClamp(0.02),
    "NonFiniteGuard": lambda: NonFiniteGuard(),
}
