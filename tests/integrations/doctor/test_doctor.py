"""``redline doctor``: what it prints, its exit status, and that what it suggests can be pasted."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import doctor_models
import pytest
import torch

from redline.integrations.cli import main
from redline.integrations.doctor.diagnosis import examine
from redline.integrations.doctor.subject import load
from redline.integrations.doctor.view import snippet

README = Path(__file__).resolve().parents[3] / "README.md"


def test_all_is_well(capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", "doctor_models:mlp", "--shape", "8,12"]) == 0
    text = capsys.readouterr().out
    for words in ("3.weight", "16×16", "forward mode", "found, of shape (8, 4)", "between steps", "GhostRadius", "50"):
        assert words in text
    assert "All of it can be measured" in text
    assert "redline.attach(" in text


def test_something_cannot_be_measured(capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", "doctor_models:Quantized", "--shape", "8,12"]) == 1
    text = capsys.readouterr().out
    assert "Cannot be measured, and why" in text
    assert "codes is torch.int8" in text


@pytest.mark.parametrize(
    "arguments",
    [
        ["doctor_models:mpl", "--shape", "8,12"],
        ["doctor_models:mlp"],
        ["doctor_models:mlp", "--shape", "8;12"],
        ["doctor_models:mlp", "--shape", "0,12"],
        ["doctor_models:mlp", "--shape", "8,11"],
        ["doctor_models:KeywordsOnly", "--input", "doctor_models:keyword_inputs"],
    ],
)
def test_mistakes_are_told_without_a_traceback(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["doctor", *arguments])
    err = capsys.readouterr().err
    assert "redline" in err
    assert "Traceback" not in err


def test_the_command_in_the_readme_works(capsys: pytest.CaptureFixture[str]):
    (line,) = re.findall(r"^redline (doctor .*)$", README.read_text(), re.MULTILINE)
    assert main(shlex.split(line)) == 0
    assert "math attention" in capsys.readouterr().out


def test_the_suggested_lines_run():
    subject = load("doctor_models:KeywordsOnly", inputs="doctor_models:keyword_inputs", logits="doctor_models:second")
    lines = snippet(examine(subject))
    assert "from doctor_models import second" in lines
    assert "logits=second" in lines
    model = doctor_models.KeywordsOnly()
    optimizer = torch.optim.AdamW(model.parameters())
    found: dict[str, object] = {"model": model, "optimizer": optimizer}
    exec(lines, found)
    found["session"].close()


def test_a_tiny_model_whose_watching_costs_much_is_given_a_budget():
    diagnosis = examine(load("doctor_models:OneLogit", shape=(2, 12)))
    assert ("overhead_budget=" in snippet(diagnosis)) == (diagnosis.costs.share > 0.05)


def test_a_model_in_the_working_directory(tmp_path: Path):
    (tmp_path / "mine.py").write_text(
        "import torch\ndef build():\n    return torch.nn.Linear(4, 3), torch.ones(5, 4)\n"
    )
    program = "import sys; from redline.integrations.cli import main; sys.exit(main(['doctor', 'mine:build']))"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "redline doctor · mine:build" in done.stdout
