"""A rate a thousand times too high, on the byte-level language model: with the clamp the run goes on, without it dies.

Each optimizer trains one run up to the spike; the courses that are compared go on from copies of it, on the same
batches. The grid of published figures is examples/studies/spike_grid.py, whose own tests hold its short form; here it
is held closer (slow), and Lightning to the same.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

import redline
from redline.integrations.demo.data import byte_batch, digits, library_bytes
from redline.integrations.demo.models import ByteLM
from redline.integrations.lightning import RedlineCallback

SPIKE_AT, SEVERITY = 200, 1000.0
STEPS = 120  # of the grid


def sgd(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)]


def adamw(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.AdamW(model.parameters(), 5e-3, weight_decay=0.05)]


def muon_and_adamw(model: nn.Module) -> list[Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and name.startswith("blocks")]
    rest = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
    return [torch.optim.Muon(matrices, 0.02), torch.optim.AdamW(rest, 5e-3)]


class Training:
    """A language model in training; a copy of it goes on alike."""

    def __init__(self, optimizers: Callable[[nn.Module], list[Optimizer]]) -> None:
        torch.manual_seed(0)
        self.model = ByteLM(width=48, layers=2, context=32)
        self.optimizers = optimizers(self.model)
        self.windows = torch.Generator().manual_seed(0)
        self.text = library_bytes()

    def copied(self) -> Training:
        twin = copy.copy(self)
        twin.model, twin.optimizers = copy.deepcopy((self.model, self.optimizers))
        twin.windows = torch.Generator()
        twin.windows.set_state(self.windows.get_state())
        return twin

    def steps(self, count: int, *, spiked: int = 0, controllers: tuple[redline.Controller, ...] = ()) -> list[float]:
        """Losses of ``count`` steps, the first ``spiked`` of them at a thousand times the rate."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        rates, losses = [group["lr"] for group in groups], []
        with redline.attach(self.model, self.optimizers, monitors=[], controllers=controllers) as session:
            for step in range(count):
                for group, rate in zip(groups, rates, strict=True):
                    group["lr"] = rate * (SEVERITY if step < spiked else 1.0)
                inputs, targets = byte_batch(self.text, 24, 32, self.windows)
                loss = F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())
                session.observe(loss=loss)
                loss.backward()
                for optimizer in self.optimizers:
                    optimizer.step()
                for optimizer in self.optimizers:
                    optimizer.zero_grad()
                losses.append(loss.item())
        self.interventions = session.interventions
        return losses


class Start(NamedTuple):
    training: Training
    losses: list[float]

    @property
    def before(self) -> float:
        """The loss before the spike, over the last ten batches."""
        return statistics.fmean(self.losses[-10:])


@pytest.fixture(scope="module", params=[sgd, adamw, muon_and_adamw], ids=lambda one: one.__name__)
def start(request: pytest.FixtureRequest) -> Start:
    training = Training(request.param)
    return Start(training, training.steps(SPIKE_AT))


def test_one_spiked_step_is_as_if_it_had_not_been(start: Start) -> None:
    twin, held = start.training.copied(), start.training.copied()
    unspiked = twin.steps(110)
    clamped = held.steps(110, spiked=1, controllers=(redline.StepClamp(),))
    assert abs(statistics.fmean(clamped[100:]) - statistics.fmean(unspiked[100:])) < 0.1
    assert held.interventions[0].step == 0
    assert held.interventions[0].saw["r"] > 100, "the step was far over the redline"


def test_one_spiked_step_unprotected_costs_a_nat(start: Start) -> None:
    losses = start.training.copied().steps(110, spiked=1)
    assert is_lost(statistics.fmean(losses[100:]), start.before)


def test_after_fifty_spiked_steps_it_learns_on(start: Start) -> None:
    held = start.training.copied()
    losses = held.steps(150, spiked=50, controllers=(redline.StepClamp(),))
    assert statistics.fmean(losses[140:]) < start.before
    assert len([one for one in held.interventions if one.step < 50]) == 50
    assert max(losses) < start.before + 1


def test_fifty_spiked_steps_unprotected_end_the_run(start: Start) -> None:
    losses = start.training.copied().steps(150, spiked=50)
    assert is_lost(statistics.fmean(losses[140:]), start.before)


def is_lost(loss: float, before: float) -> bool:
    return not math.isfinite(loss) or loss > before + 1


# The grid, in its short form ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spiked(load_example: Any) -> Any:
    return load_example("studies/spiked")


@pytest.mark.slow  # tests/studies/test_spike_grid.py holds the study's own short form to the same
@pytest.mark.parametrize("held", [False, True], ids=["one step", "held to the end"])
@pytest.mark.parametrize("model", ["Transformer", "MLP+LN"])
def test_clamps_keep_the_accuracy_of_the_unspiked_twin(spiked: Any, model: str, held: bool) -> None:
    twin = spiked.train(model, "plain", 0, steps=STEPS)["accuracy"]
    found = {
        arm: spiked.train(model, arm, 0, severity=10_000, held=held, steps=STEPS)["accuracy"] for arm in spiked.ARMS
    }
    for clamp in ("bound", "exact"):
        assert found[clamp] > (0.92 if held else twin - 0.015)
    assert found["plain"] < 0.75
    assert found["clip"] < 0.75


@pytest.mark.slow
def test_clamps_keep_the_training_loss_of_a_convolutional_nets_twin(spiked: Any) -> None:
    twin = spiked.train("CNN+BN", "plain", 0, steps=65)["loss"]
    found = {
        arm: spiked.train("CNN+BN", arm, 0, severity=10_000, steps=65)["loss"] for arm in ("plain", "bound", "exact")
    }
    assert found["bound"] < 1.1 * twin
    assert found["exact"] < 1.05 * twin
    assert found["plain"] > 10 * twin


class FullBatch(Dataset[Any]):
    """The digits, all of them, so many times."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.inputs, self.labels, self.test_inputs, self.test_labels = digits()

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs, self.labels


class Spiked(pl.LightningModule):
    """Adam whose rate is 10,000 times too high at step 50."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.last_loss = math.nan

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, labels = batch
        self.trainer.optimizers[0].param_groups[0]["lr"] = 0.015 * (10_000 if self.global_step == 50 else 1)
        loss = F.cross_entropy(self.net(inputs), labels)
        self.last_loss = loss.item()
        return loss

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.015)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lightning_callback_does_what_attach_does(spiked: Any) -> None:
    expected = spiked.train("Transformer", "bound", 0, severity=10_000, steps=STEPS)
    torch.manual_seed(0)
    module = Spiked(spiked.MODELS["Transformer"]())
    callback = RedlineCallback(monitors=[], controllers=[redline.StepClamp(max_samples=None)])
    trainer = pl.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data := FullBatch(STEPS), batch_size=None))
    with torch.no_grad():
        accuracy = (module.net(data.test_inputs).argmax(-1) == data.test_labels).float().mean().item()
    assert (accuracy, module.last_loss) == (expected["accuracy"], expected["loss"]), "to the bit"
    assert callback.session is not None
    assert {50} <= {one.step for one in callback.session.interventions}
