"""Write docs/evidence.md from the studies' results: ``python docs/render_evidence.py``."""

import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
PAGE = DOCS / "evidence.md"
STUDIES = (
    "phase_transition",
    "random_directions",
    "temperature",
    "spike_grid",
    "held_spike",
    "healthy_runs",
    "which_binds",
    "conservatism",
    "steady_spectra",
)
"""In the order of the page."""


def render() -> str:
    """The page."""
    pages = {name: json.loads((DOCS / "evidence" / f"{name}.json").read_text()) for name in STUDIES}
    claims = [(name, claim) for name, page in pages.items() for claim in page["claims"]]
    verdicts = {"holds": "hold", "holds in part": "hold in part", "does not hold here": "do not hold here"}
    counts = ", ".join(
        f"{sum(one['verdict'] == one_of for _, one in claims)} {they}" for one_of, they in verdicts.items()
    )
    return "\n".join(
        [
            "# Evidence: what was published, measured again",
            "",
            f"{len(claims)} claims: {counts}. Each verdict is computed from the figures by thresholds that stand in "
            "the study's script, and what the paper leaves open of a protocol in its docstring. Every run is in the "
            "JSON file beside the picture.",
            "",
            "| claim | published | here | verdict |",
            "|---|---|---|---|",
            *(
                _row(f"{one['claim']} ([{name}](#{name}))", one["published"], one["measured"], one["verdict"])
                for name, one in claims
            ),
            "",
            "Two more comparisons stand elsewhere: training [without a learning rate]"
            "(controlling.md#layers-decay-and-the-rate) (table 3; does not beat the best of a sweep here), and "
            "[tuning narrow, training wide](width_transfer.md).",
            *(line for name, page in pages.items() for line in _study(name, page)),
            "",
            "Written by `python docs/render_evidence.py`.",
            "",
        ]
    )


def _study(name: str, page: dict[str, Any]) -> list[str]:
    table, runs = page["table"], len(page["results"])
    return [
        "",
        f"## {name}",
        "",
        f"{page['title']} {page['source']}",
        "",
        f"`{page['command']}`: {runs} runs, {page['minutes']:g} minutes; {page['machine']}; {page['date']}.",
        "",
        f"![{page['title']}](evidence/{name}.png)",
        "",
        f"{table['title']}:",
        "",
        _row(*table["columns"]),
        "|---" * len(table["columns"]) + "|",
        *(_row(*row) for row in table["rows"]),
    ]


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(render())
