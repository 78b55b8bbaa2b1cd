"""Which positions a loss counts, whose labels are shifted, and where a loss is found."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
from huggingface_runs import WORDS, language_model
from transformers import T5Config, T5ForConditionalGeneration

from redline.integrations.huggingface_calls import counted, loss_of, shifts_labels


def test_which_positions_a_loss_counts() -> None:
    logits = torch.zeros(2, 4, 5)
    labels = torch.tensor([[1, -100, 2, 3], [-100, -100, 0, -100]])
    assert counted(logits, labels).tolist() == [[True, False, True, True], [False, False, True, False]]
    assert counted(logits, labels, shifted=True).tolist() == [[False, True, True, False], [False, True, False, False]]
    assert counted(logits[:, 0], torch.tensor([1, -100])).tolist() == [True, False]
    assert counted(logits, None) is None
    assert counted(logits[:, 0, 0], torch.tensor([0.5, 1.0])) is None, "a regression"
    assert counted(logits[:, 0], torch.ones(2, 5)) is None, "several labels a sample"
    assert counted(logits, labels[:, 1:]) is None, "not one a position"


def test_whose_labels_are_shifted() -> None:
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=WORDS, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    assert shifts_labels(language_model())
    assert shifts_labels(SimpleNamespace(get_base_model=language_model))  # type: ignore[arg-type]
    assert shifts_labels(SimpleNamespace(loss_type="ForCausalLM"))  # type: ignore[arg-type]
    assert not shifts_labels(SimpleNamespace(loss_type="ForMaskedLM"))  # type: ignore[arg-type]
    assert not shifts_labels(t5)
    assert not shifts_labels(nn.Linear(2, 2))


def test_where_a_loss_is_found() -> None:
    loss, logits = torch.tensor(1.0), torch.zeros(2, 3)
    assert loss_of({"loss": loss, "logits": logits}) is loss
    assert loss_of((loss, logits)) is loss
    assert loss_of((logits,)) is None
    assert loss_of({"logits": logits}) is None
    assert loss_of(logits) is None
