"""How the run is described: its name, precision, strategy and world size."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")
from accelerate.state import AcceleratorState
from huggingface_runs import Training, session_of

from redline.integrations.huggingface import RedlineTrainerCallback


def test_the_run_is_described(tmp_path: Path) -> None:
    callback = RedlineTrainerCallback([], run="mine")
    Training(tmp_path, callback, max_steps=1, bf16=True).run()
    run = session_of(callback).latest.run
    assert (run.run, run.precision, run.strategy, run.world_size) == ("mine", "bf16-mixed", "single", 1)
    callback = RedlineTrainerCallback([])
    AcceleratorState._reset_state(reset_partial_state=True)
    Training(tmp_path, callback, max_steps=1, run_name="theirs").run()
    run = session_of(callback).latest.run
    assert (run.run, run.precision) == ("theirs", "float32")
