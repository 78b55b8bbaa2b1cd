"""What the panels of the dashboard are put together from; see render_dashboards.py."""

from __future__ import annotations

from typing import Any, TypeAlias

from grafana_foundation_sdk.builders import common as draw
from grafana_foundation_sdk.builders import dashboard, heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models import heatmap as heatmap_model
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")
RUNS = '* on (job, instance) group_left (run) redline_run_info{run=~"$run"}'
SHORT, MIDDLE, TALL = 4, 8, 11  # heights, in Grafana's rows of 30 pixels

Query: TypeAlias = "tuple[str, str]"
"""An expression, and what its series are called."""


def chosen(metric: str, /, **labels: str) -> str:
    """The metric's series of the instances that are chosen above the dashboard; labels are matched by regex."""
    matchers = {"instance": "$instance", **labels}
    return metric + "{" + ", ".join(f'{name}=~"{value}"' for name, value in matchers.items()) + "}"


def of_runs(expression: str) -> str:
    """An expression of the chosen instances, with the name of the run; only of the chosen runs."""
    return f"{expression} {RUNS}"


def highest(metric: str, count: int, *, lowest: bool = False) -> str:
    """One value a layer, of the layers that were highest (or lowest) over the whole time shown.

    They stay the same from the left of the panel to its right: a plain ``topk`` would choose anew at each point.
    """
    k, over = ("bottomk", "min") if lowest else ("topk", "max")
    series = of_runs(chosen(metric))
    ranked = f"{over}_over_time({chosen(metric)}[$__range] @ end())"
    return (
        f"{over} by (layer) ({series})\nand on (layer)\n"
        f"{k}({count}, {over} by (layer) ({of_runs(ranked)}))"
    )  # fmt: skip


def folded(metric: str) -> str:
    """One value a kind of layer: the highest of those that the exporter folded, to keep to its budget of series."""
    return f"max by (kind) ({of_runs(chosen('redline_folded_max', metric=metric))})"


def steps(*limits: tuple[float | None, str]) -> dashboard.ThresholdsConfig:
    """Colours by value: each from its limit up, the first from None."""
    return (
        dashboard.ThresholdsConfig()
        .mode(model.ThresholdsMode.ABSOLUTE)
        .steps([model.Threshold(value=value, color=color) for value, color in limits])
    )


STEP_SIZES = steps((None, "green"), (0.5, "yellow"), (1, "red"))
"""Of r, as the console and the report colour it."""


def number(title: str, query: str, about: str, *, unit: str = "short", colors: Any = None, decimals: int = 3) -> Any:
    """A single number with its course behind it; the last there was, so that it still stands after the run."""
    panel = (
        stat.Panel()
        .title(title)
        .description(about)
        .span(3)
        .height(SHORT)
        .unit(unit)
        .decimals(decimals)
        .datasource(SOURCE)
        .graph_mode(common.BigValueGraphMode.AREA)
        .color_mode(common.BigValueColorMode.VALUE)
        .reduce_options(draw.ReduceDataOptions().calcs(["lastNotNull"]))
        .thresholds(colors or steps((None, "text")))
    )
    return _with_queries(panel, [(query, "{{run}}")])


def lines(title: str, queries: list[Query], about: str, *, width: int, unit: str = "short", log: bool = False) -> Any:
    """Curves over time."""
    scale = draw.ScaleDistributionConfig().type(
        common.ScaleDistribution.LOG if log else common.ScaleDistribution.LINEAR
    )
    if log:
        scale = scale.log(10)
    panel = (
        timeseries.Panel()
        .title(title)
        .description(about)
        .span(width)
        .height(MIDDLE)
        .unit(unit)
        .datasource(SOURCE)
        .line_width(1.5)
        .fill_opacity(0)
        .show_points(common.VisibilityMode.AUTO)
        .scale_distribution(scale)
        .tooltip(draw.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI).sort(common.SortOrder.DESCENDING))
        .legend(
            draw.VizLegendOptions()
            .display_mode(common.LegendDisplayMode.LIST)
            .placement(common.LegendPlacement.BOTTOM)
            .show_legend(True)
        )
    )
    return _with_queries(panel, queries)


def with_redline(panel: Any) -> Any:
    """The same panel with the redline drawn: a red line at 1, and red above it."""
    return (
        panel.height(TALL)
        .axis_soft_max(1.2)
        .thresholds(steps((None, "transparent"), (1, "red")))
        .thresholds_style(draw.GraphThresholdsStyleConfig().mode(common.GraphThresholdsStyleMode.LINE_AND_AREA))
    )


def bars(title: str, queries: list[Query], about: str, *, width: int, unit: str = "short") -> Any:
    """What happened between one point and the next, stacked."""
    return (
        lines(title, queries, about, width=width, unit=unit)
        .draw_style(common.GraphDrawStyle.BARS)
        .fill_opacity(80)
        .stacking(draw.StackingConfig().mode(common.StackingMode.NORMAL))
    )


def layers(title: str, metric: str, about: str) -> Any:
    """A heat map: a row a layer, a column a moment; of very many, the forty that were highest."""
    panel = (
        heatmap.Panel()
        .title(title)
        .description(about)
        .span(12)
        .height(TALL)
        .max_data_points(120)
        .datasource(SOURCE)
        .calculate(False)
        .rows_frame(heatmap.RowsHeatmapOptions().layout(common.HeatmapCellLayout.UNKNOWN))
        .color(
            heatmap.HeatmapColorOptions()
            .mode(heatmap_model.HeatmapColorMode.SCHEME)
            .scheme("Turbo")
            .scale(heatmap_model.HeatmapColorScale.EXPONENTIAL)
            .exponent(0.5)
            .steps(64)
        )
        .cell_gap(1)
        .cell_values(heatmap.CellValues().unit("short").decimals(4))
        .y_axis(heatmap.YAxisConfig().axis_placement(common.AxisPlacement.LEFT))
        .mode(common.TooltipDisplayMode.SINGLE)
        .show_color_scale(True)
        .show_legend()
    )
    return _with_queries(
        panel, [(highest(metric, 40), "{{layer}}"), (folded(metric), "{{kind}} (highest of the rest)")]
    )


def rows(title: str, query: str, about: str, *, width: int, hidden: tuple[str, ...]) -> Any:
    """A table with a row a series, of its labels; some of them hidden."""
    panel = table.Panel().title(title).description(about).span(width).height(5).datasource(SOURCE)
    for name in hidden:
        panel = panel.override_by_name(name, [model.DynamicConfigValue(id_val="custom.hidden", value=True)])
    target = prometheus.Dataquery().ref_id("A").expr(query).instant().format(PromQueryFormat.TABLE).datasource(SOURCE)
    return panel.with_target(target)


def _with_queries(panel: Any, queries: list[Query]) -> Any:
    for k, (expression, legend) in enumerate(queries):
        query = prometheus.Dataquery().ref_id(chr(ord("A") + k)).expr(expression).legend_format(legend)
        panel = panel.with_target(query.range().datasource(SOURCE))
    return panel
