"""The command line: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest

import redline
from redline.integrations.cli import main

TIMEOUT = 120  # seconds


def run(command: Sequence[str | Path], where: Path) -> subprocess.CompletedProcess[str]:
    # One thread: models as small as these only lose time to threads that wait for each other.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=where, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )


def command_line(where: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The installed command."""
    return run([Path(sysconfig.get_path("scripts")) / "redline", *arguments], where)


def without(module: str, where: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a Python that does not find a module."""
    program = (
        f"import sys; sys.modules[{module!r}] = None\n"
        f"from redline.integrations.cli import main; sys.exit(main({list(arguments)!r}))"
    )
    return run([sys.executable, "-c", program], where)


def test_version(tmp_path: Path):
    done = command_line(tmp_path, "--version")
    assert done.returncode == 0
    assert done.stdout.strip() == f"redline {redline.__version__}"


def test_help_lists_the_commands(tmp_path: Path):
    done = command_line(tmp_path, "--help")
    assert done.returncode == 0
    assert re.search(r"^usage: redline", done.stdout)
    assert re.search(r"^\s+demo\s+\w+", done.stdout, re.MULTILINE)


def test_help_of_the_demo_lists_its_options(tmp_path: Path):
    done = command_line(tmp_path, "demo", "--help")
    assert done.returncode == 0
    for option in ("--port", "--short", "--picture"):
        assert option in done.stdout
    assert "9108" in done.stdout


def test_an_unknown_command_is_answered_with_those_there_are(tmp_path: Path):
    done = command_line(tmp_path, "dmeo")
    assert done.returncode == 2
    assert re.search("invalid choice: 'dmeo' .*demo", done.stderr)
    assert "usage: redline" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["demo", "--prot", "1"], "unrecognized arguments: --prot 1"),
        (["demo", "--port", "many"], "argument --port: invalid int value: 'many'"),
    ],
)
def test_other_mistakes(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str):
    with pytest.raises(SystemExit, match=r"^2$"):
        main(arguments)
    assert message in capsys.readouterr().err


def test_a_port_out_of_range_is_a_mistake_too(tmp_path: Path):
    done = command_line(tmp_path, "demo", "--short", "--port", "70000")
    assert done.returncode == 2
    assert re.search(r"got port 70000; expected 0 .* to 65535", done.stderr)
    assert "Traceback" not in done.stderr


# The demo ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """A short demo with a picture, and the folder it ran in."""
    where = tmp_path_factory.mktemp("demo")
    return command_line(where, "demo", "--short", "--port", "0", "--picture", where / "report.svg"), where


def test_the_demo_runs(demo: tuple[subprocess.CompletedProcess[str], Path]):
    done, _ = demo
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_the_demo_shows_both_models_their_steps_and_their_reports(demo: tuple[subprocess.CompletedProcess[str], Path]):
    text = demo[0].stdout
    assert text.index("digits transformer") < text.index("byte-level language model")
    assert text.count("stability report") == 2
    assert len(re.findall(r"redline step \d+", text)) >= 4
    assert re.search(r"step size r|Step size r", text)
    assert re.search(r"(Within limits|Near the redline|Over the redline)", text)


def test_the_demo_says_where_its_metrics_are(demo: tuple[subprocess.CompletedProcess[str], Path]):
    ports = re.findall(r"http://127\.0\.0\.1:(\d+)/metrics", demo[0].stdout)
    assert len(ports) == 2
    assert all(int(port) > 0 for port in ports)


def test_the_demo_draws_its_report(demo: tuple[subprocess.CompletedProcess[str], Path]):
    _, where = demo
    root = ElementTree.parse(where / "report.svg").getroot()
    assert root.tag.endswith("svg")
    assert "stability" in "".join(root.itertext()).replace("\xa0", " ")


def test_the_demo_leaves_nothing_but_the_picture(demo: tuple[subprocess.CompletedProcess[str], Path]):
    _, where = demo
    assert [path.name for path in where.iterdir()] == ["report.svg"]


# Without the extras --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["lightning", "sklearn"])
def test_the_demo_says_what_to_install(tmp_path: Path, module: str):
    done = without(module, tmp_path, "demo", "--short")
    assert done.returncode == 2
    assert module in done.stderr
    assert "pip install 'redline[demo]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_redline_is_imported_without_lightning(tmp_path: Path):
    program = "import sys; sys.modules['lightning'] = None; import redline; print(redline.__version__)"
    done = run([sys.executable, "-c", program], tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, redline.__version__)


def test_redline_does_not_import_lightning(tmp_path: Path):
    program = "import sys, redline; print([name for name in sys.modules if name.split('.')[0] == 'lightning'])"
    done = run([sys.executable, "-c", program], tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "[]")
