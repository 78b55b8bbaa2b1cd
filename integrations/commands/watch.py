"""``redline watch``: look at a running job."""

from __future__ import annotations

import argparse


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Describe the command."""
    parser = commands.add_parser(
        "watch",
        help="a live view of a running job",
        description="Shows a running job as it goes: loss, r against the redline, what controllers did, the layers "
        "pushed hardest. Ctrl-C ends the view, never the job.",
    )
    parser.add_argument(
        "target", metavar="URL|FILE", help="where its metrics are served, such as 127.0.0.1:9108, or its record"
    )
    parser.add_argument("--interval", type=float, default=2.0, metavar="SECONDS", help="between looks (%(default)s)")
    parser.add_argument("--once", action="store_true", help="print one view and exit")
    return parser


def run(options: argparse.Namespace) -> int:
    """Watch."""
    from redline.integrations.watch.command import watch

    watch(options.target, interval=options.interval, once=options.once)
    return 0
