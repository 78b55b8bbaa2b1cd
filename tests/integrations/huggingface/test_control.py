"""A training that is controlled, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import redline

pytest.importorskip("transformers")
from accelerate.utils import DistributedType
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from huggingface_runs import WORDS, Training, language_model, sentences, session_of
from transformers import BertConfig, BertForSequenceClassification, TrainerCallback

from redline.integrations.huggingface import RedlineTrainerCallback


class Spike(TrainerCallback):
    """Multiplies the rate at one step."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **of: Any) -> None:
        for group in of["optimizer"].param_groups:
            group["lr"] = 1e-2 * (1000 if state.global_step == 10 else 1)


def test_the_clamp_saves_a_training_with_a_spike(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"max_steps": 30, "logging_steps": 1}
    alone = Training(tmp_path, Spike(), model=language_model(0.0), **arguments).run()
    callback = RedlineTrainerCallback([], controllers=[redline.StepClamp()])
    held = Training(tmp_path, Spike(), callback, model=language_model(0.0), **arguments).run()
    assert 10 in [one.step for one in session_of(callback).interventions]
    assert max(alone.losses[11:]) > 2 * max(held.losses[11:])
    assert held.losses[-1] < 2.5 < math.log(WORDS) < alone.losses[11]


def test_a_regression_is_refused_by_the_clamp(tmp_path: Path) -> None:
    settings = {"vocab_size": WORDS, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(**settings, intermediate_size=16, num_labels=1))
    data = [{"input_ids": row["input_ids"], "labels": torch.tensor(0.5)} for row in sentences()]
    callback = RedlineTrainerCallback([], controllers=[redline.StepClamp()])
    with pytest.raises(redline.ConfigurationError, match="got a loss made by MseLoss"):
        Training(tmp_path, callback, model=model, data=data).run()


def begin(optimizer: Any, n_gpu: int = 0) -> None:
    args = SimpleNamespace(
        n_gpu=n_gpu, run_name=None, bf16=False, fp16=False, world_size=1, average_tokens_across_devices=True,
        distributed_state=SimpleNamespace(distributed_type=DistributedType.DEEPSPEED),
    )  # fmt: skip
    RedlineTrainerCallback().on_train_begin(
        args, SimpleNamespace(global_step=0), None, model=language_model(), optimizer=optimizer, lr_scheduler=None
    )  # type: ignore[arg-type]


def test_what_cannot_be_watched_is_refused_by_name() -> None:
    with pytest.raises(redline.ConfigurationError, match=r"trains on 2 GPUs \(nn.DataParallel\); .*torchrun"):
        begin(torch.optim.SGD(language_model().parameters(), 0.1), n_gpu=2)
    with pytest.raises(redline.ConfigurationError, match="DeepSpeed trains; expected"):
        begin(DeepSpeedOptimizerWrapper.__new__(DeepSpeedOptimizerWrapper))
    with pytest.raises(redline.ConfigurationError, match="overhead_budget"):
        RedlineTrainerCallback(overhead_budget=3)
