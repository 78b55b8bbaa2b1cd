"""Softmax temperature: the study's spreads, and the onsets they are taken of."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from redline.integrations.demo.data import digits

TEMPERATURES = [0.25, 0.5, 1, 2, 4, 8]


def learned(page, how):
    return [one for one in page["results"] if one["learned"] == how]


def spread(one, onset):
    tau, radius = np.array(one[onset]), np.array(one["radius"])
    return np.log10(tau).std(), np.log10(tau / radius).std()


def test_r_brings_the_onsets_of_the_loss_together(page):
    assert len(learned(page, "once")) == 2
    for one in learned(page, "once"):
        in_tau, in_r = spread(one, "loss")
        assert 0.4 < in_tau < 1.3
        assert in_r < 0.5 * in_tau
        assert in_r < 0.35


def test_no_temperature_doubles_the_loss_below_the_radius(page):
    for one in page["results"]:
        assert all(tau >= radius for tau, radius in zip(one["loss"], one["radius"], strict=True))


def test_accuracy_does_not_follow_r(page, study):
    for one in learned(page, "once"):
        in_tau, in_r = spread(one, "accuracy")
        assert in_r > 0.4
        assert study.spreads(one, "accuracy") == pytest.approx((in_tau, in_r))
    assert page["claims"][1]["verdict"] == "does not hold here"


def test_both_protocols_are_one_at_temperature_one(page):
    for once, each in zip(learned(page, "once"), learned(page, "each"), strict=True):
        for of in ("radius", "loss", "accuracy"):
            assert once[of][2] == each[of][2]
            assert once[of] != each[of]


@pytest.mark.parametrize("k", [0, 5])
def test_the_onset_is_where_the_loss_at_this_temperature_has_doubled(page, load_study, slow_spread, k):
    temperature, shared = TEMPERATURES[k], load_study("architectures")
    [one] = [one for one in learned(page, "once") if one["architecture"] == "MLP"]
    x, y, _, _ = digits()
    torch.manual_seed(0)
    model = shared.ARCHITECTURES["MLP"]()
    shared.train(model, x, y, 100)
    model, x = model.double(), x.double()
    names = [name for name, _ in model.named_parameters()]
    gradients = torch.autograd.grad(F.cross_entropy(model(x) / temperature, y), list(model.parameters()))
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    direction = {name: -gradient / norm for name, gradient in zip(names, gradients, strict=True)}

    def loss(tau):
        moved = {name: p.detach() + tau * direction[name] for name, p in model.named_parameters()}
        return F.cross_entropy(functional_call(model, moved, (x,)) / temperature, y).item()

    # Of the logits that the softmax sees, the spread is Delta_a / T.
    assert one["radius"][k] == pytest.approx(math.pi / (slow_spread(model, x, direction) / temperature), rel=1e-3)
    assert loss(one["loss"][k]) > 2 * loss(0)
    assert loss(one["loss"][k] / 10 ** (1 / 20)) <= 2 * loss(0)


def test_verdicts_follow_the_figures(page, study):
    assert page["claims"][0]["verdict"] == "holds"
    doctored = copy.deepcopy(page["results"])
    for one in doctored:
        one["loss"] = [1.0 for _ in TEMPERATURES]  # the same tau at every T
        one["accuracy"] = [None for _ in TEMPERATURES]
    claims = study.claims(doctored)
    assert [claim.verdict for claim in claims] == ["does not hold here"] * 2
    assert study.table(doctored).rows[0][-1] == "no onset at some T"
    for one in doctored:
        one["accuracy"] = [2 * radius for radius in one["radius"]]
    assert study.claims(doctored)[1].verdict == "holds"
