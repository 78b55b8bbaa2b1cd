"""RadiusLR: each step is as long as asked, in radii, whatever the optimizers proposed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from bits import frozen
from radius_lr_runs import COMMITTED, EVERY_MODEL, EVERY_OPTIMIZER, SCALE, R, Run, bare_sgd, batch, prepared, unlimited
from step_lengths import assert_scaled, reference
from torch import nn
from torch.optim import Optimizer
from torch_optimizers import muon_and_adamw

from redline import GhostRadius, RadiusLR


@EVERY_OPTIMIZER
@EVERY_MODEL
@pytest.mark.parametrize("rate", [1e-2, 1.0, 1e3], ids=["far shorter", "as it was", "far longer"])
@pytest.mark.parametrize("r", [0.3, 1.0])
def test_the_committed_step_is_of_the_length_asked_for(
    optimizers: Callable[[nn.Module], list[Optimizer]], model: Callable[[], nn.Module], rate: float, r: float
) -> None:
    alone, run = (prepared(optimizers, model).times_rate(rate) for _ in range(2))
    before = run.parameters
    torch.manual_seed(5)
    alone.step(3)
    torch.manual_seed(5)
    with run.attach(unlimited(r, max_samples=None), monitors=[GhostRadius(1, max_samples=None)]) as session:
        run.step(3)
        latest = session.latest
    x = batch(3)[0]
    proposed = reference(alone.model, before, alone.parameters, x)
    assert reference(run.model, before, run.parameters, x) == pytest.approx(r, rel=1e-3)
    assert proposed / r > 10 or rate <= 1
    assert proposed / r < 0.1 or rate >= 1
    (one,) = session.interventions
    assert (one.step, one.controller, one.action) == (0, "RadiusLR", "scale")
    assert one.saw["r"] == pytest.approx(proposed, rel=1e-4)
    assert one.saw["scale"] == pytest.approx(r / proposed, rel=1e-4)
    assert one.saw["brought"] == pytest.approx(r, rel=1e-5)
    norm = math.sqrt(sum(float((alone.parameters[n].double() - before[n].double()).square().sum()) for n in before))
    assert one.saw["update_norm"] == pytest.approx(norm, rel=1e-4)
    assert one.reason == (
        f"r = {one.saw['r']:.3g} was brought to {r:.3g}: the step was scaled by {one.saw['scale']:.3g}."
    )
    assert_scaled(run.parameters, before, alone.parameters, one.saw["scale"])
    assert frozen([o.state_dict() for o in run.optimizers]) == frozen([o.state_dict() for o in alone.optimizers])
    assert frozen(dict(run.model.named_buffers())) == frozen(dict(alone.model.named_buffers()))
    assert latest.value(R) == pytest.approx(proposed, rel=1e-4), "r is of the step as proposed"
    assert latest.value(COMMITTED) == pytest.approx(r, rel=1e-5)
    assert latest.value(SCALE) == one.saw["scale"]


@EVERY_OPTIMIZER
def test_every_step_of_a_run_is_of_that_length(optimizers: Callable[[nn.Module], list[Optimizer]]) -> None:
    """Under a schedule of rates that it does not care about."""
    run, r, longer = prepared(optimizers), 0.5, []
    with run.attach(unlimited(r)) as session:
        for seed in range(3, 13):
            run.times_rate(30 if seed % 2 else 1 / 30)
            before = run.parameters
            run.step(seed)
            assert reference(run.model, before, run.parameters, batch(seed)[0]) == pytest.approx(r, rel=1e-3)
            assert session.latest.value(COMMITTED) == pytest.approx(r, rel=1e-5)
            longer.append(session.latest.value(SCALE) > 1)
    assert 0 < sum(longer) < 10
    assert [one.step for one in session.interventions] == list(range(10)), "it tells of each"
    assert session.latest.value("redline_interventions_total", controller="RadiusLR", action="scale") == 10


@pytest.mark.parametrize("rate", [1e-3, 1e3])
@pytest.mark.parametrize("make", [unlimited, RadiusLR], ids=["without limits", "with them"])
def test_the_rate_in_the_groups_does_not_count(make: Callable[[float], RadiusLR], rate: float) -> None:
    """A factor of 1000 on it, under plain SGD: the same run to rounding."""
    run, other = Run(bare_sgd), Run(bare_sgd).times_rate(rate)
    with run.attach(make(0.5)) as first, other.attach(make(0.5)) as second:
        for seed in range(10):
            run.step(seed)
            other.step(seed)
            ratio = second.latest.value(SCALE) / first.latest.value(SCALE)
            assert ratio == pytest.approx(1 / rate, rel=1e-2)
    # p is a difference of parameters: of a step 1000 times shorter than the one committed, 3 digits fewer are left.
    size = max(float(parameter.abs().max()) for parameter in run.parameters.values())
    for name, parameter in run.parameters.items():
        torch.testing.assert_close(other.parameters[name], parameter, rtol=0, atol=max(1, 1 / rate) * 3e-6 * size)
    moved = max(
        float((p - q).abs().max()) for p, q in zip(run.model.parameters(), Run().model.parameters(), strict=True)
    )
    assert moved > 0.5


def test_the_share_of_one_group_against_another_stays() -> None:
    def optimizers(model: nn.Module) -> list[Optimizer]:
        first, *others = model.parameters()
        return [torch.optim.SGD([{"params": [first], "lr": 0.3}, {"params": others, "lr": 0.1}])]

    run = Run(optimizers)
    before = run.parameters
    with run.attach(unlimited()) as session:
        run.step(1)
    scale = session.latest.value(SCALE)
    for name, parameter in run.model.named_parameters():
        assert parameter.grad is not None
        lr = 0.3 if name == "0.weight" else 0.1
        torch.testing.assert_close(parameter.detach(), before[name] - scale * lr * parameter.grad)


def test_the_default_is_one_radius_by_the_maximum_of_32_samples() -> None:
    one = RadiusLR()
    assert (one.r, one.max_samples, one.max_update_to_weight, one.max_growth) == (1.0, 32, 0.3, 1.02)
    run = Run()
    before = run.parameters
    one = unlimited()
    with run.attach(one):
        run.step(1)
    assert reference(run.model, before, run.parameters, batch(1)[0]) == pytest.approx(1, rel=1e-3)


def test_a_step_that_is_of_that_length_already_is_left_as_it_is() -> None:
    probe = prepared()
    with probe.attach(unlimited()) as session:
        probe.step(3)
    alone, exact = prepared(), prepared()
    alone.step(3)
    with exact.attach(unlimited(session.interventions[0].saw["r"])) as session:
        exact.step(3)
    for name, parameter in exact.parameters.items():
        torch.testing.assert_close(parameter, alone.parameters[name], rtol=1e-6, atol=1e-7)
    assert session.latest.value(SCALE) == pytest.approx(1, abs=1e-6)


def test_a_step_by_one_optimizer_of_two_is_of_that_length_too() -> None:
    """The other was skipped: it ends with the next forward."""
    run = Run(muon_and_adamw)
    before = run.parameters
    with run.attach(unlimited(0.5)):
        run.backward(1)
        run.optimizers[0].step()
        run.model(batch(2)[0])
    assert reference(run.model, before, run.parameters, batch(1)[0]) == pytest.approx(0.5, rel=1e-3)


def test_under_accumulation_it_goes_by_the_last_micro_batch() -> None:
    run = Run()
    before = run.parameters
    with run.attach(unlimited(0.5)):
        for seed in (3, 4, 5):
            x, y = batch(seed)
            (F.cross_entropy(run.model(x), y) / 3).backward()
        run.update()
    each = [reference(run.model, before, run.parameters, batch(seed)[0]) for seed in (3, 4, 5)]
    assert each[-1] == pytest.approx(0.5, rel=1e-3)
    assert len({round(r, 2) for r in each}) > 1


def test_the_length_can_follow_a_schedule_of_the_users() -> None:
    """``r`` is a plain attribute."""
    run, control = Run(), unlimited(1.0)
    lengths: Sequence[float] = [1.0, 0.5, 0.25]
    with run.attach(control) as session:
        for seed, length in enumerate(lengths):
            control.r = length
            run.step(seed)
            assert session.latest.value(COMMITTED) == pytest.approx(length, rel=1e-5)
