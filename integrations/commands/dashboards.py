"""``redline dashboards``: a Grafana dashboard, Prometheus rules and alerts, and what starts both."""

from __future__ import annotations

import argparse
from pathlib import Path

from redline.integrations.dashboards import DEFAULT_TARGET, export


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Describe the command."""
    parser = commands.add_parser("dashboards", help="write a Grafana dashboard, Prometheus rules and alerts")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    exporting = actions.add_parser(
        "export",
        help="write them to a folder",
        description="Writes a Grafana dashboard and its provisioning, Prometheus' configuration, recording rules and "
        "alerts, and a compose file that starts both servers. What is there already is not overwritten.",
    )
    exporting.add_argument("folder", type=Path, metavar="DIR", help="where to; made if it is not there")
    exporting.add_argument(
        "--target",
        action="append",
        metavar="HOST:PORT",
        help=f"what Prometheus is to scrape; may be given several times ({DEFAULT_TARGET})",
    )
    return parser


def run(options: argparse.Namespace) -> int:
    """Write the files, and say what to do with them."""
    for path in export(options.folder, options.target or (DEFAULT_TARGET,)):
        print(options.folder / path)
    print(f"\nStart both servers: docker compose -f {options.folder / 'compose.yaml'} up -d")
    print("Then open http://127.0.0.1:3000 and choose the dashboard Redline.")
    return 0
