"""Following a record while it is written."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from recorded_runs import RecordedRun, recorded
from sinks import Keep

import redline
from redline import ConfigurationError, Snapshot
from redline.integrations.record import follow


class Keeping(Keep):
    """Keeps the last one too, as the recorder does."""

    finish = Keep.emit


@pytest.mark.parametrize("max_bytes", [2**20, 8192])
def test_the_snapshots_are_those_that_were_recorded(tmp_path: Path, max_bytes: int):
    run, keeping = RecordedRun(), Keeping(2)
    with run.attach(redline.JsonlRecorder(tmp_path / "run.jsonl", 2, max_bytes=max_bytes), keeping):
        run.steps(0, 20)
    followed = list(follow(tmp_path / "run.jsonl"))
    assert len(followed) == len(keeping.snapshots)
    for got, expected in zip(followed, keeping.snapshots, strict=True):
        assert (got.step, got.time, got.run, got.first_step) == (
            expected.step,
            expected.time,
            expected.run,
            expected.first_step,
        )
        assert got.values == expected.values
        assert got.measured_at == expected.measured_at
        assert sorted(got.since.measurements) == sorted(expected.since.measurements)
        assert got.since.interventions == expected.since.interventions
        assert got.since.samples == expected.since.samples


@pytest.mark.parametrize("max_bytes", [2**20, 8192])
def test_what_is_written_later_comes_later(tmp_path: Path, max_bytes: int):
    run = RecordedRun()
    run.attach(redline.JsonlRecorder(tmp_path / "run.jsonl", 1, max_bytes=max_bytes))
    run.steps(0, 2)
    snapshots: Iterator[Snapshot] = follow(tmp_path / "run.jsonl", poll=0.01)
    assert [next(snapshots).step, next(snapshots).step] == [0, 1]
    for step in range(2, 20):
        run.steps(step, step + 1)
        assert next(snapshots).step == step
    run.session.close()
    assert {snapshot.step for snapshot in snapshots} <= {19}, "the run has ended"


def test_half_a_line_is_waited_for(tmp_path: Path):
    recorded(tmp_path / "whole.jsonl", 9, every=3)
    whole = (tmp_path / "whole.jsonl").read_bytes()
    path = tmp_path / "run.jsonl"
    path.write_bytes(whole[:-700])
    steps: list[int] = []
    reader = threading.Thread(target=lambda: steps.extend(one.step for one in follow(path, poll=0.01)), daemon=True)
    reader.start()
    with path.open("ab", buffering=0) as file:
        for byte in range(len(whole) - 700, len(whole)):
            file.write(whole[byte : byte + 1])
    reader.join(20)
    assert not reader.is_alive()
    assert steps == [0, 3, 6, 8]


def test_a_run_that_goes_on_is_left_where_it_is_unless_it_is_to_be_waited_for(tmp_path: Path):
    run = RecordedRun()
    run.attach(redline.JsonlRecorder(tmp_path / "run.jsonl", 1))
    run.steps(0, 3)
    assert [one.step for one in follow(tmp_path / "run.jsonl", live=False)] == [0, 1, 2]
    run.session.close()


def test_what_is_no_record_is_refused(tmp_path: Path):
    (tmp_path / "run.jsonl").write_text("step,loss\n")
    with pytest.raises(ConfigurationError, match="no record of Redline's"):
        next(follow(tmp_path / "run.jsonl"))
