"""Runs that need no protection, in their short form: the exact radius leaves them alone."""

from __future__ import annotations

import statistics

import pytest
import torch


def of(page, key, **where):
    return [one[key] for one in page["results"] if all(one[name] == value for name, value in where.items())]


@pytest.mark.parametrize("model", ["Transformer", "MLP+LN"])
@pytest.mark.parametrize("optimizer", ["Adam", "sign"])
def test_by_the_exact_radius_a_run_ends_as_without_a_clamp(page, model, optimizer):
    where = {"model": model, "optimizer": optimizer}
    plain, exact = (of(page, "accuracy", arm=arm, **where) for arm in ("plain", "exact"))
    assert len(plain) == len(exact) == 3
    # Of three seeds a standard deviation says little: a point and a half of accuracy is what these runs spread by.
    assert statistics.median(exact) > statistics.median(plain) - 0.015
    plain, exact = (of(page, "loss", arm=arm, **where) for arm in ("plain", "exact"))
    assert statistics.median(exact) < 1.5 * max(plain)


def test_the_exact_radius_shortens_fewer_steps_than_the_bound(page):
    shortened = {arm: sum(of(page, "shortened", arm=arm)) for arm in ("plain", "exact", "bound")}
    assert shortened["plain"] == 0 < shortened["exact"] < 0.6 * shortened["bound"]


def test_worse_is_counted_in_standard_deviations_of_plain_training(page, load_study):
    study = load_study("healthy_runs")
    losses = {"plain": [1.0, 2.0, 3.0], "exact": [4.0, 4.0, 5.0]}
    made = [
        {"model": "MLP+LN", "optimizer": "Adam", "arm": arm, "loss": loss, study.ACCURACY: 1 - loss / 10, "seed": seed}
        for arm, found in losses.items()
        for seed, loss in enumerate(found)
    ]
    for of_what in ("loss", study.ACCURACY):
        assert study.behind(made, of_what, "exact", model="MLP+LN", optimizer="Adam") == pytest.approx(2.0)


def test_the_sign_optimizer_steps_by_signs(load_study):
    parameter = torch.nn.Parameter(torch.tensor([1.0, 1.0, 1.0]))
    optimizer = load_study("spiked").SignMomentum([parameter], lr=0.1)
    for gradient in ([5.0, -1e-3, 0.0], [-1.0, -1e-3, 0.0]):
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
    # The average of the first gradients, 0.01 * 5, weighs 0.9 against 0.1 * -1: the second step goes up again.
    assert parameter.tolist() == pytest.approx([1.0, 1.2, 1.0])
