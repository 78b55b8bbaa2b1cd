"""However short or long the step: of length 0, and not finite, among them."""

from __future__ import annotations

import math

import pytest
import torch
from ghost_radius_runs import CLASSES, RHO, TAU, R, mlp, spreads, vectors, watched_step
from torch import nn

import redline
from redline import GhostRadius


@pytest.mark.parametrize("rate", [1e-7, 1e4])
def test_very_short_and_very_long_steps(rate):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    with redline.attach(model, optimizer, monitors=[GhostRadius(every=1)]) as session:
        x = vectors()
        before, update = watched_step(session, model, optimizer, x)
        assert session.latest.value(R) == pytest.approx(float(spreads(before, x, update).max()) / math.pi, rel=1e-4)


@pytest.mark.parametrize("rate", [0.1, 1e-3, 1e-5])
def test_a_model_of_which_only_zero_biases_are_trained(rate):
    model = nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, CLASSES))
    nn.init.zeros_(model[2].bias)
    model.requires_grad_(False)
    model[2].bias.requires_grad_(True)
    optimizer = torch.optim.SGD([model[2].bias], lr=rate)
    with redline.attach(model, optimizer, monitors=[GhostRadius(every=1)]) as session:
        for _ in range(2):
            _, update = watched_step(session, model, optimizer, vectors())
            moved = update["2.bias"]
            expected = float(moved.max() - moved.min()) / math.pi  # each logit moves by its own bias
            assert session.latest.value(R) == pytest.approx(expected, rel=1e-3)


def test_a_step_of_length_0_has_r_0_and_no_ghost():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with redline.attach(model, optimizer, monitors=[GhostRadius(every=1)]) as session:
        watched_step(session, model, optimizer, vectors())
        assert session.latest.value(R) == session.latest.value(TAU) == 0
        assert session.latest.value(RHO) == math.inf


def test_a_step_that_is_not_finite_is_counted_and_shown_as_nan():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=math.nan)
    with redline.attach(model, optimizer, monitors=[GhostRadius(every=1)]) as session:
        watched_step(session, model, optimizer, vectors())
        for metric in (R, RHO, TAU):
            assert math.isnan(session.latest.value(metric))
        assert session.latest.value("redline_nonfinite_total", source="update") == 1
