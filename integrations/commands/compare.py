"""``redline compare``: two recorded runs side by side."""

from __future__ import annotations

import argparse
from pathlib import Path

import rich
from rich.text import Text

from redline.integrations.commands.report import write_page


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Describe the command."""
    parser = commands.add_parser(
        "compare",
        help="two recorded runs side by side",
        description="Prints the key figures of two records side by side, and their layers, matched by name or by order "
        "of kind: before and after a change, or a narrow and a wide model.",
    )
    for name, what in (("a", "the first"), ("b", "the second")):
        parser.add_argument(name, type=Path, metavar=f"{name.upper()}.jsonl", help=f"{what} record's first file")
    parser.add_argument("--html", type=Path, metavar="FILE.html", help="also draw them, as one page that opens offline")
    return parser


def run(options: argparse.Namespace) -> int:
    """Read both, print, and draw."""
    from redline.integrations.html import compare_page
    from redline.integrations.record import read
    from redline.integrations.record.comparison import Comparison

    comparison = Comparison.of(read(options.a), read(options.b))
    rich.print(comparison)
    for which, record in (("A", comparison.first), ("B", comparison.second)):
        for note in record.notes:
            rich.print(Text(f"{which}: {note}", style="yellow"))
    if options.html:
        write_page(options.html, compare_page(comparison))
    return 0
