"""Controllers on several ranks decide alike, whatever befalls one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import on_ranks
from rank_control import attached, budgeted, observed_at, one_rank_fails, resumed, spiked

WRAPPINGS = [("ddp", 2), ("ddp", 4), ("fsdp", 2), ("fsdp", 4)]


def assert_same(told: list[dict[str, Any]], *keys: str) -> None:
    first, *others = told
    for other in others:
        for key in keys:
            assert str(other[key]) == str(first[key]), key
        assert all(torch.equal(other["weights"][name], one) for name, one in first["weights"].items())


@pytest.mark.parametrize(
    ("kind", "how", "size"),
    [("clamp", *four) for four in WRAPPINGS]
    + [pytest.param("all", how, size, marks=[pytest.mark.slow] * (size > 2)) for how, size in WRAPPINGS]
    + [(kind, how, 2) for kind in ("sparing", "exact", "quantile") for how in ("ddp", "fsdp")],
)
def test_after_spikes_that_were_clamped_parameters_are_the_same_on_all_ranks(kind: str, how: str, size: int):
    told = on_ranks(spiked, size, how, kind)
    assert_same(told, "interventions")
    clamped = [step for controller, step, action, _ in told[0]["interventions"] if controller == "StepClamp"]
    assert {2, 5} <= set(clamped)


@pytest.mark.parametrize(("how", "size"), [("ddp", 4), ("fsdp", 2)])
def test_a_clamped_run_is_that_of_a_single_process(how: str, size: int):
    alone = spiked(0, "alone", "clamp")
    told = on_ranks(spiked, size, how, "clamp")[0]
    assert [one[:3] for one in told["interventions"]] == [one[:3] for one in alone["interventions"]]
    assert told["r"] == pytest.approx(alone["r"], rel=1e-3)
    for name, expected in alone["weights"].items():
        if expected.dim() > 1:  # Adam makes whole steps of the rounding that is the gradient of a key's bias
            assert (told["weights"][name] - expected).norm() < 1e-3 * expected.norm(), name


@pytest.mark.parametrize(("how", "size"), [("ddp", 2), ("fsdp", 2)])
@pytest.mark.parametrize("failure", ["nonfinite", "slow", "shorter", "unmeasured"])
def test_what_befalls_one_rank_parts_nobody(how: str, size: int, failure: str):
    told = on_ranks(one_rank_fails, size, how, failure)
    assert_same(told, "interventions", "samples")
    assert torch.isfinite(told[0]["weights"]["readout.weight"]).all()
    acted = [one[:3] for one in told[0]["interventions"]]
    if failure == "nonfinite":
        assert ("NonFiniteGuard", 3, "withhold") in acted
    if failure == "shorter":
        assert told[0]["samples"] == 7
    if failure == "unmeasured":
        assert "on another rank" in str(told[0]["notes"])
        assert "no logits on this rank" in str(told[1]["notes"])
    else:
        assert ("StepClamp", 4, "scale") in acted


@pytest.mark.parametrize("size", [2, 4])
def test_a_budget_stretches_schedules_alike(size: int):
    paid = [0, 20, 39, 59]  # half of 0.1 s a step pays for 0.97 s, which rank 1 alone spends, in 19.4 steps
    assert on_ranks(budgeted, size) == [paid] * size


@pytest.mark.parametrize(
    ("which", "said"),
    [
        ("alone", "attached on 1 of 2 ranks; expected on all"),
        ("parameters", "other parameters"),
        ("monitors", "other monitors, controllers"),
        ("settings", "other monitors, controllers"),
        ("budget", "other monitors, controllers or overhead_budget"),
        ("steps", "ranks at different steps (0, 7)"),
    ],
)
def test_ranks_that_do_not_do_the_same_are_told_so(which: str, said: str):
    assert said in on_ranks(attached, 2, which)[0]


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_checkpoint_of_four_ranks_is_resumed_on_two(how: str, tmp_path: Path):
    saved = on_ranks(resumed, 4, how, str(tmp_path), 5, 0)
    assert_same(saved, "controllers")
    more = on_ranks(resumed, 2, how, str(tmp_path), 5, 0)
    assert_same(more, "controllers")
    assert str(more[0]["controllers"]) == str(saved[0]["controllers"])
    assert_same(more, "steps")
    further = on_ranks(resumed, 2, how, str(tmp_path), 5, 4)
    assert_same(further, "controllers", "steps")
    assert further[0]["steps"] == 9


def test_a_loss_that_is_observed_at_some_steps_is_none_at_the_others():
    alone = observed_at(0, [0, 4, 8])
    assert alone["nonfinite"] == 0
    for told in on_ranks(observed_at, 2, [0, 4, 8]):
        assert told["losses"] == pytest.approx(alone["losses"], rel=1e-4)
        assert told["nonfinite"] == 0
        assert told["interventions"] == alone["interventions"]
