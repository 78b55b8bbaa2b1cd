"""What the tests of observation share: models, optimizers, loops, and runs that are alike but for who watches."""

from __future__ import annotations

import random
import urllib.request
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fingerprints import fingerprint
from torch import Tensor, nn
from torch.optim import Optimizer

import redline

STEPS = 100
MEASURED = (
    "redline_weight_spectral_norm",
    "redline_weight_spectral_residual",
    "redline_weight_stable_rank",
    "redline_weight_spectral_condition",
    "redline_update_spectral_norm",
    "redline_update_spectral_condition",
    "redline_update_to_weight_ratio",
    "redline_update_norm",
    "redline_ghost_radius",
    "redline_normalized_step_size",
    "redline_committed_step_size",
    "redline_step_scale",
    "redline_loss",
    "redline_gradient_norm",
    "redline_learning_rate",
    "redline_last_step_timestamp_seconds",
)


# What is trained ----------------------------------------------------------------------------------


class Convolutional(nn.Module):
    """BatchNorm in training and another frozen in eval, dropout as a module and as a call, one parameter unused."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3)
        self.normalization = nn.BatchNorm2d(4)
        self.frozen = nn.Sequential(nn.Linear(36, 36), nn.BatchNorm1d(36), nn.Dropout(0.5))
        self.hidden = nn.Linear(36, 16)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(16, 5)
        self.unused = nn.Parameter(torch.ones(3))
        self.frozen.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.normalization(self.convolution(x))).flatten(1)
        hidden = hidden + self.frozen(hidden)
        hidden = self.dropout(F.relu(self.hidden(hidden)))
        return self.head(F.dropout(hidden, 0.1, self.training))

    @staticmethod
    def batch() -> tuple[Tensor, Tensor]:
        # From all three streams of random numbers, so that a draw too many shows in the losses.
        x = torch.randn(8, 1, 5, 5) * float(1 + np.random.rand()) + random.random()  # noqa: NPY002 the run's own stream
        return x, torch.randint(0, 5, (8,))


class Attention(nn.Module):
    """Attention, which drops by itself while in train mode, over tokens; measured on a sub-sample of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(tokens)))

    @staticmethod
    def batch() -> tuple[Tensor, Tensor]:
        tokens = torch.randint(0, 11, (8, 6))
        return tokens, (tokens + random.randrange(2) + np.random.randint(2)) % 5  # noqa: NPY002 the run's own stream


def sgd(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-2)]


def adam(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.Adam(model.parameters(), 3e-3)]


def adamw_foreach(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.AdamW(model.parameters(), 3e-3, foreach=True)]


def adamw_fused(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.AdamW(model.parameters(), 3e-3, fused=True)]


def muon_and_adamw(model: nn.Module) -> list[Optimizer]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        torch.optim.Muon([parameter for parameter in trained if parameter.dim() == 2], 0.02),
        torch.optim.AdamW([parameter for parameter in trained if parameter.dim() != 2], 3e-3),
    ]


def lbfgs(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.LBFGS(model.parameters(), 0.1, max_iter=3)]


# How it is trained --------------------------------------------------------------------------------


class Run:
    """One training run, watched by as many sessions as it is given, and a fingerprint of everything at each step."""

    def __init__(self, kind: type[Any], optimizers: Callable[[nn.Module], list[Optimizer]], loop: Loop) -> None:
        self.model: nn.Module = kind()
        self.called: nn.Module = self.model
        self.batch: Callable[[], tuple[Tensor, Tensor]] = kind.batch
        self.optimizers = optimizers(self.model)
        self.loop = loop
        self.sessions: list[redline.Session] = []
        self.prints: list[dict[str, str]] = []
        self.scrape = ""

    def loss(self) -> Tensor:
        x, y = self.batch()
        logits = self.called(x)
        return F.cross_entropy(logits.flatten(0, -2), y.flatten())

    def observe(self, loss: Tensor) -> None:
        for session in self.sessions:
            session.observe(loss=loss)

    def step(self) -> None:
        loss = self.loop(self)
        self.prints.append(fingerprint(self.model, self.optimizers, loss))
        for optimizer in self.optimizers:
            optimizer.zero_grad()


Loop = Callable[[Run], Tensor]


def plain(run: Run) -> Tensor:
    loss = run.loss()
    run.observe(loss)
    loss.backward()
    for optimizer in run.optimizers:
        optimizer.step()
    return loss


def accumulating(run: Run) -> Tensor:
    total = torch.zeros(())
    for _ in range(3):
        loss = run.loss() / 3
        loss.backward()
        total += loss.detach()
    run.observe(total)
    for optimizer in run.optimizers:
        optimizer.step()
    return total


def with_closure(run: Run) -> Tensor:
    def closure() -> Tensor:
        for optimizer in run.optimizers:
            optimizer.zero_grad()
        loss = run.loss()
        run.observe(loss)
        loss.backward()
        return loss

    (optimizer,) = run.optimizers
    return optimizer.step(closure)


def with_closure_by_keyword(run: Run) -> Tensor:
    def closure() -> Tensor:
        run.optimizers[0].zero_grad()
        loss = run.loss()
        run.observe(loss)
        loss.backward()
        return loss

    return run.optimizers[0].step(closure=closure)


def under_autocast(run: Run) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = run.loss()
    run.observe(loss)
    loss.backward()
    for optimizer in run.optimizers:
        optimizer.step()
    return loss


def train(
    kind: type[Any] = Convolutional,
    optimizers: Callable[[nn.Module], list[Optimizer]] = sgd,
    loop: Loop = plain,
    *,
    sessions: int,
    steps: int = STEPS,
    prepare: Callable[[Run], None] | None = None,
    midway: Callable[[Run], None] | None = None,
    monitors: Callable[[], list[redline.Monitor]] | None = None,
) -> Run:
    seed()
    run = Run(kind, optimizers, loop)
    if prepare:
        prepare(run)
    exporters = [redline.PrometheusExporter(port=0, every=3) for _ in range(sessions)]
    for exporter in exporters:
        run.sessions.append(attach(run, exporter, monitors() if monitors else often()))
    for step in range(steps):
        if step == steps // 2 and midway:
            midway(run)
        run.step()
    if exporters:
        run.scrape = urllib.request.urlopen(exporters[0].url or "").read().decode()
    for session in run.sessions:
        session.close()
    return run


def seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 the run's own stream
    random.seed(0)


def often() -> list[redline.Monitor]:
    """The default monitors, due much more often than by default."""
    return [
        redline.WeightSpectrum(3),
        redline.UpdateSpectrum(2),
        redline.GhostRadius(1, max_samples=4),
        redline.StepHealth(1),
    ]


def attach(run: Run, exporter: redline.PrometheusExporter, monitors: list[redline.Monitor]) -> redline.Session:
    return redline.attach(
        run.called,
        run.optimizers,
        monitors=monitors,
        sinks=[redline.ConsoleReport(every=7), exporter],
    )


# What is compared ---------------------------------------------------------------------------------


def differences(watched: Run, unwatched: Run) -> list[tuple[int, list[str]]]:
    """At which steps which kinds of things differ."""
    assert len(watched.prints) == len(unwatched.prints) > 0
    pairs = enumerate(zip(watched.prints, unwatched.prints, strict=True))
    found = ((step, [kind for kind in one if one[kind] != other[kind]]) for step, (one, other) in pairs)
    return [(step, kinds) for step, kinds in found if kinds]


def assert_really_measured(run: Run, steps: int = STEPS) -> None:
    """Or else the comparison would pass because nothing was done."""
    assert run.sessions
    for session in run.sessions:
        latest = session.latest
        assert session.notes == ()
        assert [metric for metric in MEASURED if metric not in latest] == []
        assert latest.value("redline_steps_total") == steps
        assert latest.series("redline_measurements_total") == {
            ("WeightSpectrum",): len(range(0, steps, 3)),
            ("UpdateSpectrum",): len(range(0, steps, 2)),
            ("GhostRadius",): steps,
            ("StepHealth",): steps,
        }
        assert 0 < latest.value("redline_normalized_step_size") < 1e3
        assert set(latest.layers("redline_weight_spectral_norm")) == {
            name for name, parameter in run.model.named_parameters() if parameter.dim() > 1
        }
        assert not session.interventions
    assert "\nredline_normalized_step_size " in run.scrape
    assert '\nredline_weight_spectral_norm{layer="head.weight"} ' in run.scrape


def assert_unchanged(capsys: pytest.CaptureFixture[str], steps: int = STEPS, **case: Any) -> None:
    unwatched = train(sessions=0, steps=steps, **case)
    assert capsys.readouterr().out == ""
    watched = train(sessions=1, steps=steps, **case)
    assert "redline" in capsys.readouterr().out
    assert_really_measured(watched, steps)
    assert differences(watched, unwatched) == []
