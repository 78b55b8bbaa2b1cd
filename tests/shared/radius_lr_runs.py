"""What the tests of RadiusLR share: its runs, of every model and under every optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from step_lengths import BATCH, CLASSES, FEATURES, LengthRun, dropping, normalizing, plain
from torch import Tensor, nn
from torch.optim import Optimizer
from torch_optimizers import adamw, adamw_fused, muon_and_adamw, sgd

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


class Run(LengthRun):
    """On labels that can be learnt."""

    batch = staticmethod(batch)

    def times_rate(self, factor: float) -> Run:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] *= factor
        return self


def prepared(optimizers: Callable[[nn.Module], list[Optimizer]] = sgd, model: Callable[[], nn.Module] = plain) -> Run:
    """Two steps in, so that moments are there."""
    run = Run(optimizers, model)
    run.steps_of([1, 2])
    return run
