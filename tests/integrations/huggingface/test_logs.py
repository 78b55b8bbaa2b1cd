"""Readings of the step in the Trainer's own logs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sinks import Keep
from trainer_runs import R, every_step

pytest.importorskip("transformers")
from huggingface_runs import Training
from transformers import TrainerCallback

from redline.integrations.huggingface import RedlineTrainerCallback


class Later(TrainerCallback):
    """What a reporting callback behind Redline's is handed."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def test_readings_of_the_step_go_into_the_trainers_logs(tmp_path: Path) -> None:
    keep, later = Keep(), Later()
    callback = RedlineTrainerCallback(every_step(), sinks=[keep])
    training = Training(tmp_path, callback, later, eval_strategy="steps", eval_steps=2).run()
    history = [entry for entry in training.trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in history] == [2, 4, 6]
    assert [entry[R] for entry in history] == keep.values(R)[1::2]
    assert [entry[R] for entry in later.logs if "loss" in entry] == keep.values(R)[1::2]
    assert not any(R in entry for entry in later.logs if "loss" not in entry), "evaluations are none of ours"
    assert all("redline_loss" not in entry and "redline_gradient_norm" not in entry for entry in history)
    assert not any("/" in name for name in history[-1]), "layers would flood it"


def test_a_reporting_callback_is_put_behind(tmp_path: Path) -> None:
    later = Later()
    training = Training(tmp_path, later, RedlineTrainerCallback(every_step()), max_steps=2)
    training.run()
    assert not any(R in entry for entry in later.logs), "it is handed the logs first"
    training.trainer.add_callback(training.trainer.pop_callback(Later))
    training.run()
    assert R in later.logs[-2], "the last is the summary"
