"""What is served in the course of a fit: every metric of the design, with its labels and its values."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from exporter_runs import OF_THE_STEP, PER_LAYER, Classifier, every_step, fit
from lightning_runs import QUIET
from prometheus_client.openmetrics import parser as openmetrics_parser
from scraping import TIMEOUT, families, samples, scrape

import redline
from redline.integrations.lightning import RedlineCallback

pytestmark = QUIET

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
COUNTERS = {
    "redline_steps_total": set(),
    "redline_interventions_total": {"controller", "action"},
    "redline_nonfinite_total": {"source"},
    "redline_measurements_total": {"monitor"},
    "redline_tangent_fallbacks_total": {"method"},
}
LABELS: dict[str, set[str]] = {
    **{name: {"layer"} for name in PER_LAYER},
    **{name: set() for name in OF_THE_STEP},
    "redline_learning_rate": {"optimizer", "group"},
    "redline_weight_decay": {"optimizer", "group"},
    **COUNTERS,
    "redline_run_info": {"run", "version", "precision", "strategy", "world_size"},
}
"""Every metric of the design and its labels."""


class ScaleOnce(redline.Controller):
    """Halves step 2."""

    def inspect(self, step: redline.Step) -> list[redline.Scale]:
        return [redline.Scale(0.5, "to see it")] if step.index == 2 else []


@pytest.fixture(scope="module")
def scraped() -> tuple[dict[str, str], Classifier, str]:
    """What was served in a fit: before its first step, after the third, which was scaled, and after the twelfth."""
    torch.manual_seed(0)
    exporter = redline.PrometheusExporter(port=0, every=1)
    callback = RedlineCallback(
        monitors=every_step(), controllers=[ScaleOnce()], sinks=[exporter], run='a "run" of\\mine', module="net"
    )
    texts: dict[str, str] = {}

    def take(name: str, accept: str = "text/plain") -> Callable[[], None]:
        # By a client in another thread, as a scraper is another process.
        def taking() -> None:
            with ThreadPoolExecutor(1) as client:
                texts[name] = client.submit(scrape, exporter.url, accept).result(TIMEOUT)

        return taking

    def twice() -> None:
        take("12")()
        take("openmetrics", OPENMETRICS)()

    module = fit(callback, {"start": take("start"), 3: take("3"), 12: twice}, steps=13)
    assert callback.session is not None
    return texts, module, callback.session.latest.run.version


def test_every_metric_of_the_design_is_served(scraped: Any):
    found = samples(scraped[0]["12"])
    assert set(LABELS) - set(found) == set()


def test_labels_are_those_of_the_design(scraped: Any):
    for name, series in samples(scraped[0]["12"]).items():
        if name in LABELS:
            for labels in series:
                assert {label for label, _ in labels} == LABELS[name], name


def test_counters_are_counters_and_gauges_gauges(scraped: Any):
    types = {sample.name: family.type for family in families(scraped[0]["12"]) for sample in family.samples}
    for name in LABELS:
        expected = "counter" if name in COUNTERS else "gauge"  # the text format has no type for info
        assert types[name] == expected, name


def test_each_metric_says_what_it_is(scraped: Any):
    for family in families(scraped[0]["12"]):
        assert family.name.startswith("redline_")
        assert len(family.documentation) > 5


def test_layers_are_the_models_matrices(scraped: Any):
    found = samples(scraped[0]["12"])
    for name in PER_LAYER:
        assert set(found[name]) == {(("layer", "net.0.weight"),), (("layer", "net.2.weight"),)}


def test_labels_hold_the_right_values(scraped: Any):
    texts, _, version = scraped
    found = samples(texts["12"])
    assert found["redline_learning_rate"] == {(("group", "0"), ("optimizer", "AdamW")): 0.01}
    assert found["redline_weight_decay"] == {(("group", "0"), ("optimizer", "AdamW")): 0.1}
    assert found["redline_interventions_total"][("action", "scale"), ("controller", "ScaleOnce")] == 1
    assert {labels[0][1] for labels in found["redline_nonfinite_total"]} == {"loss", "gradient", "update", "weight"}
    assert set(found["redline_measurements_total"].items()) == {
        ((("monitor", name),), 12.0) for name in ("WeightSpectrum", "UpdateSpectrum", "GhostRadius", "StepHealth")
    }
    ((info, one),) = found["redline_run_info"].items()
    assert one == 1
    assert dict(info) == {
        "run": 'a "run" of\\mine',
        "version": version,
        "precision": "32-true",
        "strategy": "SingleDeviceStrategy",
        "world_size": "1",
    }


def test_values_are_those_of_the_last_step(scraped: Any):
    texts, module, _ = scraped
    for name in ("3", "12"):
        found = samples(texts[name])
        assert found["redline_steps_total"][()] == int(name)
        assert found["redline_loss"][()] == pytest.approx(module.losses[int(name) - 1])
    scaled, free = samples(texts["3"]), samples(texts["12"])
    assert (scaled["redline_step_scale"][()], free["redline_step_scale"][()]) == (0.5, 1.0)
    r = "redline_normalized_step_size"
    assert scaled["redline_committed_step_size"][()] == pytest.approx(0.5 * scaled[r][()])
    assert free["redline_committed_step_size"][()] == pytest.approx(free[r][()])
    assert free[r][()] == pytest.approx(free["redline_update_norm"][()] / free["redline_ghost_radius"][()])


def test_the_openmetrics_parser_accepts_it_too(scraped: Any):
    texts, _, _ = scraped
    assert texts["openmetrics"].endswith("# EOF\n")
    found = {
        sample.name: sample.value
        for family in openmetrics_parser.text_string_to_metric_families(texts["openmetrics"])
        for sample in family.samples
        if not sample.labels
    }
    plain = {name: series[()] for name, series in samples(texts["12"]).items() if () in series}
    assert found == plain
    types = {
        family.name: family.type for family in openmetrics_parser.text_string_to_metric_families(texts["openmetrics"])
    }
    assert (types["redline_steps"], types["redline_loss"], types["redline_run"]) == ("counter", "gauge", "info")


@pytest.mark.parametrize("name", ["start", "3", "openmetrics"])
def test_there_are_no_created_series(scraped: Any, name: str):
    assert "_created" not in scraped[0][name]


@pytest.mark.parametrize("counter", [name for name in COUNTERS if name != "redline_interventions_total"])
def test_counters_are_there_at_0_before_the_first_step(scraped: Any, counter: str):
    series = samples(scraped[0]["start"]).get(counter)
    assert series, f"{counter} is not there"
    assert set(series) == set(samples(scraped[0]["12"])[counter])
    assert set(series.values()) == {0.0}


def test_interventions_are_there_at_0_before_the_first_step(scraped: Any):
    series = samples(scraped[0]["start"]).get("redline_interventions_total", {})
    assert series.get((("action", "scale"), ("controller", "ScaleOnce"))) == 0


def test_before_the_first_step_no_gauge_is_served(scraped: Any):
    found = samples(scraped[0]["start"])
    assert "redline_run_info" in found
    assert not [name for name in found if name in (*PER_LAYER, "redline_loss", "redline_normalized_step_size")]
