"""r is that of the applied step, at the positions whose labels count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sinks import Keep
from torch import Tensor, nn
from trainer_runs import R, reference_r

import redline

pytest.importorskip("transformers")
from huggingface_runs import Training, language_model, sentences, session_of

from redline.integrations.huggingface import RedlineTrainerCallback


def positions(labels: Tensor) -> Tensor:
    """Positions whose logits a language model's loss is of: those before a label that is not ignored."""
    counts = torch.zeros(labels.shape, dtype=torch.bool)
    for row in range(labels.shape[0]):
        for place in range(labels.shape[1] - 1):
            counts[row, place] = labels[row, place + 1] != -100
    return counts


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("bf16", [False, True])
def test_r_is_that_of_the_applied_step_at_the_positions_that_count(accumulate: int, bf16: bool, tmp_path: Path) -> None:
    keep = Keep()
    callback = RedlineTrainerCallback([redline.GhostRadius(every=1, max_samples=None)], sinks=[keep])
    training = Training(
        tmp_path, callback, model=language_model(dropout=0.0), gradient_accumulation_steps=accumulate, bf16=bf16,
        eval_strategy="steps", eval_steps=1,
    ).run()  # fmt: skip
    last = training.batches[accumulate - 1 :: accumulate]
    expected, everywhere = [], []
    for (before, after), batch in zip(training.recorder.steps, last, strict=False):

        def logits(wide: nn.Module, batch: Any = batch) -> Tensor:
            return wide(input_ids=batch["input_ids"]).logits

        expected.append(reference_r(language_model(0.0), before, after, logits, counts=positions(batch["labels"])))
        everywhere.append(reference_r(language_model(0.0), before, after, logits))
    assert keep.values(R) == pytest.approx(expected, rel=1e-3)
    assert expected != pytest.approx(everywhere, rel=0.05), "what is left out makes no difference"


def test_a_sub_sample_goes_by_its_own_labels(tmp_path: Path) -> None:
    callback = RedlineTrainerCallback([redline.GhostRadius(every=1, max_samples=2)])
    training = Training(tmp_path, callback, model=language_model(dropout=0.0), max_steps=1).run()
    ((before, after),), batch = training.recorder.steps, training.batches[0]
    chosen = torch.tensor([0, 2])  # spread over the batch

    def logits(wide: nn.Module) -> Tensor:
        return wide(input_ids=batch["input_ids"][chosen]).logits

    assert session_of(callback).latest.value("redline_tangent_samples") == 2
    assert session_of(callback).latest.value(R) == pytest.approx(
        reference_r(language_model(0.0), before, after, logits, positions(batch["labels"][chosen])), rel=1e-3
    )


def test_labels_that_come_shifted_are_taken_as_they_are(tmp_path: Path) -> None:
    """As of collators that pack sequences: the loss goes by these, whatever the others say."""
    data = [
        {
            "input_ids": row["input_ids"],
            "labels": row["input_ids"],
            "shift_labels": F.pad(row["labels"][1:], (0, 1), value=-100),
        }
        for row in sentences()
    ]
    keep = Keep()
    callback = RedlineTrainerCallback([redline.GhostRadius(1, max_samples=None)], sinks=[keep])
    training = Training(tmp_path, callback, model=language_model(0.0), data=data, remove_unused_columns=False).run()
    expected = [
        reference_r(
            language_model(0.0),
            before,
            after,
            lambda wide, batch=batch: wide(input_ids=batch["input_ids"]).logits,
            counts=batch["shift_labels"] != -100,
        )
        for (before, after), batch in zip(training.recorder.steps, training.batches, strict=False)
    ]
    assert keep.values(R) == pytest.approx(expected, rel=1e-3)
