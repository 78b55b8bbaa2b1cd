"""The command line: ``redline``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import redline


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="redline", description="The rev counter and rev limiter of training.")
    parser.add_argument("--version", action="version", version=f"redline {redline.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="train two small models and watch them",
        description="Trains a small transformer on handwritten digits, then a byte-level language model on Python's "
        "own standard library, with Redline attached and its metrics served. Takes about a minute on two cores.",
    )
    demo.add_argument(
        "--port", type=int, default=9108, help="of the metrics, on 127.0.0.1; 0 picks a free one (%(default)s)"
    )
    demo.add_argument("--short", action="store_true", help="a few steps of each model only")
    demo.add_argument("--picture", type=Path, metavar="FILE.svg", help="also write the last report as a picture")

    options = parser.parse_args(arguments)
    try:
        from redline.integrations.demo.command import run_demo
    except ImportError as error:
        parser.error(f"the demo needs {error.name}, which is not installed; run: pip install 'redline[demo]'")
    try:
        run_demo(port=options.port, short=options.short, picture=options.picture)
    except redline.ConfigurationError as error:
        parser.error(str(error))
    return 0
