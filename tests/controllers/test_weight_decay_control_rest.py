"""WeightDecayControl: where the spectra come to rest, and the feedback that takes them there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler
from weight_decay_runs import (
    BODY,
    EVERY_OPTIMIZER,
    HEAD,
    IN_FORCE,
    LAYERS,
    Feedback,
    Invariant,
    Run,
    adamw,
    true_sigma,
)

import redline
from redline import WeightDecayControl, WeightSpectrum

SIGMA = "redline_weight_spectral_norm"


# Runs to rest -----------------------------------------------------------------------------------------------------


def trained(
    width: int,
    lr: float,
    weight_decay: float,
    steps: int,
    *controllers: redline.Controller,
    monitors: Sequence[redline.Monitor] = (),
    schedule: Callable[[Optimizer], LRScheduler] | None = None,
) -> tuple[np.ndarray, redline.Session]:
    """``sigma_1`` of both layers at every tenth step, ``(steps / 10, 2)``, and the session, closed."""
    torch.manual_seed(0)
    model = Invariant(width)
    optimizer = torch.optim.AdamW(model.parameters(), lr, (0.9, 0.95), weight_decay=weight_decay, fused=True)
    scheduler = schedule(optimizer) if schedule else None
    generator = torch.Generator().manual_seed(1)
    found = []
    with redline.attach(model, optimizer, monitors=monitors, controllers=controllers) as session:
        for index in range(steps):
            x = torch.randn(32, width, generator=generator)
            y = torch.randint(0, 10, (32,), generator=generator)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            if scheduler is not None:
                scheduler.step()
            if index % 10 == 9:
                found.append([true_sigma(layer.weight) for layer in model.layers])
    return np.array(found), session


def end(sigmas: np.ndarray, share: float = 1 / 3) -> np.ndarray:
    """The mean over the last part of a run, a number a layer."""
    return sigmas[-int(share * len(sigmas)) :].mean(0)


def test_without_control_sigma_1_at_rest_goes_with_the_root_of_lr_over_wd() -> None:
    """The law of arXiv 2510.15262 that the control builds on."""
    points = [(0.005, 0.5), (0.01, 0.3), (0.02, 0.2), (0.03, 0.1), (0.05, 0.05), (0.1, 0.04)]
    ratios = np.array([lr / wd for lr, wd in points])
    assert ratios.max() / ratios.min() >= 30
    at_rest = []
    for lr, wd in points:
        sigmas, _ = trained(16, lr, wd, int(5 / (lr * wd)))
        quarter = len(sigmas) // 4
        third, last = sigmas[2 * quarter : 3 * quarter].mean(), sigmas[3 * quarter :].mean()
        assert third == pytest.approx(last, rel=0.07), "it is at rest"
        at_rest.append(end(sigmas, 1 / 2))
    for layer in range(2):
        exponent, _ = np.polyfit(np.log(ratios), np.log(np.array(at_rest)[:, layer]), 1)
        assert exponent == pytest.approx(0.5, abs=0.05)


def test_it_brings_three_widths_to_the_same_strength() -> None:
    target, widths = 4.0, (32, 64, 128)
    held, free, decays = [], [], []
    for width in widths:
        sigmas, session = trained(width, 0.01, 0.5, 1500, WeightDecayControl(dict.fromkeys(LAYERS, target)))
        held.append(end(sigmas))
        decays.append(list(session.latest.layers(IN_FORCE).values()))
        free.append(end(trained(width, 0.01, 0.5, 900)[0]))
    assert (np.max(held, 0) / np.min(held, 0) < 1.05).all()
    np.testing.assert_allclose(held, target, rtol=0.05)
    assert (np.max(free, 0) / np.min(free, 0) > 2).all(), "by themselves they part"
    assert (np.diff(decays, axis=0) > 0).all(), "the wider, the more decay that takes"


def test_it_holds_what_a_reference_run_came_to() -> None:
    sigmas, reference = trained(16, 0.02, 0.2, 1000, monitors=[WeightSpectrum(1)])
    target = reference.latest.layers(SIGMA)
    assert list(target) == LAYERS
    assert list(target.values()) == pytest.approx(list(sigmas[-1]), rel=1e-3)
    found, _ = trained(24, 0.01, 0.05, 1200, WeightDecayControl(target))
    np.testing.assert_allclose(end(found), list(target.values()), rtol=0.03)
    free, _ = trained(24, 0.01, 0.05, 1200)
    assert (np.abs(end(free) / list(target.values()) - 1) > 0.2).all()


def test_it_holds_a_matrix_where_it_stood_when_it_was_frozen() -> None:
    sigmas, _ = trained(16, 0.01, 0.05, 1000, WeightDecayControl(freeze_at=200))
    free, _ = trained(16, 0.01, 0.05, 1000)
    frozen_at = free[19]
    np.testing.assert_array_equal(sigmas[:20], free[:20])
    np.testing.assert_allclose(end(sigmas), frozen_at, rtol=0.03)
    assert (end(free) > 1.2 * frozen_at).all()


def test_it_holds_them_under_a_cosine_schedule_with_a_warm_up_from_zero() -> None:
    """From when they got there to where the rate is 0 again."""

    def schedule(optimizer: Optimizer) -> LRScheduler:
        return LambdaLR(optimizer, lambda k: min(k / 50, 0.5 * (1 + math.cos(math.pi * k / 1500))))

    control = WeightDecayControl(dict.fromkeys(LAYERS, 2.0))
    sigmas, session = trained(48, 0.005, 0.1, 1500, control, schedule=schedule)
    np.testing.assert_allclose(sigmas[60:], 2.0, rtol=0.07)
    np.testing.assert_allclose(end(sigmas), 2.0, rtol=0.03)
    assert all(math.isfinite(value) for one in session.interventions for value in one.saw.values())
    free, _ = trained(48, 0.005, 0.1, 1500, schedule=schedule)
    assert (np.abs(end(free) / 2 - 1) > 0.2).all()


def test_a_decay_at_a_bound_stays_there_and_is_read() -> None:
    for bounds, target, at in (((0.0, 0.6), 1.0, 0.6), ((0.3, 5.0), 9.0, 0.3)):
        control = WeightDecayControl(dict.fromkeys(LAYERS, target), bounds=bounds)
        sigmas, session = trained(16, 0.02, 0.5, 500, control)
        assert session.latest.layers(IN_FORCE) == pytest.approx(dict.fromkeys(LAYERS, at))
        assert [one.saw["weight_decay"] for one in session.interventions[3:]] == [pytest.approx(at)] * 22
        free, _ = trained(16, 0.02, at, 500)
        np.testing.assert_allclose(end(sigmas), end(free), rtol=0.1, err_msg="as with that decay in the groups")


# The feedback -----------------------------------------------------------------------------------------------------


def cosine(optimizer: Optimizer) -> LRScheduler:
    return CosineAnnealingLR(optimizer, 40)


def from_zero(optimizer: Optimizer) -> LRScheduler:
    """0 at the start, and 0 again in the midst."""
    return LambdaLR(optimizer, lambda step: [0.0, 0.0, 0.0, 0.0, 0.2, 0.6, 1.0, 1.5, 0.0, 0.3][step % 10])


@EVERY_OPTIMIZER
@pytest.mark.parametrize("schedule", [None, cosine, from_zero], ids=["constant", "cosine", "from zero"])
def test_the_decays_are_those_of_the_equation(
    optimizers: Callable[[nn.Module], list[Optimizer]], schedule: Callable[[Optimizer], LRScheduler] | None
) -> None:
    run, every, horizon, bounds = Run(optimizers), 3, 30, (0.02, 4.0)
    target = {BODY: 1.05, HEAD: 0.95}
    feedback = {
        name: Feedback(sigma, run.group_of(name)["weight_decay"], every, horizon, bounds)
        for name, sigma in target.items()
    }
    schedulers = [schedule(optimizer) for optimizer in run.optimizers] if schedule else []
    seen = set()
    with run.attach(WeightDecayControl(target, every=every, horizon=horizon, bounds=bounds)) as session:
        for index in range(32):
            before = run.parameters
            run.step(index)
            expected = {
                name: one.decide(index, before[name], float(run.group_of(name)["lr"])) for name, one in feedback.items()
            }
            assert run.in_force() == pytest.approx(expected, rel=2e-3, abs=2e-3)
            seen |= {round(value, 3) for value in expected.values()}
            for scheduler in schedulers:
                scheduler.step()
    assert len(seen) > 3
    assert [one.step for one in session.interventions] == list(range(0, 32, every))


def test_the_first_decision_takes_the_groups_decay_for_that_of_rest() -> None:
    """So that a matrix at its target keeps it, and another's is off by what is to shrink in the horizon."""
    run = Run()
    sigma = {name: true_sigma(run.parameters[name]) for name in (BODY, HEAD)}
    with run.attach(WeightDecayControl({BODY: sigma[BODY], HEAD: sigma[HEAD] / 2}, horizon=200)):
        run.step(0)
        decays = run.in_force()
    assert decays[BODY] == pytest.approx(0.3, rel=1e-4)
    assert decays[HEAD] == pytest.approx(0.3 + 0.75 / 200 / (2 * 2e-2), rel=1e-4)


@pytest.mark.parametrize("horizon", [50, 200])
def test_a_difference_from_the_target_shrinks_by_e_in_the_horizon(horizon: int) -> None:
    """Where nothing but the decay moves a matrix: its gradients are 0."""
    torch.manual_seed(0)
    model = nn.Linear(8, 8, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    x0 = true_sigma(model.weight) ** 2
    target = 0.6 * x0
    control = WeightDecayControl({"weight": target**0.5}, every=5, horizon=horizon)
    with redline.attach(model, optimizer, monitors=[], controllers=[control]):
        for index in range(1, 2 * horizon + 1):
            (0 * model(torch.ones(1, 8)).sum()).backward()
            optimizer.step()
            if index % horizon == 0:
                left = (true_sigma(model.weight) ** 2 - target) / (x0 - target)
                assert left == pytest.approx(math.exp(-index / horizon), rel=0.1)


def test_a_matrix_below_its_target_is_not_decayed_and_where_nothing_grows_nothing_is_made_to() -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 8, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, weight_decay=0.5)
    before = model.weight.detach().clone()
    with redline.attach(model, optimizer, monitors=[], controllers=[WeightDecayControl({"weight": 99.0})]) as session:
        for _ in range(30):
            (0 * model(torch.ones(1, 8)).sum()).backward()
            optimizer.step()
        assert session.latest.layers(IN_FORCE) == {"weight": 0.0}
    torch.testing.assert_close(model.weight.detach(), before, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bounds", [(0.05, 0.2), (0.5, 0.9)], ids=["below the group's", "above the group's"])
@pytest.mark.parametrize("first_rate", [0.02, 0.0])
def test_the_decay_is_within_its_bounds_at_every_step(bounds: tuple[float, float], first_rate: float) -> None:
    """The first as well, and where there is no rate to go by."""
    run = Run(partial(adamw, lr=first_rate))
    read = []
    with run.attach(WeightDecayControl({BODY: 0.1, HEAD: 9.0}, every=2, horizon=2, bounds=bounds)):
        for seed in range(8):
            run.step(seed)
            read.append(list(run.in_force().values()))
            for group in run.optimizers[0].param_groups:
                group["lr"] = 0.02
    assert bounds[0] * (1 - 1e-6) <= np.min(read) <= np.max(read) <= bounds[1] * (1 + 1e-6)
    assert np.min(read) == pytest.approx(bounds[0])
    assert np.max(read) == pytest.approx(bounds[1])
