"""The stability report: every figure against one computed by hand, every verdict against the run it is about."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence

import pytest
import torch
import torch.nn.functional as F
from reports import Key, R
from reports import report_of_sizes as report_of
from sinks import Keep
from torch import nn

import redline
from redline.interventions import Tally
from redline.report import KeptSnapshot, StabilityReport, StepSizes

NAN, INF = math.nan, math.inf


def sizes_of(step_sizes: Sequence[float], values: Mapping[Key, float] | None = None) -> StepSizes:
    sizes = report_of(step_sizes, values=values).step_sizes
    assert sizes is not None
    return sizes


def assert_matches(pattern: str, text: str) -> None:
    assert re.search(pattern, text), f"{pattern!r} is not in {text!r}"


# The distribution of r -----------------------------------------------------------------------------------------------


def test_median_of_an_odd_and_of_an_even_number():
    assert sizes_of([0.5, 0.1, 0.2]).median == pytest.approx(0.2)
    assert sizes_of([0.5, 0.1, 0.2, 0.4]).median == pytest.approx(0.3)


def test_95th_percentile():
    shuffled = [0.01 * ((8 * k) % 21) for k in range(21)]  # 0.00 ... 0.20: 19 of 20 lie at or below 0.19
    assert sizes_of(shuffled).p95 == pytest.approx(0.19)


def test_95th_percentile_of_a_single_value():
    assert sizes_of([0.3]).p95 == 0.3


def test_highest_and_its_step():
    sizes = sizes_of([0.1, 0.7, 0.2])
    assert (sizes.highest, sizes.highest_step, sizes.measured) == (0.7, 1, 3)


def test_near_and_over_the_redline():
    sizes = sizes_of([0.49, 0.5, 0.99, 1.0, 1.01, 42.0])
    assert (sizes.near, sizes.over) == (2, 3)


def test_histogram_counts_each_value_once_and_a_bound_in_the_upper_bin():
    sizes = sizes_of([0.0, 0.005, 0.01, 0.02, 0.03, 0.2, 0.3, 0.9, 1.0, 2.9, 3.0, 10.0, 1e6])
    assert sizes.histogram == (
        (0.0, 0.01, 2),
        (0.01, 0.03, 2),
        (0.03, 0.1, 1),
        (0.1, 0.3, 1),
        (0.3, 0.5, 1),
        (0.5, 1.0, 1),
        (1.0, 3.0, 2),
        (3.0, 10.0, 1),
        (10.0, INF, 2),
    )


def test_values_that_are_not_finite_are_counted_and_are_in_no_other_figure():
    sizes = sizes_of([0.1, NAN, 0.3, INF, 0.2])
    assert (sizes.measured, sizes.nonfinite) == (5, 2)
    assert sizes.median == pytest.approx(0.2)
    assert sizes.p95 == pytest.approx(0.3)
    assert (sizes.highest, sizes.highest_step) == (0.3, 2)
    assert (sizes.near, sizes.over) == (0, 0)
    assert sum(count for _, _, count in sizes.histogram) == 3


def test_nothing_but_nan_gives_nan_and_no_error():
    sizes = sizes_of([NAN, NAN])
    assert (sizes.measured, sizes.nonfinite, sizes.near, sizes.over) == (2, 2, 0, 0)
    assert math.isnan(sizes.median)
    assert math.isnan(sizes.p95)
    assert math.isnan(sizes.highest)


def test_how_many_samples_r_is_the_maximum_over():
    sizes = sizes_of([0.1], {"redline_tangent_samples": 32.0, "redline_batch_samples": 128.0})
    assert (sizes.samples, sizes.batch) == (32, 128)


def test_methods_are_counted_forward_mode_included():
    assert sizes_of([0.1] * 5).method == {"forward_mode": 5}
    mixed = sizes_of([0.1] * 5, {("redline_tangent_fallbacks_total", "finite_difference"): 2.0})
    assert mixed.method == {"forward_mode": 3, "finite_difference": 2}


def test_a_long_run_counts_all_its_measurements_and_forgets_no_step_over_the_redline():
    spike = 9_001  # odd, so that dropping every other measurement drops it
    report = report_of([3.0 if step == spike else 0.1 for step in range(10_000)])
    sizes = report.step_sizes
    assert sizes is not None
    assert (sizes.highest, sizes.highest_step) == (3.0, spike)
    assert sizes.measured == 10_000
    assert sizes.over == 1
    assert report.verdicts[0].level == "bad"


# Layers --------------------------------------------------------------------------------------------------------------


def layered(ratios: Mapping[str, Sequence[tuple[int, float]]]) -> StabilityReport:
    courses: dict[Key, Sequence[tuple[int, float]]] = {
        ("redline_weight_spectral_norm", name): [(0, 2.0), (50, 3.0)] for name in ("a", "b", "c")
    }
    courses |= {("redline_update_to_weight_ratio", name): course for name, course in ratios.items()}
    return report_of([0.1], courses=courses)


def test_a_layer_is_summed_up():
    report = report_of(
        [0.1],
        values={("redline_weight_spectral_condition", "a"): 1.5, ("redline_weight_stable_rank", "a"): 4.0},
        courses={
            ("redline_weight_spectral_norm", "a"): [(0, 2.0), (50, 6.0), (100, 3.0)],
            ("redline_update_to_weight_ratio", "a"): [(0, 0.1), (50, 0.4), (100, 0.2)],
        },
    )
    (layer,) = report.layers
    assert layer.name == "a"
    assert layer.spectral_norm == 3.0
    assert layer.growth == pytest.approx(1.5)
    assert (layer.condition, layer.stable_rank) == (1.5, 4.0)
    assert (layer.hardest_update, layer.hardest_step) == (0.4, 50)


def test_what_was_not_measured_of_a_layer_is_none():
    report = report_of([0.1], courses={("redline_weight_spectral_norm", "a"): [(0, 0.0), (50, 3.0)]})
    (layer,) = report.layers
    assert layer.growth is None  # from a zero matrix
    assert layer.condition is None
    assert layer.stable_rank is None
    assert layer.hardest_update is None
    assert layer.hardest_step is None


def test_layers_come_the_hardest_pushed_first():
    report = layered({"a": [(0, 0.1)], "b": [(0, 0.2), (50, 0.9), (100, 0.1)], "c": [(0, 0.3)]})
    assert [layer.name for layer in report.layers] == ["b", "c", "a"]


def test_a_layer_whose_updates_were_all_nan_does_not_upset_the_order_of_the_others():
    report = layered({"a": [(0, 0.1)], "b": [(0, NAN)], "c": [(0, 0.5)]})
    names = [layer.name for layer in report.layers]
    assert names.index("c") < names.index("a")
    assert "b" in names


# Verdicts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step_sizes", "level", "text"),
    [
        ([0.1, 0.25, 0.1], "good", r"Within limits.* 3 measured steps.*r = 0\.25 \(step 1\), 4 times"),
        ([0.1, 0.499], "good", "Within limits"),
        ([0.1, 0.5], "watch", r"Near the redline.*r = 0\.5 \(step 1\), and 1 of 2"),
        ([0.1, 0.999], "watch", "Near the redline"),
        ([0.1, 1.0], "bad", r"Over the redline: 1 of 2 measured steps.*r = 1 at step 1"),
        ([4.5, 0.6, 1.5], "bad", r"Over the redline: 2 of 3 measured steps.*r = 4\.5 at step 0"),
        ([0.0, 0.0], "good", "Within limits"),
    ],
)
def test_verdict_on_the_step_size(step_sizes: list[float], level: str, text: str):
    (verdict,) = report_of(step_sizes).verdicts
    assert verdict.level == level
    assert_matches(text, verdict.text)


def test_verdict_where_r_was_not_measured():
    (verdict,) = report_of(steps=10).verdicts
    assert verdict.level == "watch"
    assert_matches("not measured", verdict.text)


def test_verdict_on_a_run_without_a_step():
    (verdict,) = report_of(steps=0).verdicts
    assert verdict.level == "watch"
    assert_matches("No optimizer step", verdict.text)


def test_non_finite_readings_are_the_worst_and_come_first():
    report = report_of(
        [0.1],
        values={
            ("redline_nonfinite_total", "loss"): 2.0,
            ("redline_nonfinite_total", "gradient"): 3.0,
            ("redline_nonfinite_total", "weight"): 0.0,
        },
    )
    assert report.nonfinite == {"loss": 2, "gradient": 3, "weight": 0}
    assert report.verdicts[0].level == "bad"
    assert_matches("loss 2 times, gradient 3 times", report.verdicts[0].text)
    assert "weight" not in report.verdicts[0].text


@pytest.mark.parametrize("step_sizes", [[0.1, INF, 0.2], [0.1, NAN], [NAN, NAN], [INF]])
def test_a_run_whose_r_was_not_finite_is_never_called_good(step_sizes: list[float]):
    levels = {verdict.level for verdict in report_of(step_sizes).verdicts}
    assert levels & {"watch", "bad"}


# The rest ------------------------------------------------------------------------------------------------------------


def test_facts_of_the_run():
    report = report_of(
        [0.1] * 4,
        values={"redline_overhead_ratio": 0.02},
        courses={"redline_loss": [(0, 2.3), (1, 5.0), (3, 1.1)]},
        notes=("one thing",),
        seconds=8.0,
    )
    assert (report.run.run, report.steps, report.seconds) == ("run-1", 4, 8.0)
    assert (report.first_loss, report.last_loss) == (2.3, 1.1)
    assert report.overhead_ratio == 0.02
    assert report.notes == ("one thing",)


def test_what_was_not_observed_is_none():
    report = report_of(steps=3)
    assert report.first_loss is None
    assert report.last_loss is None
    assert report.step_sizes is None
    assert report.layers == ()


def test_steps_over_the_redline_that_were_held_are_told_from_those_that_were_not():
    held = report_of([0.1, 5.0], interventions=[Tally("Clamp", "scale", 1, 1, 1, "")])
    free = report_of([0.1, 5.0], interventions=[Tally("Guard", "withhold", 1, 1, 1, "")])
    assert [(one.level, one.text.split(":")[0]) for one in held.verdicts] == [("watch", "Over the redline, and held")]
    assert [(one.level, one.text.split(":")[0]) for one in free.verdicts] == [("bad", "Over the redline")]


BINDING, ACTIVATION = "redline_binding_step_size", "redline_activation_step_size"


def test_which_radius_binds_in_each_quarter():
    report = report_of(
        values={(ACTIVATION, "relu"): 0.3, (ACTIVATION, "relu#2"): 0.7, (ACTIVATION, "silu"): 0.5},
        courses={
            (BINDING, "output"): [(0, 0.1), (9, 0.2), (10, 0.9), (30, 0.5), (31, NAN), (39, INF)],
            (BINDING, "activation"): [(0, 0.4), (9, 0.1), (10, 0.8), (30, 0.6), (31, 0.9), (39, 0.7)],
        },
        steps=40,
    )
    output, activation = report.binding
    assert (output.radius, output.shares) == ("output", (0.5, 1.0, None, 0.5))
    assert (activation.radius, activation.shares) == ("activation", (0.5, 0.0, None, 0.5))
    assert (output.highest, output.highest_step, output.layer) == (0.9, 10, None)
    assert (activation.highest, activation.highest_step, activation.layer) == (0.9, 31, "relu#2")


def test_of_a_single_radius_nothing_is_said_to_bind():
    assert report_of(courses={(BINDING, "output"): [(0, 0.1)]}, steps=1).binding == ()


def test_the_report_is_plain_data():
    report = report_of(
        [0.1, NAN, 2.0],
        values={("redline_nonfinite_total", "loss"): 1.0},
        courses={("redline_weight_spectral_norm", "a"): [(0, 2.0)]},
        interventions=[Tally("Clamp", "scale", 2, 5, 9, "r = 3 was over 1.")],
        snapshots=[KeptSnapshot("Guard", 4, 1024, "host", False)],
    )
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["run"]["run"] == "run-1"
    assert plain["steps"] == 3
    assert plain["step_sizes"]["over"] == 1
    assert plain["layers"][0]["name"] == "a"
    assert plain["verdicts"][0]["level"] == "bad"
    assert plain["interventions"] == [
        {
            "controller": "Clamp",
            "action": "scale",
            "count": 2,
            "first_step": 5,
            "last_step": 9,
            "last_reason": "r = 3 was over 1.",
            "by_design": False,
        }
    ]
    assert plain["snapshots"][0]["bytes"] == 1024


# Of a real run -------------------------------------------------------------------------------------------------------


def train(sinks: Sequence[redline.Sink], steps: int = 12) -> tuple[StabilityReport, list[float]]:
    """The report of a short run, and the losses it observed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    x, y = torch.randn(16, 6), torch.randint(3, (16,))
    losses = []
    monitors = [redline.GhostRadius(every=1), redline.StepHealth(), redline.WeightSpectrum(every=4)]
    with redline.attach(model, optimizer, monitors=monitors, sinks=sinks) as session:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            session.observe(loss=loss)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return session.report(), losses


def test_the_report_of_a_run_sums_up_what_its_snapshots_showed():
    keep = Keep()
    report, losses = train([keep])
    sizes = report.step_sizes
    assert sizes is not None
    shown = [snapshot.value(R) for snapshot in keep.snapshots]
    assert (sizes.measured, report.steps) == (12, 12)
    assert sizes.median == pytest.approx(statistics.median(shown))
    assert sizes.highest == max(shown)
    assert sizes.highest_step == shown.index(max(shown))
    assert (sizes.samples, sizes.batch) == (16, 16)
    growth = {layer.name: layer.growth for layer in report.layers}
    for name, last in keep.snapshots[-1].layers("redline_weight_spectral_norm").items():
        assert growth[name] == pytest.approx(last / keep.snapshots[0].layers("redline_weight_spectral_norm")[name])
    assert report.first_loss == pytest.approx(losses[0])
    assert report.last_loss == pytest.approx(losses[-1])


def test_the_report_is_the_same_however_often_readings_were_fetched():
    often, losses = train([Keep(1)])
    seldom, _ = train([Keep(5)])
    never, _ = train([])
    assert often.step_sizes == seldom.step_sizes == never.step_sizes
    assert often.layers == seldom.layers == never.layers
    assert [report.last_loss for report in (often, seldom, never)] == pytest.approx([losses[-1]] * 3)


def test_the_first_loss_is_the_first_one_observed_even_if_nothing_was_shown_on_the_way():
    report, losses = train([])
    assert report.first_loss == pytest.approx(losses[0])
    assert report.last_loss == pytest.approx(losses[-1])
