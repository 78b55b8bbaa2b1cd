"""Readings and snapshots: what is written on the device, and what of it arrives on the host."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import redline
from redline import Readings, RunInfo, Series, Snapshot, metrics

RUN = RunInfo("run", "0", "float32", "single", 1)


def at(step: int, readings: Readings) -> Readings:
    readings.step = step
    return readings


# Gauges -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [2.5, torch.tensor(2.5), torch.tensor(2.5, dtype=torch.float64), torch.tensor(2.5, dtype=torch.bfloat16)],
)
def test_gauge_takes_floats_and_tensors(value: Any) -> None:
    readings = at(3, Readings())
    readings.gauge(metrics.LOSS, value)
    snapshot = readings.fetch(RUN)
    assert snapshot.step == 3
    assert snapshot.value("redline_loss") == 2.5
    assert snapshot.measured_at[Series("redline_loss")] == 3
    assert snapshot.run == RUN


def test_float64_keeps_its_digits() -> None:
    readings = Readings()
    readings.gauge(metrics.LOSS, torch.tensor(1 / 3, dtype=torch.float64))
    assert readings.fetch(RUN).value("redline_loss") == 1 / 3


def test_gauge_keeps_its_last_value_and_the_step_it_is_of() -> None:
    readings = Readings()
    at(0, readings).gauge(metrics.LOSS, 1.0)
    readings.fetch(RUN)
    at(5, readings).gauge(metrics.GRADIENT_NORM, 2.0)
    snapshot = readings.fetch(RUN)
    assert snapshot.step == 5
    assert snapshot.value("redline_loss") == 1.0
    assert snapshot.measured_at == {Series("redline_loss"): 0, Series("redline_gradient_norm"): 5}


def test_last_of_several_values_counts() -> None:
    readings = Readings()
    for step, value in enumerate((1.0, torch.tensor(2.0), 3.0)):
        at(step, readings).gauge(metrics.LOSS, value)
    assert readings.fetch(RUN).value("redline_loss") == 3.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_arrives_as_it_is(value: float) -> None:
    readings = Readings()
    readings.gauge(metrics.LOSS, torch.tensor(value))
    readings.gauge(metrics.GRADIENT_NORM, value)
    snapshot = readings.fetch(RUN)
    assert snapshot.value("redline_loss") == pytest.approx(value, nan_ok=True)
    assert snapshot.value("redline_gradient_norm") == pytest.approx(value, nan_ok=True)


def test_gauge_with_labels_is_one_series_each() -> None:
    readings = Readings()
    readings.gauge(metrics.LEARNING_RATE, 0.1, "SGD", "0")
    readings.gauge(metrics.LEARNING_RATE, 0.2, "SGD", "1")
    snapshot = readings.fetch(RUN)
    assert snapshot.series("redline_learning_rate") == {("SGD", "0"): 0.1, ("SGD", "1"): 0.2}
    assert snapshot.value("redline_learning_rate", group="1", optimizer="SGD") == 0.2


@pytest.mark.parametrize("metric", [metrics.GHOST_RADIUS, metrics.NORMALIZED_STEP_SIZE])
def test_absent_takes_the_last_value_away(metric: redline.Metric) -> None:
    readings = Readings()
    at(0, readings).gauge(metric, 1.0)
    assert readings.fetch(RUN).value(metric.name) == 1.0
    at(1, readings).absent(metric)
    snapshot = readings.fetch(RUN)
    assert metric.name not in snapshot
    assert Series(metric.name) not in snapshot.measured_at
    at(2, readings).gauge(metric, 3.0)
    assert readings.fetch(RUN).value(metric.name) == 3.0


def test_absent_in_between_does_not_take_a_later_value_away() -> None:
    readings = Readings()
    for metric in (metrics.GHOST_RADIUS, metrics.NORMALIZED_STEP_SIZE):
        at(0, readings).absent(metric)
        at(1, readings).gauge(metric, torch.tensor(2.0))
    snapshot = readings.fetch(RUN)
    assert snapshot.value("redline_ghost_radius") == 2.0
    assert snapshot.value("redline_normalized_step_size") == 2.0


def test_layers_that_are_not_valid_stay_absent() -> None:
    readings = Readings()
    names = ["a", "b", "c"]
    readings.layers(metrics.WEIGHT_STABLE_RANK, names, torch.tensor([1.0, math.nan, 3.0]))
    assert readings.fetch(RUN).layers("redline_weight_stable_rank") == pytest.approx(
        {"a": 1.0, "b": math.nan, "c": 3.0}, nan_ok=True
    )
    readings.layers(metrics.WEIGHT_STABLE_RANK, names, torch.tensor([4.0, 5.0, 6.0]), torch.tensor([True, False, True]))
    assert readings.fetch(RUN).layers("redline_weight_stable_rank") == {"a": 4.0, "c": 6.0}


# Counters ---------------------------------------------------------------------------------------------


def test_counters_add_up_from_numbers_and_tensors_across_fetches() -> None:
    readings = Readings()
    readings.count(metrics.NONFINITE, 2, "loss")
    readings.count(metrics.NONFINITE, torch.tensor(True), "loss")
    readings.count(metrics.NONFINITE, torch.tensor(3), "loss")
    assert readings.fetch(RUN).value("redline_nonfinite_total", source="loss") == 6
    readings.count(metrics.NONFINITE, torch.tensor(1.0), "loss")
    readings.count(metrics.NONFINITE, 0, "loss")
    assert readings.fetch(RUN).value("redline_nonfinite_total", source="loss") == 7
    assert readings.fetch(RUN).value("redline_nonfinite_total", source="loss") == 7
    assert readings.fetch(RUN).value("redline_nonfinite_total", source="update") == 0


def test_counters_without_labels_or_with_known_ones_start_at_zero() -> None:
    snapshot = Readings().fetch(RUN)
    assert snapshot.step == -1
    for metric in redline.METRICS.values():
        if metric.kind == "counter" and not metric.labels:
            assert snapshot.value(metric.name) == 0
        for value in metric.label_values:
            assert snapshot.series(metric.name)[(value,)] == 0


def test_counters_survive_and_gauges_are_measured_anew() -> None:
    readings = at(4, Readings())
    readings.count(metrics.STEPS, 5)
    readings.count(metrics.INTERVENTIONS, 2, "Clamp", "scale")
    readings.gauge(metrics.LOSS, 1.0)
    readings.fetch(RUN)
    resumed = Readings()
    resumed.load_state_dict(readings.state_dict())
    snapshot = resumed.fetch(RUN)
    assert snapshot.step == 4
    assert snapshot.value("redline_steps_total") == 5
    assert snapshot.value("redline_interventions_total", controller="Clamp", action="scale") == 2
    assert "redline_loss" not in snapshot
    assert resumed.state_dict() == readings.state_dict()


# On the way to the host -------------------------------------------------------------------------------


def test_observer_is_told_of_every_tracked_value_and_of_the_last_of_the_others() -> None:
    told: list[tuple[str, int, float]] = []
    readings = Readings(lambda series, step, value: told.append((series.metric, step, value)))
    for step in range(3):
        at(step, readings).gauge(metrics.NORMALIZED_STEP_SIZE, torch.tensor(float(step)))
        readings.gauge(metrics.LOSS, torch.tensor(10.0 + step))
    assert told == []
    readings.fetch(RUN)
    assert [(step, value) for metric, step, value in told if metric == "redline_normalized_step_size"] == [
        (0, 0.0),
        (1, 1.0),
        (2, 2.0),
    ]
    assert [(step, value) for metric, step, value in told if metric == "redline_loss"][-1] == (2, 12.0)
    told.clear()
    readings.fetch(RUN)
    assert told == [], "each value arrives once"


def test_too_many_tracked_values_ask_to_be_fetched() -> None:
    readings = Readings()
    assert not readings.overflowing
    for step in range(5000):
        at(step, readings).gauge(metrics.NORMALIZED_STEP_SIZE, torch.tensor(0.5))
        if readings.overflowing:
            break
    assert 100 < step < 2000
    readings.fetch(RUN)
    assert not readings.overflowing


class Reads(TorchDispatchMode):
    """Counts what brings a value from a tensor to Python."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return func(*args, **(kwargs or {}))


def test_writing_waits_for_no_value() -> None:
    readings = Readings()
    value, values = torch.tensor(1.0), torch.ones(2)
    with Reads() as mode:
        for step in range(3):
            at(step, readings).gauge(metrics.LOSS, value)
            readings.gauge(metrics.NORMALIZED_STEP_SIZE, value)
            readings.layers(metrics.WEIGHT_STABLE_RANK, ["a", "b"], values, values > 0)
            readings.count(metrics.NONFINITE, ~value.isfinite(), "loss")
            readings.absent(metrics.GHOST_RADIUS)
        assert mode.reads == 0
        value.item()
        assert mode.reads == 1, "the count works"


def test_values_on_the_device_are_detached() -> None:
    readings = Readings()
    value = torch.tensor(2.0, requires_grad=True) * 3
    readings.gauge(metrics.LOSS, value)
    readings.count(metrics.NONFINITE, value, "loss")
    snapshot = readings.fetch(RUN)
    assert snapshot.value("redline_loss") == 6.0
    assert snapshot.value("redline_nonfinite_total", source="loss") == 6.0


# Snapshots --------------------------------------------------------------------------------------------


@pytest.fixture
def snapshot() -> Snapshot:
    readings = at(7, Readings())
    readings.gauge(metrics.LOSS, 1.5)
    readings.gauge(metrics.LEARNING_RATE, 0.1, "SGD", "0")
    readings.layers(metrics.WEIGHT_SPECTRAL_NORM, ["a.weight", "b.weight"], torch.tensor([1.0, 2.0]))
    return readings.fetch(RUN)


def test_layers_are_by_name(snapshot: Snapshot) -> None:
    assert snapshot.layers("redline_weight_spectral_norm") == {"a.weight": 1.0, "b.weight": 2.0}
    assert snapshot.layers("redline_update_spectral_norm") == {}
    assert snapshot.value("redline_weight_spectral_norm", layer="b.weight") == 2.0


def test_membership_is_by_metric(snapshot: Snapshot) -> None:
    assert "redline_loss" in snapshot
    assert "redline_learning_rate" in snapshot
    assert "redline_gradient_norm" not in snapshot
    assert "redline_nonsense" not in snapshot


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda s: s.value("loss"), "got 'loss'; expected a full metric name, one of redline_weight_spectral_norm"),
        (lambda s: s.layers("loss"), "got 'loss'; expected a full metric name"),
        (lambda s: s.series("loss"), "got 'loss'; expected a full metric name"),
        (lambda s: s.value("redline_gradient_norm"), "redline_gradient_norm has not been measured by step 7"),
        (
            lambda s: s.value("redline_weight_spectral_norm", layer="c.weight"),
            "has not been measured for {'layer': 'c.weight'} by step 7",
        ),
        (
            lambda s: s.value("redline_learning_rate", group="0"),
            r"got labels \['group'\] for redline_learning_rate; expected \['group', 'optimizer'\]",
        ),
        (lambda s: s.value("redline_loss", layer="a"), r"got labels \['layer'\] for redline_loss; expected \[\]"),
        (lambda s: s.layers("redline_loss"), "got redline_loss, which is not measured per layer"),
    ],
)
def test_what_cannot_be_answered_is_said(snapshot: Snapshot, ask: Any, message: str) -> None:
    with pytest.raises(KeyError, match=message):
        ask(snapshot)


def test_snapshot_does_not_change_with_what_is_read_later() -> None:
    readings = Readings()
    readings.gauge(metrics.LOSS, 1.0)
    readings.count(metrics.STEPS)
    first = readings.fetch(RUN)
    at(1, readings).gauge(metrics.LOSS, 2.0)
    readings.count(metrics.STEPS)
    readings.fetch(RUN)
    assert first.value("redline_loss") == 1.0
    assert first.value("redline_steps_total") == 1
    assert first.step == -1
