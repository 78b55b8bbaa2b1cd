"""NonFiniteGuard: what it tells of gradients that were not finite."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from non_finite_guard_runs import Run, Spoil, batch, gradients_of
from torch import nn

from redline import Intervention


@pytest.mark.parametrize(
    ("spoil", "where", "norm"),
    [
        (gradients_of(math.nan, "norm.weight"), "1 of 6 parameters, the first norm.weight", math.nan),
        (
            gradients_of(math.inf, "head.weight", "body.bias", "norm.weight"),
            "3 of 6 parameters, the first body.bias, the last head.weight",
            math.inf,
        ),
        (gradients_of(3e38, "head.weight"), "their norm overflowed", math.inf),
    ],
)
def test_the_trace_names_the_layers(spoil: Spoil, where: str, norm: float) -> None:
    run = Run()
    with run.attach() as session:
        run.step(batch(1))
        run.step(batch(2), spoil)
        latest = session.latest
    (one,) = session.interventions
    expected = Intervention(
        1,
        "NonFiniteGuard",
        "withhold",
        f"the gradients were not finite ({where}): the step was withheld.",
        {"gradient_norm": norm, "in_a_row": 1.0},
    )
    assert repr(one) == repr(expected)  # NaN is not equal to itself
    assert latest.value("redline_interventions_total", controller="NonFiniteGuard", action="withhold") == 1
    assert latest.value("redline_step_scale") == 0


@pytest.mark.parametrize("others", [False, True])
@pytest.mark.filterwarnings("ignore:.*is in the optimizer but not in the model:redline.errors.RedlineWarning")
def test_a_gradient_outside_the_model_is_told_as_such(others: bool) -> None:
    """A loss with a temperature of its own: whether the model has gradients beside it or not."""
    run = Run()
    temperature = nn.Parameter(torch.ones(()))
    run.optimizers[0].add_param_group({"params": [temperature]})
    with run.attach() as session:
        if others:
            x, y = batch(1)
            F.cross_entropy(run.model(x), y).backward()
        temperature.grad = torch.tensor(math.nan)
        run.optimizers[0].step()
    assert float(temperature.detach()) == 1
    (one,) = session.interventions
    assert "outside the model" in one.reason, one.reason
