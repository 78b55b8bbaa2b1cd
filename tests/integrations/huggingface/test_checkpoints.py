"""State in the Trainer's checkpoints, and training that goes on from one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from trainer_runs import Counting

import redline

pytest.importorskip("transformers")
from huggingface_runs import Training, session_of

from redline.integrations.huggingface import STATE_FILE, RedlineTrainerCallback


def counting() -> RedlineTrainerCallback:
    return RedlineTrainerCallback([redline.GhostRadius(1)], controllers=[Counting(), redline.NonFiniteGuard()])


SAVING = {"save_strategy": "steps", "save_steps": 3}


def test_training_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    whole = Training(tmp_path / "run", counting(), **SAVING).run()
    kept = torch.load(tmp_path / "run" / "checkpoint-3" / STATE_FILE, weights_only=True)
    assert kept["global_step"] == 3

    callback = counting()
    resumed = Training(tmp_path / "run", callback, **SAVING)
    resumed.run(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    session = session_of(callback)
    assert session.latest.value("redline_steps_total") == 6
    assert session.latest.value("redline_measurements_total", monitor="GhostRadius") == 6
    assert [one.step for one in session.interventions] == [1, 2, 3, 4, 5]
    assert [step[:3] for step in resumed.recorder.trace] == [step[:3] for step in whole.recorder.trace[3:]]


def test_a_checkpoint_that_lies_elsewhere_is_named_in_the_arguments(tmp_path: Path) -> None:
    Training(tmp_path / "run", counting(), **SAVING, max_steps=3).run()
    elsewhere = str((tmp_path / "run" / "checkpoint-3").rename(tmp_path / "moved"))
    callback = counting()
    Training(tmp_path / "other", callback, resume_from_checkpoint=elsewhere).run(resume_from_checkpoint=elsewhere)
    assert session_of(callback).latest.value("redline_steps_total") == 6

    callback = counting()
    with pytest.warns(redline.errors.RedlineWarning, match=r"from step 3, but Redline starts afresh: .*checkpoint-3"):
        Training(tmp_path / "other", callback).run(resume_from_checkpoint=elsewhere)
    assert session_of(callback).latest.value("redline_steps_total") == 3


def test_the_state_of_another_step_is_not_taken(tmp_path: Path) -> None:
    Training(tmp_path / "run", counting(), **SAVING, max_steps=3).run()
    file = tmp_path / "run" / "checkpoint-3" / STATE_FILE
    torch.save({**torch.load(file), "global_step": 2}, file)
    callback = counting()
    with pytest.warns(redline.errors.RedlineWarning, match="starts afresh"):
        Training(tmp_path / "run", callback, **SAVING).run(resume_from_checkpoint=True)
    assert session_of(callback).latest.value("redline_steps_total") == 3


def test_a_checkpoint_of_the_model_alone_has_no_state(tmp_path: Path) -> None:
    Training(tmp_path, counting(), **SAVING, save_only_model=True).run()
    assert (tmp_path / "checkpoint-3").is_dir()
    assert not (tmp_path / "checkpoint-3" / STATE_FILE).exists()
