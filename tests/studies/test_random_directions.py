"""The gradient and random directions: the study's figures, and the directions it takes."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from redline.integrations.demo.data import digits


def test_no_direction_doubles_the_loss_below_the_radius(page, study):
    assert {one["phase"] for one in page["results"]} == {"early", "middle", "late"}
    for one in page["results"]:
        assert len(one["random"]["loss_ratio"]["turns"]) == one["directions"]
        for kind in ("gradient", "random"):
            largest = dict(zip(study.GRID, one[kind]["loss_ratio"]["largest"], strict=True))
            assert max(ratio for r, ratio in largest.items() if r < 1) < 2
            assert largest[100.0] > 10  # and far beyond it every one of them fails
            assert all(1 <= r <= 30 for r in one[kind]["loss_ratio"]["turns"])


def test_phases_are_of_one_training(page):
    loss = {one["phase"]: one["loss"] for one in page["results"]}
    assert loss["early"] > 5 * loss["middle"] > 25 * loss["late"]


def test_predictions_flip_sooner_the_earlier_in_training(page, study):
    at_one = {one["phase"]: one["random"]["flipped"]["median"][study.GRID.index(1.0)] for one in page["results"]}
    assert at_one["early"] > 0.3 > at_one["middle"] > 0.001 >= at_one["late"]


def test_the_gradient_goes_down_and_random_directions_go_nowhere(page):
    for one in page["results"]:
        down = 1 - one["gradient"]["loss_ratio"]["median"][0]
        assert down > 1e-3
        assert abs(1 - one["random"]["loss_ratio"]["median"][0]) < down / 2


def test_a_random_direction_has_norm_one_and_a_radius_of_its_own(load_study, slow_spread):
    steps, shared = load_study("one_step"), load_study("architectures")
    x, _, _, _ = digits()
    torch.manual_seed(1)
    model = shared.ARCHITECTURES["one-token transformer"]()
    radii = []
    for _ in range(2):
        direction = steps.unit({name: torch.randn_like(p) for name, p in model.named_parameters()})
        assert torch.cat([one.flatten() for one in direction.values()]).norm().item() == pytest.approx(1, rel=1e-5)
        radii.append(steps.radius(model, x, direction))
        assert radii[-1] == pytest.approx(math.pi / slow_spread(model, x, direction), rel=1e-3)
    assert radii[0] != pytest.approx(radii[1], rel=1e-3)


def test_the_first_point_that_exceeds_the_limit_is_the_turn(study):
    ratio = [1.0] * 10 + [2.5] + [1.5] * 5 + [9.0] * (len(study.GRID) - 16)
    flipped = [0.0] * len(study.GRID)
    found = study._summary([{"loss_ratio": ratio, "flipped": flipped}])
    assert found["loss_ratio"]["turns"] == [study.GRID[10]]
    assert found["flipped"]["turns"] == [None]


def test_verdicts_follow_the_figures(page, study):
    assert page["claims"][2]["verdict"] == "holds"
    doctored = copy.deepcopy(page["results"])
    for verdict, r in (("holds", 1.5), ("does not hold here", 0.1)):
        for one in doctored:
            for kind in ("gradient", "random"):
                for of in ("loss_ratio", "flipped"):
                    one[kind][of]["turns"] = [r for _ in one[kind][of]["turns"]]
        assert [claim.verdict for claim in study.claims(doctored)] == [verdict] * 3
