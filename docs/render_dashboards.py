"""Write the Grafana dashboard that the package carries: ``python docs/render_dashboards.py``.

It needs ``grafana-foundation-sdk``, which takes Python 3.11 or later and is for development alone: the package
carries the JSON.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dashboard_parts import (
    SOURCE,
    STEP_SIZES,
    bars,
    chosen,
    highest,
    layers,
    lines,
    number,
    of_runs,
    rows,
    steps,
    with_redline,
)
from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as model

from redline import metrics
from redline.metrics import Metric

ROOT = Path(__file__).resolve().parent.parent
DASHBOARD = ROOT / "integrations" / "dashboards" / "files" / "grafana" / "dashboards" / "redline.json"

_ONLY_IF_BAD = steps((None, "green"), (1e-9, "red"))


def _now(metric: Metric, **labels: str) -> str:
    return of_runs(chosen(metric.name, **labels))


def _a_second(metric: Metric) -> str:
    return of_runs(f"rate({chosen(metric.name)}[$__rate_interval])")


def _happened(metric: Metric) -> str:
    return of_runs(f"increase({chosen(metric.name)}[$__rate_interval])")


def overview() -> list[Any]:
    """One number a question, and which runs these are."""
    return [
        number(
            "r",
            f"max by (run) ({_now(metrics.NORMALIZED_STEP_SIZE)})",
            "Normalized step size of the step as the optimizer proposed it; 1 is the redline.",
            colors=STEP_SIZES,
        ),
        number("Loss", f"max by (run) ({_now(metrics.LOSS)})", "Of the last step."),
        number("Steps per second", f"max by (run) ({_a_second(metrics.STEPS)})", "Optimizer steps.", decimals=1),
        number(
            "Interventions",
            f"sum by (run) ({_now(metrics.INTERVENTIONS)})",
            "Steps that a controller changed, since the run began.",
            decimals=0,
            colors=steps((None, "green"), (1, "yellow")),
        ).no_value("none"),
        number(
            "Not finite",
            f"sum by (run) ({_now(metrics.NONFINITE)})",
            "Readings that were NaN or infinite, since the run began.",
            decimals=0,
            colors=_ONLY_IF_BAD,
        ),
        number(
            "Since the last step",
            f"max by (run) (time() - {_now(metrics.LAST_STEP_TIMESTAMP)})",
            "While the run is served; it is brought up to date as often as the exporter is.",
            unit="s",
            decimals=0,
            colors=steps((None, "green"), (60, "yellow"), (300, "red")),
        ),
        number(
            "Overhead",
            f"max by (run) ({_now(metrics.OVERHEAD_RATIO)})",
            "Time spent in Redline over time of training, controllers included.",
            unit="percentunit",
            decimals=1,
        ),
        number(
            "Alerts firing",
            'count(ALERTS{alertname=~"Redline.*", alertstate="firing", instance=~"$instance"}) or vector(0)',
            "Of the rules in prometheus/alerts.yml; 0 also where Prometheus has not loaded them.",
            decimals=0,
            colors=_ONLY_IF_BAD,
        ),
        rows(
            "Runs",
            f"last_over_time({chosen(metrics.RUN_INFO.name, run='$run')}[$__range])",
            "What was served in the time shown.",
            width=24,
            hidden=("Time", "Value", "__name__"),
        ),
    ]


def step_size() -> list[Any]:
    """R over time, and what it is made of."""
    return [
        with_redline(
            lines(
                "r: length of the step over the radius",
                [
                    (_now(metrics.NORMALIZED_STEP_SIZE), "{{run}} proposed"),
                    (_now(metrics.COMMITTED_STEP_SIZE), "{{run}} committed"),
                    (_now(metrics.EXACT_STEP_SIZE), "{{run}} proposed, exact radius"),
                    (_now(metrics.BINDING_STEP_SIZE, radius="attention|activation"), "{{run}} {{radius}}"),
                ],
                "The redline is at 1: beyond it the Taylor series of the loss along this very step does not converge. "
                "The exact radius needs GhostRadius(exact=True), attention and activations need LayerRadii().",
                width=16,
                log=True,
            )
        ),
        lines(
            "Step length and radius",
            [
                (_now(metrics.UPDATE_NORM), "{{run}} step τ"),
                (_now(metrics.GHOST_RADIUS), "{{run}} radius ρ"),
                (_now(metrics.EXACT_GHOST_RADIUS), "{{run}} exact radius ρ*"),
            ],
            "r is the one over the other: did the step grow, or the radius shrink?",
            width=8,
            log=True,
        ).height(11),
    ]


def layer_maps() -> list[Any]:
    """Layers as heat maps, and the outliers as lines."""
    return [
        layers(
            "σ₁(ΔW)/σ₁(W): how hard each layer is pushed",
            metrics.UPDATE_TO_WEIGHT_RATIO.name,
            "Spectral norm of the update over that of the weights. Of more than forty layers, those highest in the "
            "time shown; of several runs, the highest value. What the exporter folded is a row a kind of layer.",
        ),
        layers(
            "σ₁(W): how strong each layer is",
            metrics.WEIGHT_SPECTRAL_NORM.name,
            "Top singular value of each weight matrix. Of more than forty layers, those highest in the time shown; of "
            "several runs, the highest value. What the exporter folded is a row a kind of layer.",
        ),
        lines(
            "σ₁(W) of the ten strongest layers",
            [(highest(metrics.WEIGHT_SPECTRAL_NORM.name, 10), "{{layer}}")],
            "A line that bends upwards while the others do not is the layer to look at.",
            width=12,
        ),
        lines(
            "Stable rank of the ten lowest layers",
            [(highest(metrics.WEIGHT_STABLE_RANK.name, 10, lowest=True), "{{layer}}")],
            "‖W‖²_F/σ₁(W)²: towards 1, a single direction carries the layer.",
            width=12,
        ),
    ]


def interventions() -> list[Any]:
    """What the controllers did."""
    return [
        bars(
            "Steps that a controller changed",
            [
                (
                    "sum by (run, controller, action) "
                    f"({_happened(metrics.INTERVENTIONS)}) > 0",
                    "{{run}} {{controller}}: {{action}}",
                )
            ],
            "Empty while no controller had to.",
            width=16,
        ),
        lines(
            "Scale of the step",
            [(_now(metrics.STEP_SCALE), "{{run}}")],
            "What the controllers left of the whole step; 1 is untouched. Empty without controllers.",
            width=8,
            log=True,
        ),
    ]  # fmt: skip


def health() -> list[Any]:
    """What each step was made of."""
    return [
        lines("Loss", [(_now(metrics.LOSS), "{{run}}")], "Of the steps that were served.", width=8),
        lines(
            "Gradient norm",
            [(_now(metrics.GRADIENT_NORM), "{{run}}")],
            "As the optimizer was given it.",
            width=8,
            log=True,
        ),
        bars(
            "Readings that were not finite",
            [(_happened(metrics.NONFINITE), "{{run}} {{source}}")],
            "NaN or infinite, by where.",
            width=8,
        ),
        lines(
            "Learning rate",
            [(_now(metrics.LEARNING_RATE), "{{run}} {{optimizer}} {{group}}")],
            "Of each parameter group.",
            width=8,
        ),
        lines(
            "Weight decay",
            [(_now(metrics.WEIGHT_DECAY), "{{run}} {{optimizer}} {{group}}")],
            "Of each parameter group.",
            width=8,
        ),
        lines("Steps per second", [(_a_second(metrics.STEPS), "{{run}}")], "Optimizer steps.", width=8),
    ]


def overhead() -> list[Any]:
    """What the watching costs."""
    return [
        lines(
            "Share of training time",
            [
                (_now(metrics.OVERHEAD_RATIO), "{{run}} all of Redline"),
                (_now(metrics.MONITORING_RATIO), "{{run}} monitoring"),
                (_now(metrics.OVERHEAD_BUDGET_RATIO), "{{run}} budget of monitoring"),
            ],
            "From the start of the run on. The budget is there where the run was given one: overhead_budget=.",
            width=8,
            unit="percentunit",
        ),
        lines(
            "Measurements per second",
            [
                (_a_second(metrics.MEASUREMENTS), "{{run}} {{monitor}}"),
                (_a_second(metrics.PUT_OFF), "{{run}} {{monitor}}, put off"),
            ],
            "What was due and was put off, to keep to the budget, is made up for later.",
            width=8,
        ),
        lines(
            "Scrapes",
            [
                (of_runs(chosen("scrape_duration_seconds")), "{{run}} seconds"),
                (of_runs(chosen("scrape_samples_scraped")), "{{run}} series"),
            ],
            "How long Prometheus waits for the run's metrics, and how many there are.",
            width=8,
            log=True,
        ),
    ]


ROWS = {
    "Overview": overview,
    "The redline": step_size,
    "Layers": layer_maps,
    "Interventions": interventions,
    "Health": health,
    "Overhead": overhead,
}


def build() -> model.Dashboard:
    """The dashboard: rows of panels, and what is chosen above them."""
    board = (
        dashboard.Dashboard("Redline")
        .description("The rev counter of training: how long are the steps, against what the loss can follow?")
        .tags(["redline", "training"])
        .timezone("browser")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .time("now-30m", "now")
        .refresh("10s")
        .editable()
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(_choice("run", f"label_values({metrics.RUN_INFO.name}, run)"))
        .with_variable(_choice("instance", f'label_values({metrics.RUN_INFO.name}{{run=~"$run"}}, instance)'))
    )
    for title, panels in ROWS.items():
        board = board.with_row(dashboard.Row(title))
        for panel in panels():
            board = board.with_panel(panel)
    built = board.build()
    for k, panel in enumerate(built.panels, start=1):
        panel.id_val = k
    return built


def _choice(name: str, query: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(name.capitalize())
        .datasource(SOURCE)
        .query(query)
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .current(model.VariableOption(text=["All"], value=["$__all"]))
    )


def render() -> str:
    """The JSON."""
    return json.dumps(build(), cls=JSONEncoder, indent=2, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    DASHBOARD.write_text(render())
