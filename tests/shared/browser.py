"""A page opened in headless Chromium, where there is one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Opened:
    """A page after its script has run: the document, what the root element says, and what the console said."""

    document: str
    console: str

    def root(self, name: str) -> str | None:
        """An attribute of the root element, such as ``data-charts``."""
        tag = re.search(r"<html[^>]*>", self.document)
        found = re.search(rf'{name}="([^"]*)"', tag[0]) if tag else None
        return found[1] if found else None

    @property
    def ink(self) -> list[int]:
        """Of each canvas, how many pixels are not blank."""
        return [int(count) for count in re.findall(r'data-ink="(\d+)"', self.document)]


def chromium() -> str:
    """Where it is; the test is skipped where it is not, unless REDLINE_REQUIRE_CHROMIUM=1."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        reason = "Chromium is not installed: no page can be looked at"
        if os.environ.get("REDLINE_REQUIRE_CHROMIUM") == "1":
            pytest.fail(f"{reason}, and REDLINE_REQUIRE_CHROMIUM=1")
        pytest.skip(reason)
    return found


def opened(page: Path, *, width: int = 1200, dark: bool = False, screenshot: Path | None = None) -> Opened:
    """Open it as a file, with no network, and let it draw."""
    with tempfile.TemporaryDirectory() as profile:
        command = [
            chromium(),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-extensions",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            "--no-first-run",
            "--hide-scrollbars",
            f"--user-data-dir={profile}",
            f"--window-size={width},{4200 if screenshot else 900}",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            "--virtual-time-budget=5000",
            "--enable-logging=stderr",
            *([f"--screenshot={screenshot}"] if screenshot else ["--dump-dom"]),
            f"{page.resolve().as_uri()}#check",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    assert done.returncode == 0, done.stderr
    return Opened(done.stdout, console)
