"""What r = 1 means: the accuracy of a trained model after one more step of a given r."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from redline.numerics import ghost_radius, logit_tangent


@pytest.fixture(scope="module", params=range(3))
def trained(request):
    """A linear softmax model, trained in full batches; the first fifth of the shuffled digits is the test set."""
    pixels, digits = load_digits(return_X_y=True)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(pixels / 16, dtype=torch.float32)[order], torch.tensor(digits)[order]
    held_out = len(y) // 5
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(request.param)
        model = nn.Linear(64, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.015)
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(model(x[held_out:]), y[held_out:]).backward()
        optimizer.step()
    optimizer.zero_grad()
    F.cross_entropy(model(x[held_out:]), y[held_out:]).backward()
    downhill = {name: -p.grad for name, p in model.named_parameters()}
    radius = float(ghost_radius(logit_tangent(model, (x[held_out:],), {}, downhill).tangent).min())

    def accuracy(r: float) -> float:
        """In percent, after one step along the negative gradient of normalized size ``r``."""
        moved = {name: p + r * radius * downhill[name] for name, p in model.named_parameters()}
        z = torch.func.functional_call(model, moved, (x[:held_out],))
        return 100 * float((z.argmax(-1) == y[:held_out]).double().mean())

    return accuracy


class TestDigits:
    """The paper's figure 1: below r = 1 no accuracy is lost, well above it is."""

    def test_it_is_trained(self, trained):
        assert trained(0.0) > 95

    @pytest.mark.parametrize("r", [0.1, 0.5, 0.9])
    def test_below_one_a_gradient_step_costs_less_than_half_a_point(self, trained, r):
        assert trained(r) > trained(0.0) - 0.5

    def test_at_ten_it_costs_at_least_four_points(self, trained):
        assert trained(10.0) <= trained(0.0) - 4
