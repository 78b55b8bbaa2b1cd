"""What Grafana would ask of Prometheus for the dashboard that the package carries."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

FILES = Path(__file__).resolve().parents[2] / "integrations" / "dashboards" / "files"
DASHBOARD: dict[str, Any] = json.loads((FILES / "grafana" / "dashboards" / "redline.json").read_text())


class PanelQuery(NamedTuple):
    """One query of one panel."""

    panel: str
    expression: str
    instant: bool

    def __str__(self) -> str:
        return f"{self.panel}: {self.expression}"


def panels() -> Iterator[dict[str, Any]]:
    """All panels, those of collapsed rows too."""
    for panel in DASHBOARD["panels"]:
        yield panel
        yield from panel.get("panels", [])


def panel_queries() -> list[PanelQuery]:
    return [
        PanelQuery(panel["title"], target["expr"], bool(target.get("instant")))
        for panel in panels()
        for target in panel.get("targets", [])
    ]


def variables() -> dict[str, dict[str, Any]]:
    return {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}


def interpolated(
    expression: str, chosen: Mapping[str, Sequence[str]], *, scrape: float, step: float, span: float
) -> str:
    """An expression with Grafana's variables filled in.

    Several values of a variable become a group of alternatives, each with its special characters escaped, once for the
    regular expression and once for the string it stands in; ``$__rate_interval`` is four scrapes, or one and a step.

    Args:
        expression: as the dashboard has it.
        chosen: the values that each variable of the dashboard has.
        scrape: the data source's ``timeInterval``, in seconds.
        step: between two points of the panel, in seconds.
        span: of the time shown, in seconds.
    """
    filled = {
        "__rate_interval": f"{round(1000 * max(step + scrape, 4 * scrape))}ms",
        "__range": f"{round(span)}s",
        **{name: _alternatives(values) for name, values in chosen.items()},
    }
    text = re.sub(r"\$(\w+)", lambda found: filled[found[1]], expression)
    assert "$" not in text
    return text


def _alternatives(values: Sequence[str]) -> str:
    escaped = [re.sub(r"[.*+?^${}()|\[\]\\]", r"\\\\\g<0>", value) for value in values]
    return escaped[0] if len(escaped) == 1 else f"({'|'.join(escaped)})"
