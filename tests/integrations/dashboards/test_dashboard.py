"""The dashboard: what is committed is what the generator writes, and it holds together without a server."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from grafana_queries import DASHBOARD, PanelQuery, interpolated, panel_queries, panels, variables

from redline.metrics import METRICS

DOCS = Path(__file__).resolve().parents[3] / "docs"
OF_PROMETHEUS = {"ALERTS", "scrape_duration_seconds", "scrape_samples_scraped"}
FUNCTIONS = {
    "rate", "increase", "max", "min", "sum", "count", "by", "on", "and", "or", "group_left", "time", "vector", "topk",
    "bottomk", "max_over_time", "min_over_time", "last_over_time", "end",
}  # fmt: skip

of_every_query = pytest.mark.parametrize("query", panel_queries(), ids=str)
of_every_panel = pytest.mark.parametrize(
    "panel", [one for one in panels() if one["type"] != "row"], ids=lambda panel: panel["title"]
)


@pytest.fixture(scope="module")
def generator() -> Iterator[ModuleType]:
    """docs/render_dashboards.py."""
    if sys.version_info < (3, 11):
        pytest.skip("grafana-foundation-sdk takes Python 3.11 or later")
    path = DOCS / "render_dashboards.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(DOCS))
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(DOCS))


def test_what_is_committed_is_what_the_generator_writes(generator: ModuleType):
    assert generator.DASHBOARD.read_text() == generator.render(), "run: python docs/render_dashboards.py"


def test_grafanas_own_types_read_it_back(generator: ModuleType):
    """What the SDK does not know, such as a misspelt option, would be lost on the way."""
    read = generator.model.Dashboard.from_json(copy.deepcopy(DASHBOARD))
    assert json.loads(json.dumps(read, cls=generator.JSONEncoder)) == DASHBOARD


def test_the_rows_are_those_that_were_asked_for():
    rows = [panel["title"] for panel in panels() if panel["type"] == "row"]
    assert rows == ["Overview", "The redline", "Layers", "Interventions", "Health", "Overhead"]


@of_every_panel
def test_a_panel_asks_the_data_source_that_is_chosen(panel: dict[str, Any]):
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    assert panel["datasource"] == chosen
    assert panel["targets"]
    assert all(target["datasource"] == chosen for target in panel["targets"])


@of_every_panel
def test_a_panel_says_what_it_shows(panel: dict[str, Any]):
    assert panel["title"]
    assert panel["description"].endswith((".", "?"))


@of_every_panel
def test_queries_of_a_panel_can_be_told_apart(panel: dict[str, Any]):
    names = [target["refId"] for target in panel["targets"]]
    assert len(set(names)) == len(names)


def test_nothing_of_somebodys_installation_is_in_it():
    assert not {"id", "uid", "version", "__inputs"} & DASHBOARD.keys()
    uids = re.findall(r"'uid': '([^']*)'", str(DASHBOARD))
    assert set(uids) == {"${datasource}"}
    for variable in variables().values():
        assert variable.get("current", {}).get("value") in (None, ["$__all"])


def test_panels_are_numbered_and_do_not_overlap():
    placed = list(panels())
    ids = [panel["id"] for panel in placed]
    assert len(set(ids)) == len(ids)
    assert min(ids) > 0
    taken: set[tuple[int, int]] = set()
    for panel in placed:
        at = panel["gridPos"]
        cells = set(
            itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"]))
        )  # fmt: skip
        assert cells, panel["title"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells


@of_every_query
def test_a_query_asks_for_metrics_that_there_are(query: PanelQuery):
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\b(on|by|group_left) \([^)]*\)", " ", query.expression)
    names = set(re.findall(r"[A-Za-z_][A-Za-z0-9_]*", bare)) - FUNCTIONS
    assert names
    assert names <= METRICS.keys() | OF_PROMETHEUS


@of_every_query
def test_labels_that_a_query_matches_and_shows_are_labels_of_its_metric(query: PanelQuery):
    known = {"instance", "job", "run", "alertname", "alertstate"}
    known |= {label for name, metric in METRICS.items() if name in query.expression for label in metric.labels}
    targets = [
        target for panel in panels() for target in panel.get("targets", []) if target["expr"] == query.expression
    ]
    shown = {label for target in targets for label in re.findall(r"\{\{(\w+)\}\}", target.get("legendFormat", ""))}
    matched = set(re.findall(r"(\w+)=~?\"", query.expression))
    assert shown | matched <= known


@of_every_query
def test_a_query_is_of_the_instances_that_are_chosen(query: PanelQuery):
    for selector in re.findall(r"\{([^}]*)\}", query.expression):
        assert 'instance=~"$instance"' in selector or selector == 'run=~"$run"'
    assert set(re.findall(r"\$(\w+)", query.expression)) <= {"__rate_interval", "__range", *variables()}


def test_what_is_chosen_is_found_by_what_runs():
    assert variables()["datasource"]["type"] == "datasource"
    assert variables()["datasource"]["query"] == "prometheus"
    for name in ("run", "instance"):
        assert variables()[name]["query"].startswith("label_values(redline_run_info")
        assert variables()[name]["includeAll"]


def test_the_redline_is_drawn_at_1():
    (panel,) = [one for one in panels() if "redline_committed_step_size" in str(one.get("targets"))]
    defaults = panel["fieldConfig"]["defaults"]
    assert defaults["thresholds"]["steps"][-1] == {"value": 1, "color": "red"}
    assert defaults["custom"]["thresholdsStyle"]["mode"] == "line+area"


def test_layers_are_a_heat_map_of_rows_not_of_counts():
    maps = [one for one in panels() if one["type"] == "heatmap"]
    assert len(maps) == 2
    for panel in maps:
        assert panel["options"]["calculate"] is False
        single, rest = panel["targets"]
        assert single["legendFormat"] == "{{layer}}"
        assert "redline_folded_max" in rest["expr"]
        assert rest["legendFormat"].startswith("{{kind}}")


def test_variables_are_filled_in_as_grafana_does():
    asked = 'rate(x{instance=~"$instance", run=~"$run"}[$__rate_interval]) + y{}[$__range]'
    filled = interpolated(
        asked, {"instance": ["127.0.0.1:1", "[::1]:2"], "run": ["a(b)"]}, scrape=5, step=15, span=1800
    )
    assert filled == (
        r'rate(x{instance=~"(127\\.0\\.0\\.1:1|\\[::1\\]:2)", run=~"a\\(b\\)"}[20000ms]) + y{}[1800s]'
    )  # fmt: skip
