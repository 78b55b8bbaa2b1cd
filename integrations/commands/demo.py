"""``redline demo``: train two small models and watch them."""

from __future__ import annotations

import argparse
from pathlib import Path

from redline.errors import ConfigurationError


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Describe the command."""
    parser = commands.add_parser(
        "demo",
        help="train two small models and watch them",
        description="Trains a small transformer on handwritten digits, then a byte-level language model on Python's "
        "own standard library, with Redline attached and its metrics served. Takes about a minute on two cores.",
    )
    parser.add_argument(
        "--port", type=int, default=9108, help="of the metrics, on 127.0.0.1; 0 picks a free one (%(default)s)"
    )
    parser.add_argument("--short", action="store_true", help="a few steps of each model only")
    parser.add_argument("--picture", type=Path, metavar="FILE.svg", help="also write the last report as a picture")
    return parser


def run(options: argparse.Namespace) -> int:
    """Train, and show what was measured."""
    try:
        from redline.integrations.demo.command import run_demo
    except ImportError as error:
        raise ConfigurationError(
            f"the demo needs {error.name}, which is not installed; run: pip install 'redline[demo]'"
        ) from error
    run_demo(port=options.port, short=options.short, picture=options.picture)
    return 0
