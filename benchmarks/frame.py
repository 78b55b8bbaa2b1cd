"""What the benchmarks share: options, a Markdown page that shows on the terminal as it grows, and its writing."""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from redline.integrations.demo.machine import describe

RESULTS = Path(__file__).parent / "results"


class Page:
    """A results page: each line is printed when it is known."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def text(self, *lines: str) -> None:
        for line in lines:
            self.lines.append(line)
            print(line, flush=True)

    def table(self, *columns: str) -> None:
        self.text("", self._row(columns), "|" + "---|" * len(columns))

    def row(self, *cells: str) -> None:
        self.text(self._row(cells))

    def _row(self, cells: Sequence[str]) -> str:
        return f"| {' | '.join(cells)} |"


@dataclass(frozen=True)
class Setting:
    """An option of a benchmark: an int or a list of them, at full length and with ``--quick``."""

    full: Any
    quick: Any
    help: str


@dataclass(frozen=True)
class Benchmark:
    """One file's measurement.

    Attributes:
        name: of the file, and of its results.
        title: heading of the results.
        measure: fills the page; gets the settings, ``device`` and ``only``.
        settings: by name; each is an option of the command.
        duration: roughly, at full length on two cores, for ``--help``.
    """

    name: str
    title: str
    measure: Callable[[Page, argparse.Namespace], None]
    settings: dict[str, Setting]
    duration: str

    def run(self, device: str, *, quick: bool = False, write: bool = False, only: str = "", **given: Any) -> Page:
        """Measure; ``given``: settings that differ from the defaults."""
        options = {name: setting.quick if quick else setting.full for name, setting in self.settings.items()}
        changed = {name: value for name, value in given.items() if value not in (None, options[name])}
        options |= changed
        page = Page()
        page.text(
            f"# {self.title}", "", f"{describe()}.", "", f"Command: `{self._command(device, quick, only, changed)}`."
        )
        page.text("")
        started = time.perf_counter()
        self.measure(page, argparse.Namespace(device=device, only=only, **options))
        print(f"\n{self.name}: {(time.perf_counter() - started) / 60:.1f} minutes\n", flush=True)
        if write:
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / f"{self.name}_{device}.md").write_text("\n".join(page.lines) + "\n")
        return page

    def main(self) -> None:
        """Run from this file's own command line."""
        parser = argparse.ArgumentParser(description=f"{self.title}; {self.duration} at full length on two CPU cores.")
        for name, setting in self.settings.items():
            many = "+" if isinstance(setting.full, list) else None
            text = f"{setting.help} (default: {setting.full}; quick: {setting.quick})"
            parser.add_argument(f"--{name}", type=int, nargs=many, help=text)
        parser.add_argument("--only", default="", help="cases whose name has this in it")
        common_options(parser)
        self.run(**vars(parser.parse_args()))

    def _command(self, device: str, quick: bool, only: str, changed: dict[str, Any]) -> str:
        words = [f"python benchmarks/{self.name}.py --device {device}"] + ["--quick"] * quick
        for name, value in changed.items():
            words.append(f"--{name} " + " ".join(map(str, value if isinstance(value, list) else [value])))
        return " ".join([*words, *([f'--only "{only}"'] if only else []), "--write"])


def common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="a look in a minute or so, not a result")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/<name>_<device>.md")


def wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(action: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Seconds an action takes to be done on the device, and what it returns."""
    wait(device)
    started = time.perf_counter()
    result = action()
    wait(device)
    return time.perf_counter() - started, result


def spread(values: Sequence[float], form: str) -> str:
    """``min – max``."""
    return f"{min(values):{form}} – {max(values):{form}}"


def median_and_spread(values: Sequence[float], form: str) -> tuple[str, str]:
    return f"{statistics.median(values):{form}}", spread(values, form)
