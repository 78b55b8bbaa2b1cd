"""Reading records: the report comes out as the session's own, and what is no record is refused with the reason."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recorded_runs import RecordedRun, recorded

import redline
from redline import ConfigurationError
from redline.integrations.record import read
from redline.integrations.record.reader import worst
from redline.trail import FragileSample

HEADER = {
    "format": "redline-record",
    "version": 1,
    "run": {"run": "a", "version": "0.1", "precision": "float32", "strategy": "single", "world_size": 1},
    "first_step": 0,
    "part": 0,
    "goes_on": False,
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.jsonl"


# The report ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 7, 50, lambda step: step in (3, 4, 20)])
def test_the_report_is_the_sessions_own(path: Path, every: Any):
    session = recorded(path, 43, every=every)
    live, told = session.report().to_dict(), read(path).report().to_dict()
    assert live["interventions"], "the run is clamped"
    assert told == live


def test_the_report_is_the_sessions_own_with_several_radii_and_notes(path: Path):
    run = RecordedRun(0.05)
    monitors = [redline.GhostRadius(1), redline.LayerRadii(1), redline.WeightSpectrum(3), Failing(1)]
    with (
        pytest.warns(redline.RedlineWarning, match="Failing could not measure a step"),
        run.attach(redline.JsonlRecorder(path, 4), monitors=monitors) as session,
    ):
        run.steps(0, 33)
    live, told = session.report().to_dict(), read(path).report().to_dict()
    assert [None not in radius["shares"] for radius in live["binding"]] == [True, True]
    assert live["notes"]
    assert told == live


class Failing(redline.Monitor):
    """Cannot measure."""

    def measure(self, step: Any, readings: Any) -> None:
        raise ZeroDivisionError("of its own making")


def test_a_run_that_was_not_finite_reads_the_same(path: Path):
    run = RecordedRun()
    with run.attach(redline.JsonlRecorder(path, 3), controllers=[]) as session:
        run.steps(0, 20, lambda step: float("nan") if step == 11 else 1.0)
    live, told = session.report().to_dict(), read(path).report().to_dict()
    assert live["nonfinite"]["loss"] > 0
    assert str(told) == str(live)  # NaN among it


def test_what_the_record_ends_with_is_the_sessions_last_snapshot(path: Path):
    session = recorded(path, 25, every=10)
    record = read(path)
    assert record.snapshot.step == session.latest.step == 24
    assert record.snapshot.values == session.latest.values
    assert record.snapshot.measured_at == session.latest.measured_at
    assert record.run == session.latest.run


def test_a_run_that_goes_on_can_be_read(path: Path):
    run = RecordedRun()
    run.attach(redline.JsonlRecorder(path, 5))
    run.steps(0, 18)
    record = read(path)
    run.session.close()
    assert record.report().steps == 16
    assert record.closing is None
    assert 0 <= record.report().seconds < 60
    assert record.notes == ("The run has not ended in order: it goes on, or was killed after step 15.",)


def test_a_run_that_was_killed_has_its_budget_and_not_its_notes(path: Path):
    run = RecordedRun()
    with (
        pytest.warns(redline.RedlineWarning, match="Failing could not measure a step"),
        run.attach(redline.JsonlRecorder(path, 5), monitors=[Failing(1)], overhead_budget=0.9) as session,
    ):
        run.steps(0, 12)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    live, told = session.report(), read(path).report()
    assert live.notes
    assert told.notes == ()
    assert told.overhead_budget == live.overhead_budget == 0.9


def test_a_curve_has_every_value_of_a_short_run(path: Path):
    session = recorded(path, 40, every=9)
    points = read(path).curves[redline.Series("redline_normalized_step_size")].points()
    assert points == session._history.step_sizes


# What is broken off -------------------------------------------------------------------------------------------------


def test_a_truncated_line_is_left_out_and_said(path: Path):
    recorded(path, 30, every=5)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    cut = len(b"".join(lines[:-2])) + len(lines[-2]) // 2
    path.write_bytes(whole[:cut])
    record = read(path)
    assert record.snapshot.step == 25
    assert f"Line {len(lines) - 1} of run.jsonl is broken off and was left out." in record.notes


@pytest.mark.parametrize("seed", range(20))
def test_a_record_cut_anywhere_behind_its_first_line_is_read(path: Path, seed: int):
    if seed == 0:
        recorded(path, 1)
    recorded(path, 20, every=3)
    whole = path.read_bytes()
    second = whole.index(b"\n", whole.index(b"\n") + 1) + 1
    path.write_bytes(whole[: random.Random(seed).randrange(second, len(whole))])
    assert read(path).report().steps >= 1


def test_a_garbled_line_in_the_middle_is_left_out_and_said(path: Path):
    recorded(path, 30, every=5)
    lines = path.read_bytes().splitlines()
    lines[3] = b"\x00\xff\x00" + lines[3][:40]
    path.write_bytes(b"\n".join(lines) + b"\n")
    record = read(path)
    assert record.snapshot.step == 29
    assert "Line 4 of run.jsonl is unreadable and was left out." in record.notes


# What is no record --------------------------------------------------------------------------------------------------


def foreign(path: Path) -> None:
    path.write_text('{"epoch": 1, "loss": 0.3}\n{"epoch": 2, "loss": 0.2}\n')


def of_the_future(path: Path) -> None:
    path.write_text(json.dumps({**HEADER, "version": 2}) + "\n")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "which is not there; expected the file of a record"),
        (lambda path: path.write_bytes(b""), "which is empty: the run has not come to its first step"),
        (lambda path: path.write_bytes(os.urandom(4096)), "no record of Redline's: its first line is not JSON"),
        (lambda path: path.write_bytes(b"\x00" * 100_000), "no record of Redline's: its first line is not JSON"),
        (lambda path: path.write_text("step,loss\n0,2.3\n"), "no record of Redline's: its first line is not JSON"),
        (lambda path: path.write_text("[" * 100_000), "no record of Redline's: its first line is not JSON"),
        (lambda path: path.write_text("[1, 2]\n"), 'its first line does not say "format": "redline-record"'),
        (foreign, 'its first line does not say "format": "redline-record"'),
        (of_the_future, "a record of version 2; this Redline reads up to 1. Install the Redline that wrote it"),
        (lambda path: path.write_text(json.dumps({**HEADER, "version": "x"})), "a record of version 'x'; expected 1"),
        (lambda path: path.write_text(json.dumps({**HEADER, "run": 3})), "line 1 is not as a record of version 1"),
        (lambda path: path.write_text(json.dumps(HEADER) + "\n"), "holds no whole line; expected a run's first step"),
        (
            lambda path: path.write_text(json.dumps(HEADER) + '\n{"step": 0, "time": 1, "gauges": [3]}\n'),
            "line 2 is not as a record of version 1 has it",
        ),
        (lambda path: path.mkdir(), "which is a folder; expected a record's file. There: no .jsonl file"),
    ],
)
def test_what_is_no_record_is_refused_with_the_reason(path: Path, make: Callable[[Path], Any], message: str):
    make(path)
    with pytest.raises(ConfigurationError) as refused:
        read(path)
    assert message in str(refused.value)
    assert str(path) in str(refused.value)


def test_a_folder_is_refused_with_what_is_in_it(tmp_path: Path, path: Path):
    recorded(path, 1)
    with pytest.raises(ConfigurationError, match=r"which is a folder.*There: run\.jsonl\."):
        read(tmp_path)


def test_a_later_file_of_another_format_is_refused_too(path: Path):
    recorded(path, 3)
    foreign(path.with_name("run.1.jsonl"))
    with pytest.raises(ConfigurationError, match=r"run\.1\.jsonl, which is no record"):
        read(path)


# Samples ------------------------------------------------------------------------------------------------------------


def test_the_worst_samples_come_first_and_nan_before_all():
    samples = [FragileSample(1, 2, 3.0, 0.5), FragileSample(2, 0, 0.7, None), FragileSample(3, 1, float("nan"), None)]
    assert [one.step for one in worst(samples)] == [3, 2, 1]
