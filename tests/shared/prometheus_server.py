"""The real Prometheus, on loopback, for as long as a test takes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest

REQUIRED = "REDLINE_REQUIRE_PROMETHEUS"
PATIENCE = 60.0  # seconds

T = TypeVar("T")


def program(name: str) -> str:
    """``prometheus`` or ``promtool``; without it the test is skipped, or fails where they are required."""
    found = shutil.which(name)
    if not found:
        reason = f"{name} is not on PATH; .ci/run unpacks Debian's package"
        if os.environ.get(REQUIRED):
            pytest.fail(f"{reason}, and {REQUIRED} says that it must be there")
        pytest.skip(reason)
    return found


def promtool(*arguments: str | Path, stdin: str = "", where: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program("promtool"), *arguments], input=stdin, cwd=where, capture_output=True, text=True, timeout=PATIENCE
    )


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def eventually(question: Callable[[], T], what: str, patience: float = PATIENCE) -> T:
    """The answer, as soon as there is one; what fails to answer meanwhile is asked again."""
    until, said = time.monotonic() + patience, ""
    while time.monotonic() < until:
        try:
            answer = question()
        except (OSError, AssertionError) as error:
            said = f": {error}"
        else:
            if answer:
                return answer
        time.sleep(0.1)
    raise AssertionError(f"{what}: not within {patience:g} seconds{said}")


class PrometheusServer:
    """``prometheus`` in a process of its own, with a folder for its data, on a free port."""

    def __init__(self, configuration: Path, data: Path, flags: Sequence[str] = ()) -> None:
        """Start it with a configuration, and wait until it answers."""
        self.url = f"http://127.0.0.1:{free_port()}"
        self.log = data.with_suffix(".log")
        command = [
            program("prometheus"),
            *flags,
            f"--config.file={configuration}",
            f"--storage.tsdb.path={data}",
            f"--web.listen-address={self.url.removeprefix('http://')}",
        ]
        with self.log.open("w") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            eventually(self._ready, "Prometheus answers")
        except BaseException:
            self.stop()
            raise

    def _ready(self) -> bool:
        if self._process.poll() is not None:
            pytest.fail(f"prometheus has ended:\n{self.log.read_text()[-2000:]}")
        return urllib.request.urlopen(f"{self.url}/-/ready", timeout=5).status == 200

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(PATIENCE)

    def ask(self, path: str, **arguments: str | float) -> Any:
        """``data`` of an answer of the HTTP API; what Prometheus objects to fails the test with its own words."""
        query = urllib.parse.urlencode(arguments, doseq=True)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            pytest.fail(f"{path} {arguments}: {error.read().decode()}")

    def query(self, expression: str, at: float | None = None) -> list[dict[str, Any]]:
        """Series of an instant query, or a scalar as one."""
        found = self.ask("query", query=expression, **({} if at is None else {"time": at}))
        if found["resultType"] == "scalar":
            return [{"metric": {}, "value": found["result"]}]
        return found["result"]

    def query_range(self, expression: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
        return self.ask("query_range", query=expression, start=start, end=end, step=step)["result"]
