"""Write docs/metrics.md from the one definition of the metrics: ``python docs/render_metrics.py``."""

from pathlib import Path

from redline.metrics import METRICS

PAGE = Path(__file__).with_name("metrics.md")


def render() -> str:
    """The page."""
    rows = [
        f"| `{metric.name}` | {metric.kind} | {', '.join(metric.labels) or '–'} | {metric.help} |"
        for metric in METRICS.values()
    ]
    return "\n".join(
        [
            "# Metrics",
            "",
            "One definition each, in `core/metrics.py`; the console, Prometheus, the trainers' loggers and this page "
            "read it. What was not measured is absent; NaN is a measurement. `layer` is a parameter's qualified name, "
            "`name[e]` for matrix `e` of a stack; of attention and activations, that of the module that calls them.",
            "",
            "| name | kind | labels | meaning |",
            "|---|---|---|---|",
            *rows,
            "",
            "Written by `python docs/render_metrics.py`.",
            "",
        ]
    )


if __name__ == "__main__":
    PAGE.write_text(render())
