"""What the tests of the Trainer's callback share: a small language model, sentences, and a Trainer to look in on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from trainer_runs import in_bits, parameters_of, seed
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

import redline
from redline.integrations.huggingface import RedlineTrainerCallback

WORDS, LENGTH = 23, 9


def language_model(dropout: float = 0.1) -> GPT2LMHeadModel:
    seed()
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=WORDS, n_positions=LENGTH, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
            resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
        )
    )  # fmt: skip


def sentences(count: int = 40) -> list[dict[str, Tensor]]:
    """Sequences with a pattern to learn; the loss counts but a few positions of each, here or there."""
    generator = torch.Generator().manual_seed(2)
    rows = []
    for index in range(count):
        words = (torch.randint(0, WORDS, (1,), generator=generator) + 3 * torch.arange(LENGTH)) % WORDS
        labels = words.clone()
        labels[: index % 5] = -100
        labels[index % 5 + 2 + index % 3 :] = -100
        rows.append({"input_ids": words, "labels": labels})
    return rows


class Recorder(TrainerCallback):
    """All there is to know of a training, after each step."""

    def __init__(self) -> None:
        self.trace: list[Any] = []
        self.steps: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **of: Any) -> None:
        self._before = parameters_of(of["model"])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **of: Any) -> None:
        self.steps.append((self._before, parameters_of(of["model"])))

    def on_step_end(self, args: Any, state: Any, control: Any, **of: Any) -> None:
        self.trace.append(in_bits(of["model"], of["optimizer"].optimizer))


class Training:
    """A Trainer in a folder of its own, and what was seen of it."""

    def __init__(
        self,
        folder: Path,
        *callbacks: TrainerCallback,
        model: nn.Module | None = None,
        data: Any = None,
        size: int = 4,
        trainer: type[Trainer] = Trainer,
        **arguments: Any,
    ) -> None:
        self.recorder, self.size = Recorder(), size
        self.batches: list[dict[str, Tensor]] = []  # of training
        self.model = language_model() if model is None else model
        rows = sentences() if data is None else data
        settings = {
            "output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": size, "learning_rate": 1e-2,
            "lr_scheduler_type": "constant", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
            "save_strategy": "no", "logging_steps": 2, "seed": 3,
        }  # fmt: skip
        self.trainer = trainer(
            self.model,
            TrainingArguments(**{**settings, **arguments}),
            train_dataset=rows,
            eval_dataset=rows[:8],
            data_collator=self._collate,
            callbacks=[self.recorder, *callbacks],
        )

    def _collate(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        if len(rows) == self.size:  # evaluation's are larger
            self.batches.append({key: value.clone() for key, value in batch.items()})
        return batch

    def run(self, **arguments: Any) -> Training:
        self.trainer.train(**arguments)
        return self

    @property
    def losses(self) -> list[float]:
        return [entry["loss"] for entry in self.trainer.state.log_history if "loss" in entry]


def session_of(callback: RedlineTrainerCallback) -> redline.Session:
    assert callback.session is not None
    return callback.session
