"""``redline watch``: addresses and files, once and as it goes, on a terminal and elsewhere."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from redline.errors import ConfigurationError
from redline.integrations.cli import main
from redline.integrations.watch import command
from redline.integrations.watch.command import watch
from redline.integrations.watch.exposition import UnreachableError
from redline.integrations.watch.sources import ExpositionSource, RecordSource, Source, source_of
from redline.readings import RunInfo, Series, Snapshot

NOBODY = "127.0.0.1:9"  # the discard port: nobody listens there


def snapshot(step: int, loss: float = 1.0) -> Snapshot:
    values = {Series("redline_loss"): loss, Series("redline_steps_total"): step + 1.0}
    return Snapshot(step, time.time(), RunInfo("mine", "0", "f", "s", 1), values, {})


# What a target is ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "url"),
    [
        ("127.0.0.1:9108", "http://127.0.0.1:9108/metrics"),
        ("node-3.cluster:80", "http://node-3.cluster:80/metrics"),
        ("[::1]:9108", "http://[::1]:9108/metrics"),
        ("localhost:9108/other", "http://localhost:9108/other"),
        ("http://localhost:9108", "http://localhost:9108/metrics"),
        ("https://localhost:9108/metrics", "https://localhost:9108/metrics"),
    ],
)
def test_addresses(target: str, url: str):
    source = source_of(target)
    assert isinstance(source, ExpositionSource)
    assert source.name == url


@pytest.mark.parametrize("target", ["nothing.jsonl", "localhost", "a b:80", ""])
def test_what_is_neither_is_refused(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    if target:
        with pytest.raises(ConfigurationError, match=r"expected the address .* or the file"):
            source_of(target)


def test_an_interval_must_be_positive():
    for interval in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigurationError, match="expected a positive number of seconds"):
            watch(NOBODY, interval=interval)


# Records -------------------------------------------------------------------------------------------------------------


def test_a_record_is_followed_without_waiting_for_it():
    def follow(path: Path) -> Iterator[Snapshot]:
        yield snapshot(0)
        yield snapshot(1)
        time.sleep(0.3)
        yield snapshot(2)

    source = RecordSource(Path("run.jsonl"), follow)
    time.sleep(0.1)
    began = time.perf_counter()
    assert [one.step for one in source.poll()] == [0, 1]
    assert source.poll() == []
    assert time.perf_counter() - began < 0.1
    assert not source.ended
    source.wait()
    assert [one.step for one in source.poll()] == [2]
    assert source.ended


def test_a_record_that_cannot_be_read_says_so():
    def follow(path: Path) -> Iterator[Snapshot]:
        raise ConfigurationError("got no record")
        yield

    source = RecordSource(Path("run.jsonl"), follow)
    source.wait()
    with pytest.raises(ConfigurationError, match="got no record"):
        source.poll()


def test_the_projects_own_reader_follows_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def follow(path: Path, *, live: bool) -> Iterator[Snapshot]:
        asked.append((path, live))
        yield snapshot(5)

    monkeypatch.setitem(sys.modules, "redline.integrations.record", SimpleNamespace(follow=follow))
    file = tmp_path / "run:1.jsonl"  # an address it is not, for it is there
    file.write_text("")
    once = source_of(str(file), live=False)
    assert once.ended
    assert [one.step for one in once.poll()] == [5]
    source_of(str(file)).wait()
    assert asked == [(file, False), (file, True)]


# The loop ------------------------------------------------------------------------------------------------------------


class Scripted:
    """Gives what a script says, one entry a look; an exception is raised. Ends with it."""

    name = "script"

    def __init__(self, *script: Snapshot | Exception | None) -> None:
        self.script = list(script)

    @property
    def ended(self) -> bool:
        return not self.script

    def poll(self) -> list[Snapshot]:
        if not self.script:
            return []
        one = self.script.pop(0)
        if isinstance(one, BaseException):
            raise one
        return [] if one is None else [one]


def watched(monkeypatch: pytest.MonkeyPatch, source: Source, *, terminal: bool = False, once: bool = False) -> str:
    monkeypatch.setattr(command, "source_of", lambda target, live: source)
    out = io.StringIO()
    watch("x", interval=0.01, once=once, console=Console(file=out, width=90, force_terminal=terminal))
    return out.getvalue()


def test_off_a_terminal_a_view_is_printed_at_each_new_step(monkeypatch: pytest.MonkeyPatch):
    text = watched(monkeypatch, Scripted(snapshot(0), None, snapshot(0), None, snapshot(7)))
    assert text.count("redline watch") == 3  # two steps, and the end
    assert "\x1b" not in text
    assert "The run has ended." in text


def test_on_a_terminal_the_view_is_redrawn(monkeypatch: pytest.MonkeyPatch):
    text = watched(monkeypatch, Scripted(snapshot(0), snapshot(7)), terminal=True)
    assert "\x1b[" in text
    assert "The run has ended." in text


def test_a_job_that_does_not_answer_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    refused = UnreachableError("http://x: connection refused")
    text = watched(monkeypatch, Scripted(refused, refused, snapshot(3), refused))
    assert text.count("Trying again every 0.01 s") == 2  # said when it begins, not at each look
    assert "mine" in text


def test_ctrl_c_ends_it_quietly(monkeypatch: pytest.MonkeyPatch):
    assert "mine" in watched(monkeypatch, Scripted(snapshot(3), KeyboardInterrupt()))


def test_what_is_not_redlines_ends_it(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigurationError, match="another program"):
        watched(monkeypatch, Scripted(ConfigurationError("another program")))


def test_once_prints_one_view(monkeypatch: pytest.MonkeyPatch):
    text = watched(monkeypatch, Scripted(snapshot(3), snapshot(4)), once=True)
    assert text.count("redline watch") == 1


def test_once_needs_something_to_show(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigurationError, match="nothing answers at http://x"):
        watched(monkeypatch, Scripted(UnreachableError("http://x: refused")), once=True)
    with pytest.raises(ConfigurationError, match="holds no snapshot yet"):
        watched(monkeypatch, Scripted(None, None), once=True)


# The command ---------------------------------------------------------------------------------------------------------


def test_the_command_refuses_what_does_not_answer(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["watch", NOBODY, "--once"])
    assert "nothing answers at http://127.0.0.1:9/metrics" in capsys.readouterr().err


PROGRAM = """
import time, torch, redline
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
exporter = redline.PrometheusExporter(port=0, every=1)
with redline.attach(model, optimizer, sinks=[exporter], run="the-job") as session:
    for step in range(10_000):
        model(torch.randn(8, 5)).logsumexp(-1).mean().backward()
        optimizer.step()
        time.sleep(0.05)
        if step == 3:
            print(exporter.url, flush=True)
"""


@pytest.fixture(scope="module")
def job() -> Iterator[str]:
    """A job in a process of its own that serves its metrics; where."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def test_a_running_job_is_shown_once(job: str, capsys: pytest.CaptureFixture[str]):
    assert main(["watch", job.removeprefix("http://").removesuffix("/metrics"), "--once"]) == 0
    text = capsys.readouterr().out
    assert "the-job" in text
    assert "0.weight" in text
    assert "no interventions" in text


def test_ctrl_c_ends_the_command_with_status_0_and_leaves_the_job_alone(job: str):
    program = "import sys; from redline.integrations.cli import main; sys.exit(main(sys.argv[1:]))"
    arguments = [sys.executable, "-c", program, "watch", job, "--interval", "0.1"]
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # which a job in the background does not
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heeding) as process:
        assert process.stdout is not None
        process.stdout.readline()  # the first view's first line
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (0, b"")
    assert "steps/s" in out.decode()  # more than one step was seen
    assert main(["watch", job, "--once"]) == 0
