"""A budget of series: kept, spent on the worst layers, and nothing lost or told twice."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Iterable, Mapping

import pytest
import torch
from scraping import Loop, samples, scrape, snapshot
from torch import nn

import redline
from redline.integrations.series_budget import SeriesBudget

RATIO, CONDITION, NORM = (
    "redline_update_to_weight_ratio",
    "redline_weight_spectral_condition",
    "redline_weight_spectral_norm",
)
PER_LAYER = [name for name, metric in redline.METRICS.items() if metric.labels == ("layer",)]
COUNTERS = {
    "redline_steps_total": {(): 7.0},
    "redline_nonfinite_total": {("loss",): 0.0, ("gradient",): 2.0},
    "redline_interventions_total": {("StepClamp", "scale"): 3.0},
    "redline_learning_rate": {("AdamW", str(k)): 0.1 for k in range(10)},
}

Values = dict[str, dict[tuple[str, ...], float]]


def per_layer(metric: str, values: Mapping[str, float]) -> Values:
    return {metric: {(layer,): value for layer, value in values.items()}}


def named(found: Values, metric: str) -> set[str]:
    return {layer for (layer,) in found.get(metric, {})}


def count(found: Values) -> int:
    """With ``redline_run_info``, which the families add."""
    return sum(map(len, found.values())) + 1


def a_model(generator: random.Random, blocks: int) -> list[str]:
    kinds = ["attention.qkv.weight", "attention.out.weight", "mlp.up.weight", "mlp.down.weight", "experts.weight[3]"]
    return ["embedding.weight", *(f"blocks.{k}.{kind}" for k in range(blocks) for kind in kinds), "head.weight"]


def random_values(layers: Iterable[str], generator: random.Random) -> Values:
    """Each metric of some layers only, as where it is not defined for the others."""
    found: Values = {name: dict(series) for name, series in COUNTERS.items()}
    for metric in PER_LAYER:
        share = generator.choice([0.0, 0.5, 1.0])
        kept = {layer: generator.lognormvariate(0, 1) for layer in layers if generator.random() < share}
        found.update(per_layer(metric, kept))
    return found


# What fits is served whole --------------------------------------------------------------------------------------------


def test_what_fits_is_served_as_it_is():
    values = random_values(a_model(random.Random(0), 3), random.Random(1))
    found = SeriesBudget(1000).fit(snapshot(values))
    assert found.pop("redline_folded_layers") == {(): 0}
    assert found == {name: series for name, series in values.items() if series}


def test_to_the_last_series():
    layers = [f"blocks.{k}.weight" for k in range(100)]
    values = {**per_layer(NORM, dict.fromkeys(layers, 1.0)), **per_layer(RATIO, dict.fromkeys(layers, 1.0))}
    for max_series, folded in ((202, 0), (201, 3)):  # one series less: a maximum and a median of two metrics take four
        found = SeriesBudget(max_series).fit(snapshot(values))
        assert found["redline_folded_layers"] == {(): folded}
        assert count(found) <= max_series


# The budget is kept, and nothing is lost ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_the_budget_is_kept_and_every_layer_is_named_or_folded_never_both(seed: int):
    generator = random.Random(seed)
    layers = a_model(generator, generator.choice([5, 40, 200]))
    values = random_values(layers, generator)
    max_series = generator.choice([100, 150, 500, 1000])
    found = SeriesBudget(max_series).fit(snapshot(values))
    assert count(found) <= max_series
    for name, series in COUNTERS.items():
        assert found[name] == series

    served = set().union(*(named(found, metric) for metric in PER_LAYER))
    measured = {layer for metric in PER_LAYER for (layer,) in values[metric]}
    assert found["redline_folded_layers"] == {(): len(measured - served)}
    folded_max, folded_median = found.get("redline_folded_max", {}), found.get("redline_folded_median", {})
    assert folded_max.keys() == folded_median.keys()
    for metric in PER_LAYER:
        expected = {labels: value for labels, value in values[metric].items() if labels[0] in served}
        assert found.get(metric, {}) == expected, "a layer has all of its series, or none"
        folded = [value for (layer,), value in values[metric].items() if layer not in served]
        maxima = [value for (name, _), value in folded_max.items() if name == metric]
        assert (max(maxima) if maxima else None) == (max(folded) if folded else None)


def test_folded_values_are_the_maximum_and_the_median_of_a_kind():
    generator = random.Random(3)
    layers = a_model(generator, 50)
    values = {metric: series for metric in (RATIO, NORM) for series in [{}]}
    for metric in values:
        values[metric] = {(layer,): generator.lognormvariate(0, 1) for layer in layers}
    found = SeriesBudget(100).fit(snapshot(values))
    served = named(found, RATIO)
    assert served
    kinds = {
        "blocks.*.attention.qkv.weight": "attention.qkv.weight",
        "blocks.*.attention.out.weight": "attention.out.weight",
        "blocks.*.mlp.up.weight": "mlp.up.weight",
        "blocks.*.mlp.down.weight": "mlp.down.weight",
        "blocks.*.experts.weight[*]": "experts.weight",
        "embedding.weight": "embedding.weight",
        "head.weight": "head.weight",
    }
    for kind, part in kinds.items():
        for metric in (RATIO, NORM):
            of_kind = [value for (layer,), value in values[metric].items() if part in layer and layer not in served]
            if of_kind:
                assert found["redline_folded_max"][metric, kind] == max(of_kind)
                assert found["redline_folded_median"][metric, kind] == pytest.approx(statistics.median(of_kind))
    assert {kind for _, kind in found["redline_folded_max"]} <= set(kinds)


@pytest.mark.parametrize(
    ("names", "kinds"),
    [
        ([f"net.{k}.weight" for k in range(300)], {"net.*.weight"}),
        ([f"weights.{k}" for k in range(300)], {"weights.*"}),
        ([f"{k}" for k in range(300)], {"*"}),
        ([f"experts.weight[{k}]" for k in range(300)], {"experts.weight[*]"}),
        ([f"stage{k}.conv1.weight" for k in range(300)], {"conv1.weight"}),
        ([f"conv{k}.weight" for k in range(300)], {"weight"}),
        ([f"w{k}" for k in range(300)], {"*"}),
    ],
)
def test_a_kind_is_a_name_without_indices_and_as_much_of_it_as_there_is_room_for(names: list[str], kinds: set[str]):
    found = SeriesBudget(100).fit(snapshot(per_layer(NORM, dict.fromkeys(names, 1.0))))
    assert {kind for _, kind in found["redline_folded_max"]} == kinds
    assert {metric for metric, _ in found["redline_folded_max"]} == {NORM}
    assert 90 <= count(found) <= 100


@pytest.mark.parametrize("max_series", [0, -1, 99])
def test_a_budget_too_small_is_refused(max_series: int):
    with pytest.raises(redline.ConfigurationError, match=rf"got max_series={max_series}; expected at least 100"):
        SeriesBudget(max_series)
    for kind in (redline.PrometheusExporter, redline.TextfileSink):
        with pytest.raises(redline.ConfigurationError, match=f"got max_series={max_series}"):
            kind(max_series=max_series)


# The worst first ------------------------------------------------------------------------------------------------------


def figures(ratios: Mapping[str, float], conditions: Mapping[str, float] | None = None) -> Values:
    return {**per_layer(RATIO, ratios), **per_layer(CONDITION, conditions or dict.fromkeys(ratios, 1.0))}


def test_the_worst_layers_by_update_to_weight_ratio_are_named():
    generator = random.Random(0)
    ratios = {f"layers.{k}.weight": generator.random() for k in range(500)}
    found = SeriesBudget(200).fit(snapshot(figures(ratios)))
    served = named(found, RATIO)
    assert len(served) == (200 - 2 - 4) // 2  # run_info and folded_layers, four folded series, two a layer
    assert served == set(sorted(ratios, key=ratios.get, reverse=True)[: len(served)])
    assert found["redline_folded_max"][RATIO, "layers.*.weight"] < min(ratios[layer] for layer in served)


def test_equal_ratios_are_told_apart_by_the_spectral_condition():
    generator = random.Random(0)
    ratios = {f"layers.{k}.weight": 0.0 for k in range(500)}  # as with a learning rate of 0
    conditions = {layer: generator.random() for layer in ratios}
    served = named(SeriesBudget(200).fit(snapshot(figures(ratios, conditions))), RATIO)
    assert served == set(sorted(conditions, key=conditions.get, reverse=True)[: len(served)])


def test_a_layer_that_was_not_measured_comes_after_all_that_were():
    values = figures({f"moving.{k}.weight": 0.0 for k in range(40)})
    values[CONDITION] |= {(f"frozen.{k}.weight",): 100.0 for k in range(60)}
    values["redline_attention_step_size"] = {(f"blocks.{k}.attention",): 0.9 for k in range(60)}
    found = SeriesBudget(120).fit(snapshot(values))
    assert named(found, RATIO) == {f"moving.{k}.weight" for k in range(40)}
    assert {layer.split(".")[0] for layer in named(found, CONDITION)} == {"moving", "frozen"}
    assert named(found, "redline_attention_step_size") == set()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("metric", [RATIO, CONDITION, NORM])
def test_a_layer_that_is_not_finite_keeps_its_name(metric: str, value: float):
    values = {**figures({f"layers.{k}.weight": 1.0 + k for k in range(500)})}
    values.setdefault(metric, {})["layers.0.weight",] = value
    found = SeriesBudget(100).fit(snapshot(values))
    assert repr(found[metric]["layers.0.weight",]) == repr(value)
    assert all(math.isfinite(one) for one in found["redline_folded_max"].values())


def test_where_all_are_nan_the_folded_maximum_is_too_and_one_nan_is_not_lost():
    every = {f"layers.{k}.weight": math.nan for k in range(500)}
    found = SeriesBudget(100).fit(snapshot(figures(every)))
    assert math.isnan(found["redline_folded_max"][RATIO, "layers.*.weight"])
    most = {**dict.fromkeys(every, 1.0), **{f"layers.{k}.weight": math.nan for k in range(100)}}
    found = SeriesBudget(100).fit(snapshot(figures(most)))
    assert math.isnan(found["redline_folded_max"][RATIO, "layers.*.weight"])
    assert found["redline_folded_median"][RATIO, "layers.*.weight"] == 1


# From one snapshot to the next ----------------------------------------------------------------------------------------


def test_noise_does_not_change_which_layers_are_named():
    generator = random.Random(0)
    means = {f"layers.{k}.weight": generator.lognormvariate(0, 0.5) for k in range(300)}
    budget = SeriesBudget(150)
    served = []
    for step in range(50):
        noisy = {layer: mean * generator.uniform(0.85, 1.19) for layer, mean in means.items()}
        served.append(named(budget.fit(snapshot(figures(noisy), step)), RATIO))
    assert all(one == served[0] for one in served)


def test_a_layer_takes_anothers_place_once_it_is_more_than_twice_as_bad():
    ratios = {f"layers.{k}.weight": 1.0 if k < 100 else 0.5 for k in range(300)}
    budget = SeriesBudget(150)
    before = named(budget.fit(snapshot(figures(ratios))), RATIO)
    ratios["layers.299.weight"] = 1.99
    assert named(budget.fit(snapshot(figures(ratios))), RATIO) == before
    ratios["layers.299.weight"] = 2.01
    after = named(budget.fit(snapshot(figures(ratios))), RATIO)
    assert after - before == {"layers.299.weight"}
    assert len(before - after) == 1
    ratios["layers.299.weight"] = 0.75
    assert named(budget.fit(snapshot(figures(ratios))), RATIO) == after, "and has it until another is twice as bad"


# In a run -------------------------------------------------------------------------------------------------------------


class DeepLoop(Loop):
    """Of 60 matrices."""

    def __init__(self, *sinks: redline.Sink) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 6), *(nn.Linear(6, 6) for _ in range(58)), nn.Linear(6, 3))
        for layer in self.model:
            nn.init.orthogonal_(layer.weight)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        monitors = [redline.WeightSpectrum(every=1), redline.UpdateSpectrum(every=1), redline.StepHealth()]
        self.session = redline.attach(self.model, self.optimizer, sinks=sinks, monitors=monitors)


def test_a_page_keeps_to_the_budget_and_shows_the_layers_pushed_hardest():
    whole = redline.PrometheusExporter(0, every=1)
    within = redline.PrometheusExporter(0, every=1, max_series=150)
    loop = DeepLoop(whole, within)
    loop.step()
    everything, text = samples(scrape(whole.url)), scrape(within.url)
    assert scrape(within.url) == text, "scraped twice, one snapshot gives one page"
    ratios = loop.session.latest.layers(RATIO)
    loop.session.close()
    found = samples(text)
    assert sum(map(len, everything.values())) > 400
    assert 130 < sum(map(len, found.values())) <= 150
    served = {dict(labels)["layer"] for labels in found[RATIO]}
    assert served == set(sorted(ratios, key=ratios.get, reverse=True)[: len(served)])
    assert found["redline_folded_layers"][()] == 60 - len(served)
    assert everything["redline_folded_layers"][()] == 0
    rest = [ratio for layer, ratio in ratios.items() if layer not in served]
    labels = (("kind", "*.weight"), ("metric", RATIO))
    assert found["redline_folded_max"][labels] == max(rest)
    assert found["redline_folded_median"][labels] == pytest.approx(statistics.median(rest))
    for name in found.keys() - {RATIO, "redline_folded_layers", "redline_folded_max", "redline_folded_median"}:
        assert found[name].items() <= everything[name].items()
        if redline.METRICS[name].kind == "counter":
            assert found[name] == everything[name]
