"""Observing alone changes nothing: models that draw, work in place, remember, or are frozen in part."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fingerprints import digest
from observed_runs import Convolutional, assert_unchanged, muon_and_adamw, seed, sgd, train
from torch import Tensor, nn
from torch.optim import Optimizer

import redline


class Noisy(Convolutional):
    """Draws from all three streams in its forward, as stochastic depth and noise layers do."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.1 * torch.randn_like(x) + 0.1 * float(np.random.rand())  # noqa: NPY002 the run's own stream
        return super().forward(x) if random.random() < 0.8 else 0.5 * super().forward(x)


@pytest.mark.parametrize("optimizers", [sgd, muon_and_adamw])
def test_model_that_draws_random_numbers_itself_is_unchanged(
    optimizers: Callable[[nn.Module], list[Optimizer]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert_unchanged(capsys, steps=30, kind=Noisy, optimizers=optimizers)


class WorkingInPlace(nn.Module):
    """Normalizes its input in place, as some do to save memory."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.mul_(0.9))


@pytest.mark.filterwarnings("ignore::redline.RedlineWarning")
def test_data_that_the_model_works_on_in_place_is_worked_on_once() -> None:
    """Batches are views of the data: replaying the model on them would change what the next epoch sees."""

    def data_after(watched: bool) -> Tensor:
        seed()
        model, data = WorkingInPlace(), torch.randn(12, 6)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        monitors: list[redline.Monitor] = [redline.GhostRadius(1)] if watched else []
        with redline.attach(model, optimizer, monitors=monitors):
            for step in range(4):
                batch = data[6 * (step % 2) : 6 * (step % 2) + 6]
                F.cross_entropy(model(batch), torch.arange(6) % 5).backward()
                optimizer.step()
                optimizer.zero_grad()
        return data

    assert torch.equal(data_after(watched=True), data_after(watched=False))


class Remembering(nn.Module):
    """Leaves what it computed in plain attributes, as models with an online probe or auxiliary loss do."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh())
        self.head = nn.Linear(8, 5)
        self.calls = 0
        self.seen: list[int] = []
        self.scale = scale
        self.features: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(len(x))
        self.features = self.body(x) * self.scale
        return self.head(self.features)


@pytest.mark.parametrize("scale", [torch.ones(8), torch.ones(1).expand(8)], ids=["plain", "expanded"])
def test_what_a_model_remembers_is_left_alone_and_can_be_trained_on_after_the_step(scale: Tensor) -> None:
    def train_with_probe(watched: bool) -> tuple[list[str], int, list[int]]:
        seed()
        model, probe = Remembering(scale), nn.Linear(8, 5)
        optimizer, other = (torch.optim.SGD(module.parameters(), 0.1) for module in (model, probe))
        monitors: list[redline.Monitor] = [redline.GhostRadius(1)] if watched else []
        prints: list[str] = []
        with redline.attach(model, optimizer, monitors=monitors) as session:
            for _ in range(4):
                F.cross_entropy(model(torch.randn(6, 6)), torch.arange(6) % 5).backward()
                assert model.features is not None
                of_probe = F.cross_entropy(probe(model.features.detach()), torch.arange(6) % 5)
                features = model.features
                optimizer.step()
                assert model.features is features
                of_probe.backward()  # of what was computed before the step
                other.step()
                optimizer.zero_grad()
                other.zero_grad()
                prints.append(digest([dict(model.named_parameters()), dict(probe.named_parameters()), features]))
            if watched:
                assert session.notes == ()
                assert session.latest.value("redline_measurements_total", monitor="GhostRadius") == 4
                assert session.latest.value("redline_normalized_step_size") > 0
        return prints, model.calls, model.seen

    assert train_with_probe(watched=True) == train_with_probe(watched=False)


def test_submodules_frozen_in_eval_stay_in_eval() -> None:
    run = train(sessions=1, steps=4)
    modes = {name: module.training for name, module in run.model.named_modules()}
    assert not any(mode for name, mode in modes.items() if name.startswith("frozen"))
    assert all(mode for name, mode in modes.items() if not name.startswith("frozen"))
    assert torch.equal(run.model.get_buffer("frozen.1.running_mean"), torch.zeros(36))
    assert run.model.get_buffer("normalization.num_batches_tracked") == 4
