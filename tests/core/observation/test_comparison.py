"""The comparison itself notices: a monitor that changes one bit of anything is found out."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from observed_runs import Convolutional, Run, differences, plain, seed, sgd
from torch import Tensor

import redline


class Meddling(redline.Monitor):
    """A monitor that breaks the law, once."""

    def __init__(self, meddle: Callable[[], Any]) -> None:
        super().__init__(lambda step: step == 1)
        self.meddle = meddle

    def measure(self, step: redline.Step, readings: redline.Readings) -> None:
        self.meddle()


def _nudge(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.reshape(-1)[:1] = torch.nextafter(tensor.reshape(-1)[:1], torch.tensor(float("inf")))


@pytest.mark.parametrize(
    ("changed", "meddle"),
    [
        ("parameters", lambda run: _nudge(run.model.head.weight)),
        ("buffers", lambda run: _nudge(run.model.normalization.running_mean)),
        ("gradients", lambda run: _nudge(run.model.head.weight.grad)),
        ("gradients", lambda run: setattr(run.model.head.bias, "grad", None)),
        ("optimizer state", lambda run: _nudge(run.optimizers[0].state[run.model.head.weight]["momentum_buffer"])),
        ("requires_grad", lambda run: run.model.unused.requires_grad_(False)),
        ("modes", lambda run: run.model.frozen[1].train()),
        ("torch's stream", lambda run: torch.rand(1)),
        ("numpy's stream", lambda run: np.random.rand()),  # noqa: NPY002 the run's own stream
        ("python's stream", lambda run: random.random()),
        ("settings", lambda run: torch.backends.mha.set_fastpath_enabled(False)),
    ],
)
def test_comparison_notices_a_monitor_that_meddles(changed: str, meddle: Callable[[Run], Any]) -> None:
    fast_path = torch.backends.mha.get_fastpath_enabled()
    seed()
    unwatched = Run(Convolutional, sgd, plain)
    for _ in range(3):
        unwatched.step()
    seed()
    watched = Run(Convolutional, sgd, plain)
    try:
        with redline.attach(watched.model, watched.optimizers, monitors=[Meddling(lambda: meddle(watched))]):
            for _ in range(3):
                watched.step()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    step, kinds = differences(watched, unwatched)[0]
    assert (step, changed) == (1, *[kind for kind in kinds if kind == changed])
