"""Metrics as a file: the page that would be served, whole at any moment, and never worth a run."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from scraping import RUN, TIMEOUT, Loop, samples, scrape, snapshot

import redline

PER_LAYER = [name for name, metric in redline.METRICS.items() if metric.labels == ("layer",)]


def test_the_file_holds_what_the_exporter_serves(tmp_path: Path):
    path = tmp_path / "run.prom"
    exporter = redline.PrometheusExporter(port=0, every=1)
    loop = Loop(redline.TextfileSink(path, every=1), exporter)
    at_start = path.read_text()
    assert at_start == scrape(exporter.url)
    assert samples(at_start)["redline_steps_total"] == {(): 0}
    loop.step()
    text = path.read_text()
    assert text == scrape(exporter.url) != at_start
    loop.session.close()
    assert "redline_weight_spectral_norm" in samples(text)
    assert list(tmp_path.iterdir()) == [], "taken away at the end, as the served page is"


def test_it_keeps_to_its_schedule_and_its_budget(tmp_path: Path):
    path = tmp_path / "run.prom"
    sink = redline.TextfileSink(path, every=3, max_series=100)
    loop = Loop(sink, monitors=[redline.StepHealth()])
    steps = []
    for _ in range(5):
        loop.step()
        steps.append(samples(path.read_text())["redline_steps_total"][()])
    layers = {(f"layers.{k}.weight",): 1.0 for k in range(500)}
    sink.emit(snapshot({"redline_weight_spectral_norm": layers}))
    found = samples(path.read_text())
    loop.session.close()
    assert steps == [1, 1, 1, 4, 4]
    assert 90 < sum(map(len, found.values())) <= 100
    assert found["redline_folded_layers"][()] == 500 - len(found["redline_weight_spectral_norm"])


def test_a_reader_never_sees_half_a_file(tmp_path: Path):
    path = tmp_path / "run.prom"
    sink = redline.TextfileSink(path, max_series=2000)
    pages = [snapshot({name: {(f"layer.{k}",): float(n) for k in range(100)} for name in PER_LAYER}) for n in range(20)]
    sink.open(pages[0])
    done = threading.Event()

    def write() -> None:
        while not done.is_set():
            for page in pages:
                sink.emit(page)

    writing = threading.Thread(target=write)
    writing.start()
    seen = []
    try:
        for _ in range(50):
            found = samples(path.read_text())
            values = {value for name in PER_LAYER for value in found[name].values()}
            assert len(values) == 1
            assert sum(len(found[name]) for name in PER_LAYER) == 100 * len(PER_LAYER)
            seen.append(values.pop())
    finally:
        done.set()
        writing.join(TIMEOUT)
    assert len(set(seen)) > 1


@pytest.mark.parametrize("name", ["metrics.txt", "prom", ".prom", "run.prom.bak"])
def test_a_name_the_node_exporter_would_not_read_is_refused(tmp_path: Path, name: str):
    with pytest.raises(redline.ConfigurationError, match=rf"got '.*{name}'; expected a name that ends in .prom"):
        redline.TextfileSink(tmp_path / name)


def test_a_path_may_be_a_string(tmp_path: Path):
    loop = Loop(redline.TextfileSink(str(tmp_path / "run.prom")))
    assert (tmp_path / "run.prom").exists()
    loop.session.close()


@pytest.mark.parametrize("what", ["missing", "a file", "read-only"])
def test_a_folder_that_cannot_be_written_is_a_warning_and_training_goes_on(tmp_path: Path, what: str):
    folder = tmp_path / "collected"
    if what == "a file":
        folder.write_text("")
    elif what == "read-only":
        folder.mkdir(mode=0o500)
        if os.access(folder, os.W_OK):
            pytest.skip("this user may write anywhere")
    with pytest.warns(
        redline.RedlineWarning, match=r"run.prom', which cannot be written .*; expected a file in a folder"
    ):
        loop = Loop(redline.TextfileSink(folder / "run.prom", every=1))
    for _ in range(3):
        loop.step()
    loop.session.close()
    assert loop.session.report().steps == 3


def test_a_folder_that_goes_away_during_the_run_is_a_warning(tmp_path: Path):
    folder = tmp_path / "collected"
    folder.mkdir()
    loop = Loop(redline.TextfileSink(folder / "run.prom", every=1))
    loop.step()
    (folder / "run.prom").unlink()
    folder.rmdir()
    with pytest.warns(redline.RedlineWarning, match="cannot be written"):
        loop.step()
    loop.step()
    loop.session.close()
    assert loop.session.report().steps == 3


def test_a_file_already_taken_away_does_not_matter(tmp_path: Path):
    loop = Loop(redline.TextfileSink(tmp_path / "run.prom", every=1))
    (tmp_path / "run.prom").unlink()
    loop.session.close()
    assert loop.session.notes == ()


def test_it_can_be_read_by_others(tmp_path: Path):
    loop = Loop(redline.TextfileSink(tmp_path / "run.prom"))
    mode = (tmp_path / "run.prom").stat().st_mode & 0o777
    (tmp_path / "plain").write_text("")
    loop.session.close()
    assert mode == (tmp_path / "plain").stat().st_mode & 0o777, "the node exporter is another user"


@pytest.mark.parametrize("group_is_gone_at_the_end", [False, True])
def test_other_ranks_write_nothing_and_take_nothing_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group_is_gone_at_the_end: bool
):
    path = tmp_path / "run.prom"
    path.write_text("of rank 0")
    sink = redline.TextfileSink(path, every=1)
    with monkeypatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "get_rank", lambda *_: 1)
        sink.open(snapshot({}))
        sink.emit(snapshot({"redline_loss": {(): 1.0}}))
        if not group_is_gone_at_the_end:
            sink.close(None)
    sink.close(None)
    assert path.read_text() == "of rank 0"


def test_a_pickle_of_an_open_one_leaves_the_file_to_the_original(tmp_path: Path):
    path = tmp_path / "run.prom"
    loop = Loop(redline.TextfileSink(path, every=1))
    copied = pickle.loads(pickle.dumps(loop.session._delivery.sinks[0][1]))
    copied.close(loop.session.report())
    loop.step()
    assert samples(path.read_text())["redline_steps_total"][()] == 1
    loop.session.close()
    second = Loop(copied)
    assert samples(path.read_text())["redline_steps_total"][()] == 0
    second.session.close()


def test_a_killed_run_leaves_a_whole_file(tmp_path: Path):
    code = f"""
import os, redline, torch
model = torch.nn.Linear(3, 2)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
sink = redline.TextfileSink({str(tmp_path / "run.prom")!r}, every=1)
session = redline.attach(model, optimizer, sinks=[sink], run={RUN.run!r})
model(torch.ones(4, 3)).logsumexp(-1).sum().backward()
optimizer.step()
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    found = samples((tmp_path / "run.prom").read_text())
    assert found["redline_steps_total"][()] == 1
    assert dict(next(iter(found["redline_run_info"])))["run"] == RUN.run
