"""A rate a thousand times too high for good, in its short form."""

from __future__ import annotations

import statistics

import pytest


def ends(page, rate, arm):
    return statistics.median(one["course"][-1] for one in page["results"] if (one["rate"], one["arm"]) == (rate, arm))


def test_plain_adam_recovers_at_the_lowest_rate_and_is_at_chance_at_the_highest(page):
    assert ends(page, 1e-4, "plain") > 0.85
    assert ends(page, 1e-2, "plain") < 0.2


@pytest.mark.parametrize("rate", [1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("arm", ["bound", "exact"])
def test_clamped_it_survives_at_every_rate(page, rate, arm):
    assert ends(page, rate, arm) > 0.85


def test_until_the_spike_nothing_differs_but_for_steps_that_were_too_long(page):
    for rate in (1e-4, 1e-3):
        courses = [one["course"][:10] for one in page["results"] if one["rate"] == rate and one["seed"] == 0]
        assert courses[0] == courses[2], "the exact radius leaves ordinary steps alone"
    assert len(page["results"][0]["course"]) == 40
