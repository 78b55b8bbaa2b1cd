"""What the tests of the Lightning callback share: modules to train, data, a trainer, and what is kept of a fit."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sinks import Keep
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

import redline
from redline.integrations.lightning import RedlineCallback

# Each file's `pytestmark`: what Lightning and its dependencies warn of.
QUIET = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX`:UserWarning"),
]

R = "redline_normalized_step_size"
FEATURES, CLASSES = 6, 3


def seed(value: int) -> None:
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002 the run's own stream
    torch.manual_seed(value)


class Task(pl.LightningModule):
    """Cross-entropy by automatic optimization; what ``training_step`` calls is left to subclasses."""

    def __init__(self, optimizer: Callable[[Any], Optimizer] | None = None) -> None:
        super().__init__()
        self.make_optimizer = optimizer or partial(torch.optim.SGD, lr=0.1)
        self.losses: list[float] = []

    def logits(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.logits(batch[0]), batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return self.make_optimizer([p for p in self.parameters() if p.requires_grad])


def plain_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))


class CallsItself(Task):
    """``training_step`` calls ``self(x)``."""

    def __init__(self, net: nn.Module | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.net = net or plain_net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def logits(self, x: Tensor) -> Tensor:
        return self(x)


class CallsItsNet(Task):
    """``training_step`` calls ``self.net(x)``."""

    def __init__(self, net: nn.Module | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.net = net or plain_net()

    def logits(self, x: Tensor) -> Tensor:
        return self.net(x)


class TwoOptimizers(CallsItself):
    """Manual optimization: Muon for the matrices and AdamW for the rest, stepped together."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__(net)
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.losses.append(loss.item())
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> list[Optimizer]:
        trained = [p for p in self.parameters() if p.requires_grad]
        return [
            torch.optim.Muon([p for p in trained if p.dim() == 2], lr=0.02),
            torch.optim.AdamW([p for p in trained if p.dim() != 2], lr=0.01),
        ]


def data(batches: int = 20, size: int = 8, *, same: bool = False) -> DataLoader[Any]:
    """``batches`` batches of random samples, or of always the same ones."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batches * size, FEATURES, generator=generator)
    y = torch.randint(CLASSES, (batches * size,), generator=generator)
    if same:
        x, y = x[:size].repeat(batches, 1), y[:size].repeat(batches)
    return DataLoader(TensorDataset(x, y), batch_size=size)


def trainer(*callbacks: pl.Callback, **arguments: Any) -> pl.Trainer:
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**quiet, **arguments})


def measuring_r(**arguments: Any) -> tuple[RedlineCallback, Keep]:
    """A callback that measures r and health at every step, and what it showed."""
    keep = Keep()
    monitors = [redline.GhostRadius(every=1, max_samples=None), redline.StepHealth()]
    return RedlineCallback(monitors=monitors, sinks=[keep], **arguments), keep


class Proposal(pl.Callback):
    """r of every step, computed anew from the parameters before and after it, in float64."""

    def __init__(self) -> None:
        self.expected: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before = copy.deepcopy(pl_module.net).double()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        ends = []
        for sign in (1, -1):
            net = copy.deepcopy(self.before)
            with torch.no_grad():
                for moved, after in zip(net.parameters(), pl_module.net.parameters(), strict=True):
                    moved += sign * 1e-4 * (after.double() - moved)
                ends.append(net(batch[0].double()))
        tangent = (ends[0] - ends[1]) / 2e-4
        self.expected.append(float((tangent.amax(-1) - tangent.amin(-1)).max()) / math.pi)
