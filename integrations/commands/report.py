"""``redline report``: what the record of a run comes to."""

from __future__ import annotations

import argparse
from pathlib import Path

import rich
from rich.text import Text

from redline.errors import ConfigurationError


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Describe the command."""
    parser = commands.add_parser(
        "report",
        help="print the stability report of a recorded run, or draw it",
        description="Prints the stability report of a run from the record that redline.JsonlRecorder wrote, during the "
        "run or after it, whether it ended in order or was killed.",
    )
    parser.add_argument("record", type=Path, metavar="RUN.jsonl", help="the record's first file; the others are found")
    parser.add_argument("--html", type=Path, metavar="FILE.html", help="also draw it, as one page that opens offline")
    return parser


def run(options: argparse.Namespace) -> int:
    """Read, print, and draw."""
    from redline.integrations.html import report_page
    from redline.integrations.record import read

    record = read(options.record)
    rich.print(record.report())
    for note in record.notes:
        rich.print(Text(note, style="yellow"))
    if options.html:
        write_page(options.html, report_page(record))
    return 0


def write_page(path: Path, page: str) -> None:
    """Write a page, and say where it is.

    Raises:
        ConfigurationError: it cannot be written there.
    """
    try:
        path.write_text(page, "utf-8")
    except OSError as error:
        raise ConfigurationError(f"got --html {path}, which cannot be written: {error.strerror or error}.") from error
    rich.print(Text(f"Drawn: {path}"))
