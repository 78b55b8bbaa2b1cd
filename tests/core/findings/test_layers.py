"""Rules on layers: what stands out, what does not, and how it is named."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from reports import Key, report_of

from redline.findings.layers import layer_grew_alone, layer_pushed_hard, stable_rank_collapsed
from redline.findings.thresholds import HARD_PUSH
from redline.report import StabilityReport

STEPS = 1000


def grown(growth: Mapping[str, float], condition: Mapping[str, float] | None = None) -> StabilityReport:
    """Each layer's sigma_1 from 1 to its growth; its spectral condition is the same unless given."""
    conditions = condition or growth
    return report_of(
        STEPS,
        courses={("redline_weight_spectral_norm", name): [(0, 1.0), (950, last)] for name, last in growth.items()},
        values={("redline_weight_spectral_condition", name): last for name, last in conditions.items()},
    )


def test_a_layer_that_outgrew_the_others_is_named():
    found = layer_grew_alone(grown({"a": 1.0, "b": 1.1, "c": 1.2, "head": 9.0}))
    assert found is not None
    assert found.level == "watch"
    assert "head ×9 to σ₁ = 9;" in found.seen
    assert "a ×" not in found.seen


def test_layers_that_grew_together_do_not_stand_out():
    assert layer_grew_alone(grown({"a": 6.0, "b": 7.0, "c": 8.0, "d": 9.0})) is None


def test_a_layer_that_started_small_and_came_up_to_the_others_is_healthy():
    growth = {"a": 1.0, "b": 1.1, "c": 1.2, "head": 9.0}
    assert layer_grew_alone(grown(growth, {"a": 2.0, "b": 2.0, "c": 2.0, "head": 8.0})) is None
    assert layer_grew_alone(grown(growth, {"a": 2.0, "b": 2.0, "c": 2.0, "head": 8.1})) is not None


@pytest.mark.parametrize(("others", "most"), [(1.0, 4.0), (2.0, 8.0), (0.5, 3.0)])
def test_growth_up_to_four_times_the_others_and_at_least_three_is_no_finding(others: float, most: float):
    layers, strong = {"a": others, "b": others, "c": others}, {"a": 1.0, "b": 1.0, "c": 1.0, "d": 9.0}
    assert layer_grew_alone(grown({**layers, "d": most}, strong)) is None
    assert layer_grew_alone(grown({**layers, "d": 1.03 * most}, strong)) is not None


@pytest.mark.parametrize("name", ["net.position", "embedding.weight", "transformer.wte.weight", "Embed.0"])
def test_tables_of_tokens_and_positions_are_left_out(name: str):
    assert layer_grew_alone(grown({"a": 1.0, "b": 1.1, "c": 1.2, name: 9.0})) is None
    assert stable_rank_collapsed(ranked(12.0, 1.2, name)) is None


def test_of_two_layers_none_stands_out():
    assert layer_grew_alone(grown({"a": 1.0, "b": 50.0})) is None


def test_layers_without_figures_are_passed_over():
    zero = grown({"a": 1.0, "b": 1.0, "c": 1.0, "d": 9.0, "e": float("nan")})
    assert layer_grew_alone(zero) is not None
    assert "e ×" not in layer_grew_alone(zero).seen


def test_the_three_that_grew_most_are_named_and_others_counted():
    layers = {f"calm{k}": 1.0 for k in range(9)} | {"p": 5.0, "q": 8.0, "s": 7.0, "t": 6.0}
    seen = layer_grew_alone(grown(layers)).seen
    assert "q ×8 to σ₁ = 8, s ×7 to σ₁ = 7, t ×6 to σ₁ = 6, and 1 more;" in seen


# Updates -------------------------------------------------------------------------------------------------------------


def pushed(step: int, ratio: float) -> StabilityReport:
    courses: dict[Key, list[tuple[int, float]]] = {
        ("redline_weight_spectral_norm", "a"): [(0, 1.0), (950, 1.0)],
        ("redline_update_to_weight_ratio", "a"): [(0, 0.01), (step, ratio)],
    }
    return report_of(STEPS, courses=courses)


def test_a_layer_pushed_harder_than_it_is_strong_is_bad():
    found = layer_pushed_hard(pushed(500, 2.5))
    assert found is not None
    assert found.level == "bad"
    assert "a by 2.5 at step 500" in found.seen


def test_what_healthy_runs_do_is_no_finding():
    assert layer_pushed_hard(pushed(500, 0.99 * HARD_PUSH)) is None
    assert layer_pushed_hard(pushed(50, 2.5)) is None  # matrices that start near zero


# Stable rank ---------------------------------------------------------------------------------------------------------


def ranked(first: float, last: float, name: str = "a") -> StabilityReport:
    courses: dict[Key, list[tuple[int, float]]] = {
        ("redline_weight_spectral_norm", name): [(0, 1.0), (950, 1.0)],
        ("redline_weight_stable_rank", name): [(0, first), (950, last)],
    }
    return report_of(STEPS, courses=courses, values={("redline_weight_stable_rank", name): last})


def test_a_stable_rank_that_fell_towards_one_is_named():
    found = stable_rank_collapsed(ranked(12.0, 1.2))
    assert found is not None
    assert (found.level, "a from 12 to 1.2" in found.seen) == ("watch", True)


def test_ranks_that_started_low_or_stayed_up_are_no_finding():
    assert stable_rank_collapsed(ranked(1.9, 1.0)) is None  # a head of two classes
    assert stable_rank_collapsed(ranked(12.0, 1.6)) is None
    assert stable_rank_collapsed(report_of(STEPS)) is None
