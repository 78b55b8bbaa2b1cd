"""Recording rules and alerts: valid, and every alert fires and stays silent when it should."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_queries import FILES
from prometheus_server import promtool

from redline.metrics import METRICS

RULES = FILES / "prometheus"
UNIT_TESTS = Path(__file__).with_name("rules")


def rules(name: str) -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load((RULES / name).read_text())["groups"] for rule in group["rules"]]


RECORDING, ALERTS = rules("recording.yml"), rules("alerts.yml")


def test_promtool_accepts_the_rules():
    done = promtool("check", "rules", "--lint=all", "--lint-fatal", RULES / "recording.yml", RULES / "alerts.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(RECORDING)} rules found" in done.stdout


def test_promtool_accepts_the_configuration():
    done = promtool("check", "config", "--lint=all", "--lint-fatal", RULES / "prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 rule files found" in done.stdout


@pytest.mark.parametrize("name", ["recording.test.yml", "alerts.test.yml"])
def test_promtool_sees_the_rules_do_what_they_should(name: str):
    done = promtool("test", "rules", name, where=UNIT_TESTS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout


MUTATIONS = [
    ("recording.yml", "rate(redline_steps_total[1m])", "increase(redline_steps_total[1m])"),
    ("recording.yml", "quantile_over_time(0.5,", "quantile_over_time(0.1,"),
    ("recording.yml", "sum by (job, instance, controller)", "count by (job, instance, controller)"),
    ("recording.yml", "offset 10m", "offset 5m"),
    ("recording.yml", "unless on (job, instance) (resets(redline_steps_total[10m]) > 0)", ""),
    ("recording.yml", "time() - redline", "redline"),
    ("alerts.yml", "> 1\n", "> 5\n"),
    ("alerts.yml", "> 1\n", ">= 1\n"),
    ("alerts.yml", "for: 2m", "for: 0m"),
    ("alerts.yml", "> 2\n", "> 20\n"),
    ("alerts.yml", "> 2\n", "> 1.01\n"),
    ("alerts.yml", "for: 5m", "for: 0m"),
    ("alerts.yml", "> 0\n", "> 9\n"),
    ("alerts.yml", "nonfinite_total[5m]", "nonfinite_total[30m]"),
    ("alerts.yml", "> 300\n", "> 3000\n"),
    ("alerts.yml", "> 300\n", "> 200\n"),
    ("alerts.yml", "> 1.25\n", "> 2\n"),
    ("alerts.yml", "> 1.25\n", "> 1\n"),
    ("alerts.yml", "for: 10m", "for: 1m"),
]


@pytest.mark.parametrize(("name", "what", "other"), MUTATIONS)
def test_promtool_sees_a_rule_that_does_something_else(tmp_path: Path, name: str, what: str, other: str):
    for file in RULES.glob("*.yml"):
        shutil.copy(file, tmp_path)
    text = (RULES / name).read_text()
    assert what in text
    (tmp_path / name).write_text(text.replace(what, other))
    for file in UNIT_TESTS.glob("*.test.yml"):
        (tmp_path / file.name).write_text(re.sub(r"- \S*/(\w+\.yml)", r"- \1", file.read_text()))
    done = promtool("test", "rules", "recording.test.yml", "alerts.test.yml", where=tmp_path)
    assert done.returncode == 1
    assert "FAILED" in done.stderr


def test_every_rule_is_in_a_unit_test_and_every_alert_both_fires_and_is_silent():
    cases = [
        case
        for path in UNIT_TESTS.glob("*.test.yml")
        for test in yaml.safe_load(path.read_text())["tests"]
        for case in test["promql_expr_test"]
    ]
    for rule in RECORDING:
        assert any(rule["record"] in case["expr"] and case["exp_samples"] for case in cases), rule["record"]
    for rule in ALERTS:
        of_it = [case for case in cases if f'alertname="{rule["alert"]}"' in case["expr"]]
        fired = [one for case in of_it for one in case["exp_samples"] if 'alertstate="firing"' in one["labels"]]
        assert fired, rule["alert"]
        assert any(not case["exp_samples"] for case in of_it), rule["alert"]


@pytest.mark.parametrize("rule", [*RECORDING, *ALERTS], ids=lambda rule: rule.get("record") or rule["alert"])
def test_a_rule_reads_metrics_that_there_are(rule: dict[str, Any]):
    recorded = {one["record"] for one in RECORDING}
    names = set(re.findall(r"(?:\w+:)?redline_\w+(?::\w+)?", rule["expr"]))
    assert names
    assert names <= METRICS.keys() | recorded


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_happened_and_what_to_do(rule: dict[str, Any]):
    assert rule["alert"].startswith("Redline")
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert "{{ $labels.run }}" in rule["annotations"]["summary"]
    assert len(rule["annotations"]["description"]) > 80
