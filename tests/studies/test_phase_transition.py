"""One gradient step on six architectures: the study's figures, and the step it takes."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from redline.integrations.demo.data import digits


def trained(load_study, name):
    shared = load_study("architectures")
    x, y, _, _ = digits()
    torch.manual_seed(0)
    model = shared.ARCHITECTURES[name]()
    shared.train(model, x, y, 100)
    return model, x, y


def test_no_architecture_loses_accuracy_below_the_radius(page, study):
    assert len({one["architecture"] for one in page["results"]}) == 6
    for one in page["results"]:
        below = [accuracy for r, accuracy in zip(study.GRID, one["accuracy"], strict=True) if r < 1]
        assert len(below) == 12
        assert one["before"] > 0.9
        assert min(below) > one["before"] - 0.03, one["architecture"]
        assert max(ratio for r, ratio in zip(study.GRID, one["loss_ratio"], strict=True) if r < 1) < 1.3


def test_a_step_far_beyond_the_radius_breaks_every_one(page):
    for one in page["results"]:
        assert one["accuracy"][-1] < one["before"] - 0.1, one["architecture"]
        assert one["loss_ratio"][-1] > 5


def test_short_steps_follow_the_gradient_down(page, load_study):
    [mlp] = [one for one in page["results"] if one["architecture"] == "MLP"]
    model, x, y = trained(load_study, "MLP")
    loss = F.cross_entropy(model(x), y)
    slope = torch.nn.utils.get_total_norm(torch.autograd.grad(loss, list(model.parameters()))).item()
    tau = 0.01 * mlp["radius"]
    assert mlp["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert (1 - mlp["loss_ratio"][0]) * mlp["loss"] == pytest.approx(slope * tau, rel=0.2)


@pytest.mark.parametrize("name", ["linear", "MLP"])
def test_radius_is_pi_over_the_spread_along_the_gradient(page, load_study, slow_spread, name):
    [one] = [one for one in page["results"] if one["architecture"] == name]
    model, x, y = trained(load_study, name)
    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    names = [parameter for parameter, _ in model.named_parameters()]
    direction = {key: -gradient / norm for key, gradient in zip(names, gradients, strict=True)}
    assert one["radius"] == pytest.approx(math.pi / slow_spread(model, x, direction), rel=1e-3)


def test_batchnorm_is_measured_in_train_mode_and_left_alone(load_study):
    steps = load_study("one_step")
    x, y, _, _ = digits()
    torch.manual_seed(0)
    model = load_study("architectures").ARCHITECTURES["CNN+BN"]()
    before = copy.deepcopy(model.state_dict())
    direction = steps.descent(model, x, y)
    rho = steps.radius(model, x, direction)
    moved = steps.logits_after(model, x, direction, 0.0)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    z, tangent = torch.func.jvp(
        lambda p: torch.func.functional_call(model, {**p, **{k: b.clone() for k, b in buffers.items()}}, (x,)),
        (parameters,),
        (direction,),
    )
    assert rho == pytest.approx(math.pi / (tangent.amax(-1) - tangent.amin(-1)).max().item(), rel=1e-4)
    torch.testing.assert_close(moved, z)


def test_verdicts_follow_the_figures(page, study):
    assert page["claims"][0]["verdict"] == "holds"
    doctored = copy.deepcopy(page["results"])
    for one in doctored:
        one["accuracy"] = [0.5 for _ in one["accuracy"]]
    assert [claim.verdict for claim in study.claims(doctored)] == ["does not hold here"] * 3
    for one in doctored:
        one["accuracy"] = [one["before"] - (0.1 if r >= 1 else 0.0) for r in study.GRID]
    assert [claim.verdict for claim in study.claims(doctored)] == ["holds"] * 3
