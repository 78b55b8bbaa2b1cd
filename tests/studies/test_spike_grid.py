"""The spike grid's short form: what it shows, by thresholds of the tests' own."""

from __future__ import annotations

import pytest


def accuracy(page, **where):
    [one] = [one for one in page["results"] if all(one[name] == value for name, value in where.items())]
    return one["accuracy"]


@pytest.mark.parametrize("model", ["Transformer", "MLP+LN"])
@pytest.mark.parametrize("held", [False, True], ids=["one step", "held"])
def test_either_clamp_saves_a_run_that_dies_without(page, model, held):
    twin = accuracy(page, model=model, arm="plain", severity=1)
    where = {"model": model, "severity": 10_000, "held": held}
    assert twin > 0.9
    for arm in ("plain", "clip"):
        assert accuracy(page, arm=arm, **where) < twin - 0.2
    for arm in ("bound", "exact"):
        assert accuracy(page, arm=arm, **where) > twin - 0.03


def test_the_claims_hold_and_quote_what_was_measured(page):
    ruined, bound, exact, held = page["claims"]
    assert [ruined["verdict"], bound["verdict"], held["verdict"]] == ["holds"] * 3
    # To a point over the seeds of the long form; of one seed, accuracy spreads by more.
    assert exact["verdict"] != "does not hold here"
    found = accuracy(page, model="Transformer", arm="exact", severity=10_000, held=False)
    assert f"Transformer {found:.1%}" in exact["measured"]


def test_a_claim_that_does_not_hold_is_said_not_to(page, load_study):
    study = load_study("spike_grid").study
    ruined = [{**one, "accuracy": 0.1} if one["arm"] in ("exact", "sampled") else one for one in page["results"]]
    assert [one.verdict for one in study.claims(ruined)] == ["holds", "holds", "does not hold here", "holds in part"]
