"""How short the bound is, in the study's short form and against two classes' closed form."""

from __future__ import annotations

import math
import statistics

import pytest
import torch


def test_the_bound_is_one(page):
    trained = [one for one in page["results"] if one["kind"] == "training"]
    assert len({(one["model"], one["optimizer"]) for one in trained}) == 9
    for one in trained:
        assert len(one["course"]) == 5
        for _, r, exact, _ in one["course"]:
            assert 0 <= exact <= r * (1 + 1e-4)
    for one in page["results"]:
        assert min(one.get("ratios", [1])) >= 1 - 1e-6


def test_on_random_logits_it_grows_with_the_classes(page):
    medians = [statistics.median(one["ratios"]) for one in page["results"] if one["kind"] == "random"]
    assert medians == sorted(medians)
    assert 1 < medians[0] < 1.3
    assert 2 < medians[2] < 5


def test_two_classes_agree_with_the_closed_form(load_study):
    found = load_study("conservatism").random_logits(2, 0, 50)["ratios"]
    generator = torch.Generator().manual_seed(0)
    z, _ = (torch.randn(50, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    gaps = (z[:, 0] - z[:, 1]).tolist()
    assert found == pytest.approx([math.hypot(gap, math.pi) / math.pi for gap in gaps], rel=1e-4)


def test_fewer_steps_are_over_the_exact_radius_than_over_the_bound(page):
    steps = [(r, exact) for one in page["results"] if one["kind"] == "training" for _, r, exact, _ in one["course"]]
    assert 0 <= sum(exact >= 1 for _, exact in steps) < sum(r >= 1 for r, _ in steps)
