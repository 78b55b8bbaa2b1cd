"""Copies of a watched model are inert, and what is done with them is not measured."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from fingerprints import fingerprint
from observed_runs import Convolutional, Run, assert_unchanged, muon_and_adamw, plain, seed, sgd
from torch import nn
from torch.optim import Optimizer

import redline


def train_aside(run: Run, model: nn.Module, steps: int = 3) -> None:
    """Train a copy of the run's model for itself: nobody watches it."""
    before = [session.latest.value("redline_steps_total") for session in run.sessions]
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for _ in range(steps):
        x, y = run.batch()
        loss = F.cross_entropy(model(x).flatten(0, -2), y.flatten())
        loss.backward()
        optimizer.step()
        run.prints.append(fingerprint(model, [optimizer], loss))
        optimizer.zero_grad()
    assert [session.latest.value("redline_steps_total") for session in run.sessions] == before


def deep_copied(run: Run) -> None:
    train_aside(run, copy.deepcopy(run.model))


def saved_and_loaded(run: Run) -> None:
    file = io.BytesIO()
    torch.save(run.model, file)
    file.seek(0)
    train_aside(run, torch.load(file, weights_only=False))


@pytest.mark.parametrize("midway", [deep_copied, saved_and_loaded])
@pytest.mark.parametrize("optimizers", [sgd, muon_and_adamw])
def test_model_copied_midway_is_unchanged_and_its_copy_inert(
    midway: Callable[[Run], None],
    optimizers: Callable[[nn.Module], list[Optimizer]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert_unchanged(capsys, steps=20, midway=midway, optimizers=optimizers)


def test_copy_called_between_forward_and_step_leaves_the_measurement_alone() -> None:
    """An EMA copy that predicts, and trains, before the original steps: its inputs are not the original's."""

    def measure(meddle: bool) -> float:
        seed()
        run = Run(Convolutional, sgd, plain)
        with redline.attach(run.model, run.optimizers, monitors=[redline.GhostRadius(1)]) as session:
            average = copy.deepcopy(run.model)
            x, y = run.batch()
            F.cross_entropy(run.model(x), y).backward()
            if meddle:
                average(torch.full_like(x, 1e3)).sum().backward()
            run.optimizers[0].step()
            return session.latest.value("redline_normalized_step_size")

    assert measure(meddle=True) == measure(meddle=False)
