"""r under autocast, and of parameters in half precision."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from ghost_radius_runs import CASES, R, loss_of, moved, spreads, watched_step

import redline
from redline import GhostRadius


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rates", [[0.1, 0.1], [0.1, 1e-6], [1e-6, 0.1]], ids=str)
@pytest.mark.parametrize("name", ["mlp", "transformer", "language model"])
def test_under_autocast_however_short_the_step(name, rates, dtype):
    build, inputs, _ = CASES[name]
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = redline.attach(model, optimizer, monitors=[GhostRadius(every=1)])
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        x = inputs()
        with torch.autocast("cpu", dtype=dtype):
            loss = loss_of(model(x))
        loss.backward()
        before = copy.deepcopy(model)
        optimizer.step()
        update = moved(before, model)
        assert session.latest.value(R) == pytest.approx(float(spreads(before, x, update).max()) / math.pi, rel=1e-2)
    session.close()


@pytest.mark.parametrize("name", ["mlp", "transformer"])
def test_bfloat16_parameters(name):
    build, inputs, _ = CASES[name]
    model = build().bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with redline.attach(model, optimizer, monitors=[GhostRadius(every=1)]) as session:
        x = inputs().bfloat16()
        before, update = watched_step(session, model, optimizer, x)
        assert session.latest.value(R) == pytest.approx(float(spreads(before, x, update).max()) / math.pi, rel=1e-2)
