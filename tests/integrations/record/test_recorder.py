"""The recorder: what stands in its lines, that nothing is lost, and that nothing it meets ends a run."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from recorded_runs import RecordedRun, lines_of, recorded

import redline
from redline import ConfigurationError, RedlineWarning
from redline.integrations.record import read


def contents(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines_of(path)]


def test_a_record_is_a_header_a_line_a_snapshot_and_a_closing(tmp_path: Path):
    session = recorded(tmp_path / "run.jsonl", 30, every=10)
    header, *snapshots, closing = contents(tmp_path / "run.jsonl")
    assert (header["format"], header["version"], header["part"], header["first_step"]) == ("redline-record", 1, 0, 0)
    assert header["run"] == vars(session.latest.run)
    assert [line["step"] for line in snapshots] == [0, 10, 20, 29]
    assert closing["closed"]["seconds"] == pytest.approx(session.report().seconds)


def test_every_loss_and_every_r_is_recorded_as_it_was(tmp_path: Path):
    run, losses = RecordedRun(), []
    with run.attach(redline.JsonlRecorder(tmp_path / "run.jsonl", 10)):
        for step in range(25):
            run.steps(step, step + 1)
            losses.append([step, run.session.latest.value("redline_loss")])
    lines = contents(tmp_path / "run.jsonl")[1:-1]
    assert [point for line in lines for point in line["gauges"]["redline_loss"][0][1]] == losses
    r = [point[0] for line in lines for point in line["gauges"].get("redline_normalized_step_size", [[[], []]])[0][1]]
    assert r == list(range(0, 25, 2))


def test_a_line_holds_only_what_is_new(tmp_path: Path):
    recorded(tmp_path / "run.jsonl", 12, every=1)
    lines = contents(tmp_path / "run.jsonl")[1:-1]
    with_spectra = [line["step"] for line in lines if "redline_weight_spectral_norm" in line["gauges"]]
    assert with_spectra == [0, 5, 10]
    assert all("redline_nonfinite_total" not in line["counts"] for line in lines[1:])
    assert [line["counts"]["redline_steps_total"] for line in lines[:3]] == [[[[], 1.0]], [[[], 2.0]], [[[], 3.0]]]
    names = {labels[0] for labels, _ in lines[0]["gauges"]["redline_weight_spectral_norm"]}
    assert names == {"0.weight", "2.weight"}


def test_what_could_not_be_measured_any_more_is_said_to_be_absent(tmp_path: Path):
    class Once(redline.Monitor):
        """Measures at step 0 only."""

        def measure(self, step: Any, readings: Any) -> None:
            if step.index == 0:
                readings.gauge(redline.METRICS["redline_ghost_radius"], 1.0)
            else:
                readings.absent(redline.METRICS["redline_ghost_radius"])

    run = RecordedRun()
    with run.attach(redline.JsonlRecorder(tmp_path / "run.jsonl", 1), monitors=[Once(1)], controllers=[]):
        run.steps(0, 3)
    lines = contents(tmp_path / "run.jsonl")[1:-1]
    assert [line.get("absent") for line in lines] == [None, [["redline_ghost_radius", []]], None]
    assert "redline_ghost_radius" not in read(tmp_path / "run.jsonl").snapshot


def test_numbers_that_json_does_not_have_survive(tmp_path: Path):
    class Odd(redline.Monitor):
        """Measures what is not finite."""

        def measure(self, step: Any, readings: Any) -> None:
            values = [math.nan, math.inf, -math.inf, 0.1 + 0.2]
            readings.layers(
                redline.METRICS["redline_weight_spectral_norm"], list("abcd"), torch.tensor(values, dtype=torch.float64)
            )

    run = RecordedRun()
    with run.attach(redline.JsonlRecorder(tmp_path / "run.jsonl", 1), monitors=[Odd(1)], controllers=[]) as session:
        run.steps(0, 2)
    for line in lines_of(tmp_path / "run.jsonl"):
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    expected = session.latest.layers("redline_weight_spectral_norm")
    got = read(tmp_path / "run.jsonl").snapshot.layers("redline_weight_spectral_norm")
    assert str(got) == str(expected) == str({"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.1 + 0.2})


def test_interventions_and_samples_are_recorded(tmp_path: Path):
    session = recorded(tmp_path / "run.jsonl", 30, every=10)
    record = read(tmp_path / "run.jsonl")
    assert session.interventions
    assert tuple(record.interventions) == session.interventions
    longest = max(session.interventions, key=lambda one: one.saw["r"])
    assert (record.samples[0].step, record.samples[0].r) == (longest.step, pytest.approx(longest.saw["r"]))
    assert 0 <= record.samples[0].sample < 12
    assert len(record.samples) == 20


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "max_bytes"), [(1, 16_384), (1, 19_000), (3, 17_000), (7, 13_000)])
def test_a_full_file_is_followed_by_another_and_each_is_readable_by_itself(tmp_path: Path, every: int, max_bytes: int):
    run = RecordedRun()
    with run.attach(redline.JsonlRecorder(tmp_path / "run.jsonl", every, max_bytes=max_bytes)) as session:
        run.steps(0, 60)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert "run.1.jsonl" in files
    assert 3 <= len(files) < 8
    for path in tmp_path.iterdir():
        assert path.stat().st_size < max_bytes + 8_192
        alone = read(path)
        assert set(alone.snapshot.values) == set(session.latest.values)
        assert alone.run == session.latest.run
    whole = read(tmp_path / "run.jsonl")
    assert whole.report().to_dict() == session.report().to_dict()


def test_of_many_files_the_first_stays_and_the_latest_do(tmp_path: Path):
    run = RecordedRun()
    with run.attach(redline.JsonlRecorder(tmp_path / "run.jsonl", 1, max_bytes=4096)):
        run.steps(0, 80)
    numbers = sorted(int(path.name.split(".")[1]) for path in tmp_path.iterdir() if path.name != "run.jsonl")
    assert (tmp_path / "run.jsonl").exists()
    assert len(numbers) == 7
    assert numbers == list(range(numbers[0], numbers[0] + 7))
    assert numbers[0] > 1
    record = read(tmp_path / "run.jsonl")
    assert record.snapshot.step == 79
    assert any("files 1 to" in note and "gone" in note for note in record.notes)


def test_a_resumed_run_goes_on_and_what_it_did_again_replaces_what_was_there(tmp_path: Path):
    path = tmp_path / "run.jsonl"
    run = RecordedRun()
    run.attach(redline.JsonlRecorder(path, 3))
    run.steps(0, 20)
    state, model, optimizer = run.session.state_dict(), run.model.state_dict(), run.optimizer.state_dict()
    model = {name: tensor.clone() for name, tensor in model.items()}
    kept = {key: value.clone() for key, value in enumerate(s["momentum_buffer"] for s in optimizer["state"].values())}
    run.steps(20, 31, lambda step: 50.0)  # goes astray, and is killed
    run.session._delivery.sinks[0][1]._file.close()  # as the system closes it

    again = RecordedRun()
    again.model.load_state_dict(model)
    for number, entry in optimizer["state"].items():
        entry["momentum_buffer"] = kept[number]
    again.optimizer.load_state_dict(optimizer)
    with again.attach(redline.JsonlRecorder(path, 3)) as session:
        session.load_state_dict(state)
        again.steps(20, 40)
    record = read(path)
    live, told = session.report().to_dict(), record.report().to_dict()
    assert told == live
    assert record.tallies == tuple(session._control.log.tallies)
    assert any("did those steps again" in note for note in record.notes)


def test_another_run_in_the_same_file_replaces_the_first(tmp_path: Path):
    recorded(tmp_path / "run.jsonl", 30)
    session = recorded(tmp_path / "run.jsonl", 12, lr=0.1)
    record = read(tmp_path / "run.jsonl")
    assert record.report().to_dict() == session.report().to_dict()
    assert any("was another run" in note for note in record.notes)


def test_a_line_that_was_broken_off_is_ended_before_going_on(tmp_path: Path):
    path = tmp_path / "run.jsonl"
    recorded(path, 20)
    path.write_bytes(path.read_bytes()[:-300])
    session = recorded(path, 10)
    record = read(path)
    assert record.report().to_dict() == session.report().to_dict()
    assert any("unreadable" in note for note in record.notes)


def test_the_folder_is_made(tmp_path: Path):
    recorded(tmp_path / "some" / "where" / "run.jsonl", 2)
    assert read(tmp_path / "some" / "where" / "run.jsonl").snapshot.step == 1


# What goes wrong ------------------------------------------------------------------------------------------------------


def test_two_recorders_do_not_write_to_one_file(tmp_path: Path):
    path = tmp_path / "run.jsonl"
    run = RecordedRun()
    with pytest.warns(RedlineWarning, match="to which another recorder writes; expected one of its own"):
        session = run.attach(redline.JsonlRecorder(path, 1), redline.JsonlRecorder(path, 1))
    run.steps(0, 3)
    session.close()
    assert [line["step"] for line in contents(path)[1:-1]] == [0, 1, 2]


def test_a_file_is_free_again_once_its_session_has_ended(tmp_path: Path):
    """Workers of a data loader, forked while it was open, keep it open for longer."""
    path, recorder, run = tmp_path / "run.jsonl", redline.JsonlRecorder(tmp_path / "run.jsonl", 1), RecordedRun()
    with run.attach(recorder):
        run.steps(0, 2)
        shared = os.dup(recorder._file.fileno())
    recorded(path, 3)
    os.close(shared)
    assert read(path).snapshot.step == 2


def test_a_path_that_cannot_be_written_is_a_warning(tmp_path: Path):
    (tmp_path / "file").write_text("")
    run = RecordedRun()
    with pytest.warns(RedlineWarning, match="JsonlRecorder failed and is switched off"):
        run.attach(redline.JsonlRecorder(tmp_path / "file" / "run.jsonl"))
    run.steps(0, 3)
    run.session.close()
    assert run.session.latest.value("redline_steps_total") == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk without space")
def test_a_full_disk_is_a_warning(tmp_path: Path):
    (tmp_path / "run.jsonl").symlink_to("/dev/full")
    run = RecordedRun()
    run.attach(redline.JsonlRecorder(tmp_path / "run.jsonl", 1))
    with pytest.warns(RedlineWarning, match="switched off: OSError: .*No space left on device.*unrecorded from step 0"):
        run.steps(0, 3)
    run.session.close()
    assert run.session.latest.value("redline_steps_total") == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_bytes": 100}, "got max_bytes=100; expected at least 4096"),
        ({"path": "."}, r"got path '\.', which is a folder; expected a file, such as run\.jsonl"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str):
    with pytest.raises(ConfigurationError, match=message):
        redline.JsonlRecorder(**arguments)


def test_a_run_that_is_killed_loses_at_most_its_last_line(tmp_path: Path):
    program = textwrap.dedent(
        f"""
        import os, signal, sys
        sys.path.insert(0, {str(Path(__file__).parents[2] / "shared")!r})
        import redline
        from recorded_runs import RecordedRun
        run = RecordedRun()
        run.attach(redline.JsonlRecorder("run.jsonl", 5))
        run.steps(0, 33)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    record = read(tmp_path / "run.jsonl")
    assert record.snapshot.step == 30
    assert record.closing is None
    assert record.history.courses[redline.Series("redline_loss")].measured == 31
    assert any("has not ended in order" in note and "step 30" in note for note in record.notes)


def test_only_rank_zero_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("redline.integrations.record.recorder.is_rank_zero", lambda: False)
    recorded(tmp_path / "run.jsonl", 5)
    assert os.listdir(tmp_path) == []
