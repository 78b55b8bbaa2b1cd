"""The real Prometheus scrapes a real training run: every expression of the dashboard and of the rules has data.

It runs at sixty times the speed: a minute of the rules' windows and waits is a second here, and so on.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from grafana_queries import FILES, PanelQuery, interpolated, panel_queries, variables
from prometheus_client.parser import text_string_to_metric_families
from prometheus_server import PrometheusServer, eventually, free_port, program, promtool

from redline.integrations.dashboards import export

SCRAPE = 0.25  # seconds
TRAINING = 18.0  # seconds: more than ten minutes at sixty times the speed, and five to wait
RUN = "proof (of it)"
RUNNER = Path(__file__).resolve().parents[2] / "shared" / "served_run.py"


class Proof(NamedTuple):
    """A run that has stopped stepping and is served still, and the server that scraped it."""

    server: PrometheusServer
    target: str
    start: float
    end: float

    def ask(self, expression: str) -> list[dict[str, Any]]:
        """What a panel would show of the run: series over time."""
        return self.server.query_range(self.filled_in(expression), self.start, self.end, SCRAPE)

    def filled_in(self, expression: str) -> str:
        chosen = {"instance": [self.target], "run": [RUN]}
        return interpolated(expression, chosen, scrape=SCRAPE, step=SCRAPE, span=self.end - self.start)


def rules(name: str) -> list[dict[str, Any]]:
    text = (FILES / "prometheus" / name).read_text()
    return [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]


RECORDING, ALERTS = rules("recording.yml"), rules("alerts.yml")


def sped_up(folder: Path) -> None:
    """Minutes become seconds, and scrapes as frequent as they can be."""
    for name in ("recording.yml", "alerts.yml"):
        path = folder / name
        path.write_text(re.sub(r"(?<=\[|\s)(\d+)m(?=\]|\)|\n)", r"\1s", path.read_text()))
    path = folder / "prometheus.yml"
    path.write_text(re.sub(r"(_interval:) 5s", rf"\1 {round(1000 * SCRAPE)}ms", path.read_text()))


@pytest.fixture(scope="module")
def proof(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proof]:
    program("prometheus")
    where, port = tmp_path_factory.mktemp("proof"), free_port()
    target = f"127.0.0.1:{port}"
    export(where, [target])
    sped_up(where / "prometheus")
    server = PrometheusServer(where / "prometheus" / "prometheus.yml", where / "data")
    run = subprocess.Popen(
        [sys.executable, RUNNER, str(port), RUN, str(TRAINING)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        eventually(lambda: server.query("redline_normalized_step_size"), "the run is scraped")
        start = time.time()
        assert int(run.stdout.readline()) > 100, "the run took too few steps to show anything"
        yield Proof(server, target, start, time.time())
    finally:
        server.stop()
        run.communicate("", timeout=60)


# Every expression ----------------------------------------------------------------------------------------------------


def finite(series: dict[str, Any]) -> int:
    return sum(math.isfinite(float(value)) for _, value in series["values"])


@pytest.mark.parametrize("query", panel_queries(), ids=str)
def test_a_panel_has_data(proof: Proof, query: PanelQuery):
    if query.instant:
        found = proof.server.query(proof.filled_in(query.expression), proof.end)
        assert found
        assert all(series["metric"]["run"] == RUN for series in found)
        return
    found = proof.ask(query.expression)
    assert sum(map(finite, found)) > 0, "no data"
    if "by (layer)" in query.expression:
        assert len({series["metric"]["layer"] for series in found}) == len(found) > 2
    elif "by (kind)" in query.expression:
        assert len({series["metric"]["kind"] for series in found}) == len(found) > 0
    elif not query.expression.startswith("count(ALERTS"):
        assert {series["metric"]["run"] for series in found} == {RUN}


@pytest.mark.parametrize("name", ["run", "instance"])
def test_a_variable_has_values(proof: Proof, name: str):
    asked = re.fullmatch(r"label_values\((.*), (\w+)\)", variables()[name]["query"])
    found = proof.server.ask(f"label/{asked[2]}/values", **{"match[]": proof.filled_in(asked[1])})
    assert found == [{"run": RUN, "instance": proof.target}[name]]


def test_the_variables_leave_out_other_runs_and_instances(proof: Proof):
    for chosen in ({"instance": ["127.0.0.1:1"], "run": [RUN]}, {"instance": [proof.target], "run": ["another"]}):
        for query in panel_queries():
            if query.expression.startswith("count(ALERTS"):
                continue
            asked = interpolated(query.expression, chosen, scrape=SCRAPE, step=SCRAPE, span=60)
            assert proof.server.query(asked, proof.end) == [], query


@pytest.mark.parametrize("rule", RECORDING, ids=lambda rule: rule["record"])
def test_a_recording_rule_has_data(proof: Proof, rule: dict[str, Any]):
    assert sum(map(finite, proof.ask(rule["record"]))) > 0


def operands(expression: str) -> tuple[str, str]:
    """What an alert compares: the two sides of the one comparison that is in no brackets."""
    depth, at = 0, []
    for k, letter in enumerate(expression):
        depth += (letter in "([{") - (letter in ")]}")
        if depth == 0 and letter in "<>":
            at.append(k)
    assert len(at) == 1, f"expected one comparison in {expression}"
    return expression[: at[0]], expression[at[0] + 1 :]


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_the_operands_of_an_alert_have_data(proof: Proof, rule: dict[str, Any]):
    quick = re.sub(r"(\d+)m\]", r"\1s]", rule["expr"])
    for operand in operands(quick):
        assert sum(map(finite, proof.ask(operand))) > 0, operand


def test_prometheus_has_no_complaint_about_any_rule(proof: Proof):
    groups = proof.server.ask("rules")["groups"]
    loaded = [rule for group in groups for rule in group["rules"]]
    assert sorted(rule["name"] for rule in loaded) == sorted(
        [*(rule["record"] for rule in RECORDING), *(rule["alert"] for rule in ALERTS)]
    )
    assert {rule["name"]: rule.get("lastError", "") for rule in loaded if rule["health"] != "ok"} == {}


# What it says is what is so ------------------------------------------------------------------------------------------


def served(target: str) -> str:
    with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
        return answer.read().decode()


def stored(server: PrometheusServer) -> dict[tuple[str, ...], str]:
    """What Prometheus has of the run, without the labels that it adds itself."""
    found = {}
    for series in server.query('{__name__=~"redline_.*", job="redline"}'):
        labels = {name: value for name, value in series["metric"].items() if name not in ("job", "instance")}
        key = (labels.pop("__name__"), *map(str, sorted(labels.items())))
        found[key] = repr(float(series["value"][1]))
    return found


def test_prometheus_has_exactly_what_is_served(proof: Proof):
    by_run = {
        (sample.name, *map(str, sorted(sample.labels.items()))): repr(float(sample.value))
        for family in text_string_to_metric_families(served(proof.target))
        for sample in family.samples
    }
    assert len(by_run) > 80

    def same() -> bool:
        by_server = stored(proof.server)
        differing = {key for key in by_run.keys() | by_server.keys() if by_run.get(key) != by_server.get(key)}
        assert not differing, {key: (by_run.get(key), by_server.get(key)) for key in sorted(differing)}
        return True

    eventually(same, "the last scrape is the last snapshot", 10 * SCRAPE + 5)


def test_promtool_has_no_complaint_about_what_is_served(proof: Proof):
    done = promtool("check", "metrics", stdin=served(proof.target))
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_alerts_fired_with_the_names_of_run_and_source(proof: Proof):
    """The rate is far too high, so that steps are over the redline throughout; and batches were not finite."""
    fired = proof.ask('ALERTS{alertstate="firing"}')
    names = {series["metric"]["alertname"] for series in fired}
    assert names >= {"RedlineStepsTooLong", "RedlineNonFinite"}
    assert {series["metric"]["run"] for series in fired} == {RUN}
    rendered = [alert["annotations"]["summary"] for alert in proof.server.ask("alerts")["alerts"]]
    assert any(summary.startswith(f"{RUN}: steps are over the redline, r = ") for summary in rendered)
    assert not any("{{" in summary for summary in rendered)


def test_the_clamp_is_seen_to_hold_what_was_proposed(proof: Proof):
    proposed = proof.ask("redline_normalized_step_size")[0]["values"]
    committed = proof.ask("redline_committed_step_size")[0]["values"]
    assert max(float(value) for _, value in proposed) > 1.5
    assert max(float(value) for _, value in committed) < 1.01
