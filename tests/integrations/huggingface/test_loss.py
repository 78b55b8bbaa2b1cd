"""The loss is that of the whole step, and of no call beside it."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sinks import Keep
from torch import Tensor, nn
from trainer_runs import R

import redline

pytest.importorskip("transformers")
from huggingface_runs import LENGTH, Training, language_model
from transformers import TrainerCallback

from redline.integrations.huggingface import RedlineTrainerCallback


def cross_entropy_sum(model: nn.Module, batch: dict[str, Tensor]) -> float:
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, batch["labels"][:, 1:].flatten(), reduction="sum").item()


def labelled(batch: dict[str, Tensor], start: int) -> int:
    return int((batch["labels"][:, start:] != -100).sum())


class PlainLoss(nn.Module):
    """A model whose loss is the mean over its own micro-batch: it takes no ``num_items_in_batch``."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.config = language_model(dropout=0.0), SimpleNamespace(to_dict=dict)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> tuple[Tensor, ...]:
        logits = self.net(input_ids=input_ids).logits
        if labels is None:
            return (logits,)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), logits


@pytest.mark.parametrize("accepts_count", [True, False])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_loss_is_that_of_the_whole_step(accepts_count: bool, accumulate: int, tmp_path: Path) -> None:
    keep = Keep()
    callback = RedlineTrainerCallback([redline.StepHealth()], sinks=[keep], logits=lambda output: output[1])
    model = language_model(dropout=0.0) if accepts_count else PlainLoss()
    training = Training(
        tmp_path, callback, model=model, gradient_accumulation_steps=accumulate, max_steps=3, logging_steps=1
    ).run()
    expected, reference = [], copy.deepcopy(model if accepts_count else model.net)
    for index, (before, _) in enumerate(training.recorder.steps):
        reference.load_state_dict({name.removeprefix("net."): value for name, value in before.items()}, strict=False)
        reference.tie_weights()
        parts = training.batches[index * accumulate : (index + 1) * accumulate]
        totals = [cross_entropy_sum(reference, part) for part in parts]
        if accepts_count:  # the mean over the step's labels; of GPT-2 the Trainer counts the first ones too
            expected.append(sum(totals) / sum(labelled(part, 0) for part in parts))
        else:  # the mean of the micro-batches' means
            means = [total / labelled(part, 1) for total, part in zip(totals, parts, strict=True)]
            expected.append(sum(means) / len(means))
    assert keep.values("redline_loss") == pytest.approx(expected, rel=1e-5)
    assert keep.values("redline_loss") == pytest.approx(training.losses, rel=1e-5), "as the Trainer itself logs it"


class Copying(TrainerCallback):
    """Keeps a copy of the model, as for an average of its weights, and calls it."""

    def on_step_end(self, args: Any, state: Any, control: Any, **of: Any) -> None:
        self.copy = copy.deepcopy(of["model"])
        self.copy(input_ids=torch.zeros(1, LENGTH, dtype=torch.long), labels=torch.ones(1, LENGTH, dtype=torch.long))


def test_a_copy_of_the_model_reports_to_nobody(tmp_path: Path) -> None:
    keep = Keep()
    callback = RedlineTrainerCallback([redline.StepHealth()], sinks=[keep])
    training = Training(tmp_path, Copying(), callback, logging_steps=1).run()
    assert keep.values("redline_loss") == pytest.approx(training.losses, rel=1e-6)


class Peeking(TrainerCallback):
    """Calls the model between backward and the step, as nobody trains."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **of: Any) -> None:
        words = torch.zeros(1, LENGTH, dtype=torch.long)
        with torch.no_grad():
            of["model"](input_ids=words, labels=words)
        of["model"].eval()
        of["model"](input_ids=words, labels=words)
        of["model"].train()


def test_calls_that_are_no_training_do_not_count(tmp_path: Path) -> None:
    values = []
    for peeking in ([], [Peeking()]):
        keep = Keep()
        callback = RedlineTrainerCallback([redline.GhostRadius(1), redline.StepHealth()], sinks=[keep])
        Training(tmp_path, callback, *peeking, model=language_model(0.0), max_steps=3).run()
        values.append(keep.values("redline_loss") + keep.values(R))
    assert values[0] == values[1]
