"""r, tau and rho_a of real steps, against a float64 Jacobian of a copy of the model at theta_before."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from ghost_radius_runs import (
    BATCH,
    CASES,
    FALLBACKS,
    RHO,
    SAMPLES,
    TAU,
    R,
    loss_of,
    mlp,
    moved,
    spreads,
    vectors,
    watched_step,
)
from torch import nn

import redline
from redline import GhostRadius


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("name", CASES)
def test_r_tau_and_rho_of_real_steps(name, optimizer):
    build, inputs, method = CASES[name]
    model = build().train()
    rate = {"SGD": 0.5, "AdamW": 1e-2}[optimizer]
    optimizer = getattr(torch.optim, optimizer)(model.parameters(), lr=rate, weight_decay=0.1)
    with redline.attach(model, optimizer, monitors=[GhostRadius(every=1)]) as session:
        for _ in range(3):
            x = inputs()
            before, update = watched_step(session, model, optimizer, x)
            expected = float(spreads(before, x, update).max()) / math.pi
            tau = math.sqrt(sum(float(p.square().sum()) for p in update.values()))
            latest = session.latest
            assert latest.value(R) == pytest.approx(expected, rel=1e-4)
            assert latest.value(TAU) == pytest.approx(tau, rel=1e-5)
            assert latest.value(RHO) == pytest.approx(tau / expected, rel=1e-4)
            assert latest.value(SAMPLES) == latest.value(BATCH) == 12
        counted = {labels[0]: count for labels, count in latest.series(FALLBACKS).items() if count}
        assert counted == ({} if method == "forward_mode" else {method: 3})
        assert session.notes == ()


def test_two_optimizers_make_one_step():
    model = mlp()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.05),
        torch.optim.AdamW([p for p in model.parameters() if p.dim() < 2], lr=1e-2),
    ]
    with redline.attach(model, optimizers, monitors=[GhostRadius(every=1)]) as session:
        x = vectors()
        loss_of(model(x)).backward()
        before = copy.deepcopy(model)
        for optimizer in optimizers:
            optimizer.step()
        update = moved(before, model)
        assert session.latest.value(R) == pytest.approx(float(spreads(before, x, update).max()) / math.pi, rel=1e-4)


def test_parameters_outside_of_the_optimizer_stand_still():
    model = mlp()
    optimizer = torch.optim.SGD(model[4].parameters(), lr=0.5)
    with redline.attach(model, optimizer, monitors=[GhostRadius(every=1)]) as session:
        x = vectors()
        before, update = watched_step(session, model, optimizer, x)
        assert not update["0.weight"].any()
        assert session.latest.value(R) == pytest.approx(float(spreads(before, x, update).max()) / math.pi, rel=1e-4)


def test_one_logit_is_measured_against_zero():
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with redline.attach(model, optimizer, monitors=[GhostRadius(every=1)]) as session:
        x = vectors()
        before, update = watched_step(session, model, optimizer, x, lambda z: F.softplus(z).mean())
        two = spreads(before, x, update, lambda z: torch.cat([z, torch.zeros_like(z)], dim=-1))
        assert session.latest.value(R) == pytest.approx(float(two.max()) / math.pi, rel=1e-4)


def test_the_schedule_is_kept():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    at = []
    with redline.attach(model, optimizer, monitors=[GhostRadius(every=3)]) as session:
        for _ in range(7):
            watched_step(session, model, optimizer, vectors())
            at.append(session.latest.measured_at[redline.Series(R)])
        assert at == [0, 0, 0, 3, 3, 3, 6]
        assert session.latest.value("redline_measurements_total", monitor="GhostRadius") == 3
