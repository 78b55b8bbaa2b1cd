"""The command line: ``redline``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import redline
from redline.integrations.commands import COMMANDS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, or 2 where it cannot do what is asked, which it says on stderr."""
    parser = argparse.ArgumentParser(prog="redline", description="The rev counter and rev limiter of training.")
    parser.add_argument("--version", action="version", version=f"redline {redline.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands).set_defaults(run=command.run)
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except redline.ConfigurationError as error:
        parser.error(str(error))
