"""Every example runs in its short form, as a user would start it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
SHORT = {
    "plain_loop.py": ["--steps", "20", "--port", "0"],
    "lightning_digits.py": ["--steps", "20"],
    "fabric_digits.py": ["--steps", "20"],
    "accelerate_digits.py": ["--steps", "20"],
    "huggingface_trainer.py": ["--steps", "9"],
    "custom_sink.py": [],
    "lightning_cli.py": ["fit", f"--config={EXAMPLES / 'lightning_cli.yaml'}", "--trainer.max_steps=20"],
    "bad_batches.py": ["--quick"],
    "radius_lr.py": ["--quick"],
    "width_transfer.py": ["--quick"],
}
SAYS = {
    "plain_loop.py": "The longest step had r = ",
    "lightning_digits.py": "Test accuracy ",
    "fabric_digits.py": "after 20 steps.",
    "accelerate_digits.py": "; the clamp shortened ",
    "huggingface_trainer.py": "The trainer's own log has r = ",
    "lightning_cli.py": "stability report",
    "bad_batches.py": "one NaN among the inputs, one batch",
    "radius_lr.py": "points above the best",
    "width_transfer.py": "Top singular values: ",
    "custom_sink.py": "step,loss,normalized_step_size\n0,",
}
NEEDS = {"huggingface_trainer.py": "transformers", "accelerate_digits.py": "accelerate"}


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(SHORT)


@pytest.mark.parametrize("name", SHORT)
def test_example(name, tmp_path):
    pytest.importorskip(NEEDS.get(name, "redline"))
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *SHORT[name]],
        cwd=tmp_path,
        env={**os.environ, "PYTHONWARNINGS": "default", "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert SAYS[name] in done.stdout
