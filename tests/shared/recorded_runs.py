"""What tests of records share: a small run that is recorded, whose steps are long enough to be clamped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import redline


class RecordedRun:
    """A small classifier; ``steps(0, 30)`` takes steps 0 to 29, each of a batch of its own."""

    def __init__(self, lr: float = 3.0, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model: nn.Module = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr, momentum=0.9)
        self.session: redline.Session

    def attach(self, *sinks: redline.Sink, **more: Any) -> redline.Session:
        arguments: dict[str, Any] = {
            "monitors": [
                redline.GhostRadius(2, exact=True),
                redline.WeightSpectrum(5),
                redline.UpdateSpectrum(5),
                redline.StepHealth(),
            ],
            "controllers": [redline.StepClamp(max_r=1.0, stale_after=1)],
            "run": "recorded",
        }
        self.session = redline.attach(self.model, self.optimizer, sinks=sinks, **{**arguments, **more})
        return self.session

    def steps(self, first: int, end: int, scale: Callable[[int], float] = lambda step: 1.0) -> None:
        for step in range(first, end):
            generator = torch.Generator().manual_seed(step)
            x, y = torch.randn(12, 6, generator=generator), torch.randint(0, 4, (12,), generator=generator)
            loss = F.cross_entropy(scale(step) * self.model(x), y)
            self.session.observe(loss=loss)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def recorded(path: Path, steps: int = 40, *, every: int = 7, lr: float = 3.0, **more: Any) -> redline.Session:
    """A run recorded to a file, and ended."""
    run = RecordedRun(lr)
    with run.attach(redline.JsonlRecorder(path, every), **more) as session:
        run.steps(0, steps)
    return session


def lines_of(path: Path) -> Sequence[str]:
    return path.read_text().splitlines()


EVIL = "</script><img src=x onerror=alert(1)>&\"'"
"""A name that gets out of where it stands, if it is let."""


def evil_run(path: Path) -> None:
    """A run of that name, recorded, with a layer of that name."""
    run = RecordedRun()
    layers = nn.Sequential(nn.Linear(6, 16))
    layers._modules[EVIL] = nn.Linear(16, 4)
    run.model, run.optimizer = layers, torch.optim.SGD(layers.parameters(), 0.5)
    with run.attach(redline.JsonlRecorder(path, 5), run=EVIL):
        run.steps(0, 12)
