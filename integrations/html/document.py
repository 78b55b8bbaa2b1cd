"""The frame of a page: everything it needs lies in the one file, and it may load nothing else."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import redline.integrations.html

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def document(title: str, body: Sequence[str], data: Any) -> str:
    """A page.

    Args:
        title: as plain text.
        body: parts, as HTML.
        data: what the page's script draws from; numbers that are not finite become null.
    """
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{text(title)}</title>",
            f"<style>{_asset('uPlot.min.css')}\n{_asset('page.css')}</style>",
            "</head>",
            "<body><main>",
            *body,
            "</main>",
            f'<script type="application/json" id="data">{embedded(data)}</script>',
            f"<!--\nuPlot\n{_asset('uPlot.LICENSE')}\n-->",
            f"<script>{_asset('uPlot.iife.min.js')}</script>",
            *(f"<script>{_asset(name)}</script>" for name in ("charts.js", "heatmap.js", "page.js")),
            "</body>",
            "</html>",
            "",
        ]
    )


def text(content: object) -> str:
    """Escaped, to stand in HTML as text or in a quoted attribute."""
    return html.escape(str(content))


def embedded(data: Any) -> str:
    """JSON that no HTML can be read out of, whatever its strings say."""
    plain = json.dumps(_finite(data), separators=(",", ":"), allow_nan=False)
    return plain.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def table(headings: Sequence[str], rows: Sequence[Sequence[object]], *, words: int = 1) -> str:
    """A table; the first ``words`` columns hold words, the others figures."""

    def cell(kind: str, at: int, content: object) -> str:
        return f"<{kind}{'' if at < words else ' class=figure'}>{text(content)}</{kind}>"

    head = "".join(cell("th", at, heading) for at, heading in enumerate(headings))
    lines = ("<tr>" + "".join(cell("td", at, one) for at, one in enumerate(row)) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def section(title: str, *parts: str, note: str = "") -> str:
    """A part of the page under a heading."""
    said = f'<p class="note">{text(note)}</p>' if note else ""
    return f"<section><h2>{text(title)}</h2>{said}{''.join(parts)}</section>"


def figure(name: str, title: str, note: str = "", *, wide: bool = True) -> str:
    """Where the script draws the chart of that name."""
    said = f'<p class="note">{text(note)}</p>' if note else ""
    width = " class=wide" if wide else ""
    return f'<figure{width} data-chart="{text(name)}"><figcaption>{text(title)}{said}</figcaption></figure>'


def _asset(name: str) -> str:
    return (files(redline.integrations.html) / "assets" / name).read_text("utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, (list, tuple)) else value
