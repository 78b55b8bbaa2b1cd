"""The study of steady spectra: its short form, what it measures against float64, its claims on made-up runs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

NARROW, WIDE = 32, 128
Result = dict[str, Any]


@pytest.fixture(scope="module")
def script(load_study: Callable[[str], ModuleType]) -> ModuleType:
    return load_study("steady_spectra")


def figures(claims: list[Any], about: str) -> tuple[str, list[float]]:
    """Verdict and figures of the one claim whose words contain these."""
    (claim,) = (one if isinstance(one, dict) else vars(one) for one in claims if about in str(one))
    return claim["verdict"], [float(figure) for figure in re.findall(r"\d+\.\d+", claim["measured"])]


def typical(results: list[Result], **where: Any) -> float:
    """The geometric mean of sigma_1 over all matrices of the one run of which all these hold."""
    (one,) = (one for one in results if all(one[name] == value for name, value in where.items()))
    return float(np.exp(np.log(list(one["sigma"].values())).mean()))


def test_every_run_had_the_rates_of_its_anchor_and_lasted_several_decay_times(page: dict[str, Any]) -> None:
    for one in page["results"]:
        scale = one["anchor"] / NARROW
        assert one["lr"] == pytest.approx(0.03 / scale * one["lr_times"])
        assert one["wd"] == pytest.approx(0.5 * math.sqrt(scale) * one["wd_times"])
        assert one["steps"] == pytest.approx(one["decay_times"] / min(one["lr"] * one["wd"], 0.015), abs=1)
        assert len(one["sigma"]) == len(one["frobenius"]) == 14


def test_short_runs_settle_and_the_exponents_have_the_published_ones_in_reach(page: dict[str, Any]) -> None:
    """Shorter runs of narrower models: sigma_1 follows lr / wd less closely than in the long form."""
    assert len(page["claims"]) == 5
    assert 0.9 < figures(page["claims"], "steady state")[1][-1] < 1.1
    _, (lr_alone, _, _, wd_alone, *_) = figures(page["claims"], "sqrt(lr / wd)")
    assert 0.25 < lr_alone < 0.6
    assert 0.3 < wd_alone < 0.6
    _, (narrow, _, _, middle, _, _, wide, *_) = figures(page["claims"], "d^0.75")
    assert all(0.45 < exponent < 1 for exponent in (narrow, middle, wide))


def test_with_the_rule_top_singular_values_move_far_less_in_width(page: dict[str, Any]) -> None:
    ruled = {d: typical(page["results"], width=d, anchor=d, lr_times=1, wd_times=1) for d in (NARROW, WIDE)}
    plain = {d: typical(page["results"], width=d, anchor=NARROW, lr_times=1, wd_times=1) for d in (NARROW, WIDE)}
    assert 0.8 < ruled[WIDE] / ruled[NARROW] < 1.35
    assert plain[WIDE] / plain[NARROW] > 2


def test_what_is_recorded_is_the_top_singular_value_of_the_same_weights(script: ModuleType) -> None:
    case = {"width": NARROW, "anchor": 64, "lr_times": 1.0, "wd_times": 2.0, "seed": 3, "decay_times": 0.5}
    model, measured = script.train(**case)
    kept = script.run(**case)
    for name, sigma in measured["sigma"].items():
        singular = torch.linalg.svdvals(model.get_parameter(f"{name}.weight").detach().double())
        assert sigma[-1] == pytest.approx(singular[0].item(), rel=1e-4)
        assert measured["frobenius"][name][-1] == pytest.approx(singular.square().sum().sqrt().item(), rel=1e-4)
        assert kept["sigma"][name] == pytest.approx(np.mean(sigma[12:]), rel=1e-4)
        assert kept["drift"][name] == pytest.approx(np.mean(sigma[12:]) / np.mean(sigma[8:12]), rel=1e-3)


def made_up(script: ModuleType, law: Callable[[float, int], float]) -> list[Result]:
    """Results of the long form, had sigma_1 followed a law in lr / wd and d, with a factor for each matrix."""
    names = [f"blocks.{block}.{kind}" for block in range(2) for kind in script.KINDS]
    results = []
    for case in script.cases(False):
        scale = case["anchor"] / NARROW
        lr, wd = 0.03 / scale * case["lr_times"], 0.5 * scale**0.5 * case["wd_times"]
        sigma = {name: (1 + k / 10) * law(lr / wd, case["width"]) for k, name in enumerate(names)}
        outcome = {"lr": lr, "wd": wd, "steps": round(5 / lr / wd), "loss": [2.0] * 16, "course": [1.0] * 16}
        results.append({**case, **outcome, "sigma": sigma, "frobenius": sigma, "drift": dict.fromkeys(names, 1.0)})
    return results


def test_claims_hold_where_runs_follow_the_published_law_and_not_where_they_do_not(script: ModuleType) -> None:
    published = script.claims(made_up(script, lambda lr_wd, d: 3 * lr_wd**0.5 * d**0.75))
    verdict, found = figures(published, "sqrt(lr / wd)")
    assert (verdict, set(found)) == ("holds", {0.5})
    verdict, found = figures(published, "d^0.75")
    assert (verdict, found) == ("holds", [0.75] * 12 + [0.25] * 2)
    verdict, found = figures(published, "across widths")
    assert (verdict, found) == ("holds", [1.0] * 9 + [4.76] * 3)  # 8^0.75 = 4.757
    other = script.claims(made_up(script, lambda lr_wd, d: lr_wd**0.2 * d**0.9))
    assert figures(other, "sqrt(lr / wd)") == ("does not hold here", [0.2] * 12)
    assert figures(other, "d^0.75")[1] == [0.9] * 12 + [0.4] * 2
    assert [one.verdict for one in other][1:4] == ["does not hold here"] * 3
