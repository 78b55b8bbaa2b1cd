"""Write docs/findings.md from the rules and their thresholds: ``python docs/render_findings.py``."""

import ast
import inspect
import re
from itertools import pairwise
from pathlib import Path

from redline.findings import RULES, thresholds

PAGE = Path(__file__).with_name("findings.md")


def render() -> str:
    """The page."""
    rules = [f"| `{rule.__name__}` | {_levels(rule)} | {inspect.getdoc(rule)} |" for rule in RULES]
    figures = [f"| `{name}` | {value} | {text} |" for name, value, text in _thresholds()]
    return "\n".join(
        [
            "# Findings",
            "",
            "A stability report begins with what was found: what was seen, why it matters, what to try. Each finding "
            "comes from one rule, a pure function of the report (`core/findings/`), and carries its name: "
            '`report.verdicts[0].rule`, `.level` ("good", "watch", "bad"), `.seen`, `.why`, `.advice`; `.text` is all '
            "three. The worst come first.",
            "",
            "A rule speaks of what was measured. Where nothing was measured it is silent, or says just that.",
            "",
            "## Rules",
            "",
            "| rule | level | found when |",
            "|---|---|---|",
            *rules,
            "",
            '"bad or watch": to watch where controllers scaled steps or where it was rare, bad otherwise.',
            "",
            "## The figures they go by",
            "",
            "In `core/findings/thresholds.py`.",
            "",
            "| figure | value | meaning and origin |",
            "|---|---|---|",
            *figures,
            "",
            "Written by `python docs/render_findings.py`.",
            "",
        ]
    )


def _levels(rule: object) -> str:
    """The levels that stand in a rule's source; those it hands on to a helper have both."""
    found = re.findall(r'"(good|watch|bad)"', inspect.getsource(rule))
    return " or ".join(dict.fromkeys(found)) or "bad or watch"


def _thresholds() -> list[tuple[str, object, str]]:
    """Name, value and the words below each constant."""
    body = ast.parse(Path(thresholds.__file__).read_text()).body
    return [
        (one.targets[0].id, getattr(thresholds, one.targets[0].id), " ".join(words.value.value.split()))
        for one, words in pairwise(body)
        if isinstance(one, ast.Assign) and isinstance(words, ast.Expr)
    ]


if __name__ == "__main__":
    PAGE.write_text(render())
