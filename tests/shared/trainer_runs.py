"""What tests of the trainers' adapters share: nets, batches, what there is to know of a run, and r the slow way."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from bits import frozen
from torch import Tensor, nn
from torch.optim import Optimizer

import redline

R = "redline_normalized_step_size"
FEATURES, CLASSES = 6, 3


def seed(value: int = 0) -> None:
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002 the run's own stream
    torch.manual_seed(value)


def plain_net() -> nn.Module:
    seed()
    return nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, CLASSES))


class Delicate(nn.Module):
    """All that a careless observer disturbs: noise, dropout, BatchNorm in training, a frozen part in eval mode."""

    def __init__(self) -> None:
        seed()
        super().__init__()
        self.inputs, self.norm, self.drop = nn.Linear(FEATURES, 16), nn.BatchNorm1d(16), nn.Dropout(0.2)
        self.frozen = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16)).requires_grad_(False)
        self.frozen.eval()
        self.outputs = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.01 * torch.randn_like(x) if self.training else x
        hidden = self.drop(F.relu(self.norm(self.inputs(x))))
        return self.outputs(F.dropout(hidden + self.frozen(hidden), 0.1, self.training))


def batches(count: int, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    """Batches of random inputs, and labels that can be learnt from them."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, size, FEATURES, generator=generator)
    y = (x @ torch.randn(FEATURES, CLASSES, generator=generator)).argmax(-1)
    return list(zip(x, y, strict=True))


def in_bits(model: nn.Module, optimizer: Optimizer) -> Any:
    """Parameters, buffers, gradients, optimizer state, modes and random streams."""
    return (
        frozen(model.state_dict()),
        frozen([parameter.grad for parameter in model.parameters()]),
        frozen(optimizer.state_dict()),
        [module.training for module in model.modules()],
        frozen(torch.get_rng_state()),
        random.getstate(),
        np.random.get_state()[1].tobytes(),  # noqa: NPY002
    )


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def reference_r(
    model: nn.Module,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    logits: Callable[[nn.Module], Tensor],
    counts: Tensor | None = None,
) -> float:
    """r of the step from ``before`` to ``after``, by a central difference in float64."""
    wide = copy.deepcopy(model).double()
    ends = []
    for end in (1e-4, -1e-4):
        with torch.no_grad():
            for name, parameter in wide.named_parameters():
                parameter.copy_(before[name].double() + end * (after[name].double() - before[name].double()))
            ends.append(logits(wide))
    tangent = (ends[0] - ends[1]) / 2e-4
    spread = tangent.amax(-1) - tangent.amin(-1)
    return float(spread.max() if counts is None else spread[counts].max()) / math.pi


def every_step() -> list[redline.Monitor]:
    """The default monitors, due at each step or every few."""
    return [
        redline.WeightSpectrum(every=3),
        redline.UpdateSpectrum(every=2),
        redline.GhostRadius(every=1, max_samples=None),
        redline.StepHealth(),
    ]


class Counting(redline.Controller):
    """Scales more the more it has seen."""

    def __init__(self) -> None:
        self.seen = 0

    def inspect(self, step: Any) -> Any:
        self.seen += 1
        return [redline.Scale(1 / self.seen, "as told")]

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: Any) -> None:
        self.seen = state["seen"]
