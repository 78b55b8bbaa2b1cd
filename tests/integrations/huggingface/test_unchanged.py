"""A watched training goes as one that is not, to the bit, and nothing stays behind."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import pytest
from sinks import Keep
from trainer_runs import R, every_step

pytest.importorskip("transformers")
from accelerate.state import AcceleratorState
from huggingface_runs import Training, session_of

from redline.integrations.huggingface import RedlineTrainerCallback

METHODS = "redline_tangent_fallbacks_total"


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"bf16": True},
        {"gradient_accumulation_steps": 2},
        {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True},
        {"activation_checkpointing": True},
    ],
    ids=["plain", "bf16", "accumulation", "evaluation", "checkpointing"],
)
def test_a_watched_training_is_bit_identical_to_one_that_is_not(arguments: Any, tmp_path: Path) -> None:
    callback = RedlineTrainerCallback(monitors=every_step(), sinks=[Keep()])
    watched = Training(tmp_path, callback, **arguments).run()
    AcceleratorState._reset_state(reset_partial_state=True)
    alone = Training(tmp_path, **arguments).run()

    assert len(watched.recorder.trace) == 6
    assert watched.recorder.trace == alone.recorder.trace
    assert watched.losses == alone.losses
    session = session_of(callback)
    assert session.notes == ()
    assert session.latest.value("redline_steps_total") == 6
    assert math.isfinite(session.latest.value(R))
    assert session.latest.value(METHODS, method="finite_difference") == 0
    assert "transformer.h.1.mlp.c_fc.weight" in session.latest.layers("redline_weight_spectral_norm")


def test_nothing_stays_behind(tmp_path: Path) -> None:
    callback = RedlineTrainerCallback(every_step())
    training = Training(tmp_path, callback).run()
    first = session_of(callback)
    raw = training.trainer.optimizer.optimizer
    for hooks in (
        training.model._forward_hooks, training.model._forward_pre_hooks,
        raw._optimizer_step_pre_hooks, raw._optimizer_step_post_hooks,
    ):  # fmt: skip
        assert not hooks
    assert pickle.loads(pickle.dumps(callback)).session is None

    training.run()  # trains again: another session
    assert session_of(callback) is not first
    assert session_of(callback).latest.value("redline_steps_total") == 6
