"""``redline report`` and ``redline compare``: what they print and draw, and how they fail."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import rich
from recorded_runs import RecordedRun, recorded
from rich.console import Console
from torch import nn

import redline
from redline.integrations.cli import main


@pytest.fixture(autouse=True)
def console() -> Iterator[Console]:
    """rich's own console, recording; 120 columns."""
    own = rich.get_console()
    kept = dict(own.__dict__)
    rich.reconfigure(record=True, width=120, file=io.StringIO(), force_terminal=False)
    yield own
    own.__dict__ = kept


def printed(*arguments: str | Path) -> str:
    assert main([str(argument) for argument in arguments]) == 0
    return rich.get_console().export_text()


def failing(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    with pytest.raises(SystemExit, match=r"^2$"):
        main([str(argument) for argument in arguments])
    return capsys.readouterr().err


def test_the_report_printed_is_the_one_the_session_prints(tmp_path: Path):
    session = recorded(tmp_path / "run.jsonl", 30)
    rich.print(session.report())
    expected = rich.get_console().export_text()
    assert printed("report", tmp_path / "run.jsonl") == expected


def test_what_is_missing_is_said_below_it(tmp_path: Path):
    recorded(tmp_path / "run.jsonl", 30)
    path = tmp_path / "run.jsonl"
    path.write_bytes(path.read_bytes()[:-500])
    text = printed("report", path)
    assert "is broken off and was left out" in text
    assert "has not ended in order" in text


def test_the_report_is_drawn(tmp_path: Path):
    recorded(tmp_path / "run.jsonl", 30)
    text = printed("report", tmp_path / "run.jsonl", "--html", tmp_path / "run.html")
    assert "Drawn:" in text
    assert (tmp_path / "run.html").read_text().startswith("<!doctype html>")


def test_two_runs_side_by_side(tmp_path: Path):
    first = recorded(tmp_path / "a.jsonl", 40)
    second = recorded(tmp_path / "b.jsonl", 30, lr=0.05)
    text = printed("compare", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--html", tmp_path / "c.html")
    highest = [session.report().step_sizes.highest for session in (first, second)]
    line = next(line for line in text.splitlines() if "highest r" in line)
    assert [f"{value:.3g}" for value in (*highest, highest[1] / highest[0])] == line.replace("×", "").split()[3:6]
    assert "0.weight" in text
    assert "Only in" not in text
    assert (tmp_path / "c.html").exists()


def test_layers_without_a_counterpart_are_named(tmp_path: Path):
    recorded(tmp_path / "a.jsonl", 10)
    run = RecordedRun()
    run.model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    run.optimizer.param_groups[0]["params"] = list(run.model.parameters())
    with run.attach(redline.JsonlRecorder(tmp_path / "b.jsonl")):
        run.steps(0, 10)
    text = printed("compare", tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert "Only in B: 4.weight." in text


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert "which is not there; expected the file of a record" in failing(capsys, "report", tmp_path / "none.jsonl")
    (tmp_path / "foreign.jsonl").write_text("{}\n")
    assert "which is no record of Redline's" in failing(capsys, "report", tmp_path / "foreign.jsonl")
    recorded(tmp_path / "run.jsonl", 3)
    assert "which is no record" in failing(capsys, "compare", tmp_path / "run.jsonl", tmp_path / "foreign.jsonl")
    assert "cannot be written" in failing(
        capsys, "report", tmp_path / "run.jsonl", "--html", tmp_path / "no" / "r.html"
    )
