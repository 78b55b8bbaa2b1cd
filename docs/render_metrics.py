"""Write docs/metrics.md from the one definition of the metrics: ``python docs/render_metrics.py``."""

from pathlib import Path

from redline.integrations.series_budget import DEFAULT_MAX_SERIES
from redline.metrics import METRICS

PAGE = Path(__file__).with_name("metrics.md")

OVER_MANY_SERIES = f"""## Over many series

`PrometheusExporter` and `TextfileSink` give at most `max_series` series a process, {DEFAULT_MAX_SERIES:,} unless told
otherwise. Only what has the label `layer` is ever folded; counters and all the rest are always whole, however many
parameter groups there are. While all fits, `redline_folded_layers` is 0.

Beyond that, layers are ranked, worst first: those with a value that is not finite, then by
`redline_update_to_weight_ratio`, then by `redline_weight_spectral_condition`, then by their own step size. As many as
there is room for keep all their series. A layer that has them counts twice its figure in the next ranking: another
takes its place only when it is more than twice as bad, so that series do not come and go from one scrape to the next.

Every other layer is in `redline_folded_max` and `redline_folded_median` instead, under the metric's full name and the
layer's kind: its name with indices taken out, such as `blocks.*.attention.qkv.weight`, or as many last parts of that
as leave half of the room to single layers. No layer is in both places, so that a query by `layer` counts nothing
twice. The worst of all layers, named or folded:

```promql
max(redline_update_to_weight_ratio or redline_folded_max{{metric="redline_update_to_weight_ratio"}})
```
"""


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
            OVER_MANY_SERIES,
            "Written by `python docs/render_metrics.py`.",
            "",
        ]
    )


if __name__ == "__main__":
    PAGE.write_text(render())
