"""Whatever is trained: a submodule, logits of one's own, a classifier, a compiled model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sinks import Keep
from torch import Tensor, nn
from trainer_runs import R, every_step, seed

import redline

pytest.importorskip("transformers")
from accelerate.state import AcceleratorState
from huggingface_runs import WORDS, Training, sentences, session_of
from transformers import BertConfig, BertForSequenceClassification

from redline.integrations.huggingface import RedlineTrainerCallback


def test_a_submodule_or_logits_of_ones_own(tmp_path: Path) -> None:
    named, given = (
        RedlineTrainerCallback([redline.GhostRadius(1)], module="transformer", logits=lambda output: output[0]),
        RedlineTrainerCallback([redline.GhostRadius(1)], logits=lambda output: output.logits[:, :4]),
    )
    data = sentences()
    for callback in (named, given):
        Training(tmp_path, callback, max_steps=1, data=data).run()
        assert session_of(callback).latest.value(R) > 0
        assert session_of(callback).notes == ()


def test_a_classifier(tmp_path: Path) -> None:
    seed()
    settings = {"vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(**settings, intermediate_size=16, num_labels=3))
    data = [{"input_ids": row["input_ids"], "labels": row["input_ids"][0] % 3} for row in sentences()]
    callback = RedlineTrainerCallback(every_step())
    Training(tmp_path, callback, model=model, data=data).run()
    assert session_of(callback).notes == ()
    assert session_of(callback).latest.value(R) > 0


def test_a_compiled_model(tmp_path: Path) -> None:
    values = []
    for arguments in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        keep = Keep()
        callback = RedlineTrainerCallback(
            [redline.GhostRadius(1, max_samples=None), redline.StepHealth()],
            sinks=[keep],
            logits=lambda output: output[1],
        )
        Training(tmp_path, callback, model=Embedded(), max_steps=3, **arguments).run()
        AcceleratorState._reset_state(reset_partial_state=True)
        assert session_of(callback).notes == ()
        values.append(keep.values(R) + keep.values("redline_loss"))
    assert values[0] == pytest.approx(values[1], rel=1e-3)


class Embedded(nn.Module):
    """A model that is quickly compiled."""

    def __init__(self) -> None:
        seed()
        super().__init__()
        self.inputs, self.outputs, self.config = nn.Embedding(WORDS, 8), nn.Linear(8, WORDS), None

    def forward(self, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.outputs(torch.tanh(self.inputs(input_ids)))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits
