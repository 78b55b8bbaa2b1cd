"""UpdateClamp on matrices of every kind, and on steps of other kinds than one optimizer's whole one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bits import frozen
from torch import Tensor, nn
from torch.optim import Optimizer
from update_clamp_runs import (
    CEILING,
    EITHER_WAY,
    TOLERANCE,
    Decaying,
    Rate,
    Run,
    Stacks,
    adamw,
    assert_all_held,
    assert_held,
    batch,
    fan,
    limit_of,
    muon_and_adamw,
    net,
    plain,
    prepared,
    sgdw,
    top,
    whole,
)

import redline
import redline.spectrum_tracker
import redline.update_limits
from redline import UpdateClamp

# Matrices of every kind -------------------------------------------------------------------------------------------


def convolutions() -> nn.Module:
    return nn.ModuleDict(
        {
            "conv": nn.Conv2d(2, 6, 3),
            "up": nn.ConvTranspose2d(6, 4, 2, stride=2),
            "grouped": nn.Conv2d(4, 8, 3, groups=2),
            "line": nn.Conv1d(3, 5, 4),
            "line_up": nn.ConvTranspose1d(4, 6, 3, groups=2),
        }
    )


def turned(tensor: Tensor) -> list[Tensor]:
    return [tensor.transpose(0, 1).flatten(1)]


VIEWS: dict[Any, dict[str, Callable[[Tensor], list[Tensor]]]] = {
    convolutions: {
        "conv.weight": whole,
        "up.weight": turned,
        "grouped.weight": whole,
        "line.weight": whole,
        "line_up.weight": turned,
    },
    Stacks: {
        "experts": list,
        "heads": lambda tensor: list(tensor.flatten(0, 1)),
        "position": lambda tensor: [tensor[0]],
    },
}


@pytest.mark.parametrize("model", VIEWS)
@EITHER_WAY
def test_each_matrix_of_a_convolution_or_of_a_stack_is_held_by_itself(
    model: Callable[[], nn.Module], relative_to: Any
) -> None:
    """In a stack whose other matrices are under the limit these keep their bits."""
    run = Run(lambda model: [torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.5)], model)
    limit, over, started = 2.0 if relative_to == "fan" else 0.3, [], run.parameters
    with run.attach(UpdateClamp(limit, relative_to)) as session:
        for seed in range(12):
            sizes = torch.logspace(-2, 0, len(VIEWS[model])).roll(seed).tolist()
            run.give(seed, dict(zip(VIEWS[model], sizes, strict=True)))
            if model is Stacks:
                for name in ("experts", "heads"):
                    gradient = run.model.get_parameter(name).grad
                    gradient.view(-1, *gradient.shape[-2:])[seed % 3].mul_(30.0)  # type: ignore[union-attr]
            alone, before, rates = run.uncontrolled(), run.parameters, run.rates
            alone.update()
            run.update()
            own, actual = alone.parameters, run.parameters
            for name, before_it in before.items():
                if name not in VIEWS[model]:
                    assert frozen(actual[name]) == frozen(own[name])
                    continue
                view = VIEWS[model][name]
                for one in zip(view(before_it), view(own[name]), view(actual[name]), strict=True):
                    at_most = limit_of(one[0], limit, relative_to, rates[name])
                    over.append(assert_held(*one, at_most, rates[name].decay))
        expected = {
            f"{name}[{k}]" if len(view(started[name])) > 1 else name: max(top(one), limit * fan(one) / 0.5)
            for name, view in VIEWS[model].items()
            for k, one in enumerate(view(started[name]))
        }
        if relative_to == "fan":
            assert session.latest.layers(CEILING) == pytest.approx(expected, rel=2 * TOLERANCE)
    assert 0.1 * len(over) < sum(over) < 0.9 * len(over)


def test_each_matrix_of_a_stack_decays_and_is_capped_by_itself() -> None:
    """A controller puts decays of their own on some of them."""
    decays = {"experts[1]": 2.0, "experts[3]": 0.25, "heads[4]": 1.0}
    run = Run(lambda model: [torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.5)], Stacks)
    limit, started = 2.0, run.parameters
    with run.attach(UpdateClamp(limit, "fan"), Decaying(lambda index: decays)) as session:
        for seed in range(4):
            run.give(seed, {"": 10.0})
            alone, before = run.uncontrolled(), run.parameters
            alone.update()
            run.update()
            own, actual, ceilings = alone.parameters, run.parameters, session.latest.layers(CEILING)
            for name in ("experts", "heads"):
                view = VIEWS[Stacks][name]
                pairs = zip(view(before[name]), view(own[name]), view(actual[name]), view(started[name]), strict=True)
                for k, (before_it, own_it, actual_it, started_it) in enumerate(pairs):
                    rate = Rate(0.1, decays.get(f"{name}[{k}]", 0.5))
                    moved = own_it - (rate.decay - 0.05) * before_it  # the same update, the other decay
                    at_most = limit_of(before_it, limit, "fan", rate)
                    assert assert_held(before_it, moved, actual_it, at_most, rate.decay)
                    expected = max(top(started_it), limit * fan(before_it) / rate.weight_decay)
                    assert ceilings[f"{name}[{k}]"] == pytest.approx(expected, rel=2 * TOLERANCE)


@EITHER_WAY
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_in_other_precisions_it_is_held_to_rounding_and_what_is_under_keeps_its_bits(
    dtype: torch.dtype, relative_to: Any
) -> None:
    """A bfloat16 matrix rounds its update to 1 / 256 of the weight: at a low rate most of it."""
    limit = 1.5 if relative_to == "fan" else 0.2
    run = Run(lambda model: [torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.5)], lambda: plain().to(dtype))
    eps, over = torch.finfo(dtype).eps, []
    with run.attach(UpdateClamp(limit, relative_to)) as session:
        for seed in range(10):
            run.give(seed, {"0": 0.01 * 2**seed, "2": 5.0 / 2**seed})
            alone, before, rates = run.uncontrolled(), run.parameters, run.rates
            alone.update()
            run.update()
            for name, own in alone.parameters.items():
                actual = run.parameters[name]
                assert actual.dtype is dtype
                if own.dim() == 1:
                    assert frozen(actual) == frozen(own)
                    continue
                decay, at_most = rates[name].decay, limit_of(before[name], limit, relative_to, rates[name])
                proposed, committed = net(before[name], own, decay), net(before[name], actual, decay)
                over.append(top(proposed) > at_most)
                if top(proposed) <= at_most * (1 - 2 * TOLERANCE):
                    assert frozen(actual) == frozen(own)
                else:
                    expected = (1 - decay) * before[name].double() + proposed * min(1.0, at_most / top(proposed))
                    allowed = 2 * TOLERANCE * (proposed * at_most / top(proposed)).abs() + eps * expected.abs() / 2
                    assert bool(((actual.double() - expected).abs() <= allowed + 1e-7).all())
                    rounded = float(torch.linalg.norm(eps / 2 * actual.double()))
                    assert top(committed) <= at_most * (1 + TOLERANCE) + rounded
    assert 0 < sum(over) < len(over)
    assert session.notes == ()


def test_models_of_mixed_precision_are_held() -> None:
    def mixed() -> nn.Module:
        model = plain()
        model[0].double()
        model[2].bfloat16()
        return model

    run = Run(lambda model: [torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.5)], mixed)
    with run.attach(UpdateClamp(0.5, "fan"), UpdateClamp(0.1, "weight")) as session:
        for seed in range(3):
            run.give(seed, {"": 10.0})
            before, rates = run.parameters, run.rates
            run.update()
            for name in ("0.weight", "2.weight", "4.weight"):
                committed = net(before[name], run.parameters[name], rates[name].decay)
                slack = top(before[name]) / 100 if before[name].dtype is torch.bfloat16 else 0.0
                assert top(committed) <= 0.5 * 0.1 * fan(committed) * (1 + TOLERANCE) + slack
        assert set(session.latest.layers(CEILING)) == {"0.weight", "2.weight", "4.weight"}


# Steps of other kinds ---------------------------------------------------------------------------------------------


@EITHER_WAY
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_update_that_is_not_finite_is_left_to_guards_and_the_others_are_held(value: float, relative_to: Any) -> None:
    run = prepared(sgdw)
    run.give(1, {"": 50.0})
    run.model.get_parameter("2.weight").grad[0, 0] = value  # type: ignore[index]
    alone, before, rates = run.uncontrolled(), run.parameters, run.rates
    alone.update()
    with run.attach(UpdateClamp(0.5, relative_to)) as session:
        run.update()
        own, actual = alone.parameters, run.parameters
        assert frozen(actual["2.weight"]) == frozen(own["2.weight"])
        for name in ("0.weight", "4.weight"):
            at_most = limit_of(before[name], 0.5, relative_to, rates[name])
            assert assert_held(before[name], own[name], actual[name], at_most, rates[name].decay)
    (one,) = session.interventions
    assert one.saw["matrices"] == 2
    assert math.isfinite(one.saw["sigma"])


@EITHER_WAY
def test_a_rate_that_is_not_a_number_is_left_to_guards(relative_to: Any) -> None:
    alone, run = prepared(adamw), prepared(adamw)
    for one in (alone, run):
        one.optimizers[0].param_groups[0]["lr"] = math.nan
    alone.step(3)
    with run.attach(UpdateClamp(0.1, relative_to)) as session:
        run.step(3)
    assert run.everything == alone.everything
    assert session.interventions == ()


def test_of_what_a_guard_takes_back_or_withholds_nothing_is_told() -> None:
    run = prepared(adamw)
    with run.attach(UpdateClamp(0.5, "fan"), redline.NonFiniteGuard(restore_state=True)) as session:
        run.step(3)
        ceilings, before = session.latest.layers(CEILING), run.everything
        run.give(4, {"": 1e3})
        run.model.get_parameter("2.weight").grad[0, 0] = math.nan  # type: ignore[index]
        run.update()
        assert run.everything == before, "withheld"
        rate = run.optimizers[0].param_groups[0]["lr"]
        run.optimizers[0].param_groups[0]["lr"] = math.inf
        run.step(5)
        run.optimizers[0].param_groups[0]["lr"] = rate
        assert run.everything == before, "taken back"
        assert session.latest.layers(CEILING) == ceilings
        run.step(6)
    assert [(one.step, one.action) for one in session.interventions] == [
        (0, "scale"),
        (1, "withhold"),
        (2, "reject"),
        (3, "scale"),
    ]


@pytest.mark.parametrize("entry", [1e6, 1e18])
def test_an_update_may_be_as_large_as_it_likes(entry: float) -> None:
    """As long as the squares of its entries are finite."""
    run = Run(lambda model: [torch.optim.SGD(model.parameters(), 1.0, weight_decay=0.25)])
    run.give(1, {"2.weight": 0.0})
    run.model.get_parameter("2.weight").grad.fill_(entry)  # type: ignore[union-attr]
    before = run.parameters["2.weight"]
    with run.attach(UpdateClamp(1.0, "fan")):
        run.update()
    assert top(net(before, run.parameters["2.weight"], 0.25)) <= fan(before) * (1 + TOLERANCE)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_grad_scaler_skips_stays_skipped_and_the_others_are_held(fused: bool) -> None:
    """Also where the matrix is so strong that its decay alone, which is not applied, would be over the limit."""

    def optimizers(model: nn.Module) -> list[Optimizer]:
        return [torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.5, fused=fused)]

    def strong() -> nn.Module:
        model = plain()
        model.get_parameter("2.weight").data.mul_(10.0)
        return model

    def step(one: Run, scaler: torch.amp.GradScaler, seed: int, overflow: bool) -> None:
        one.optimizers[0].zero_grad()
        x, y = batch(seed)
        scaler.scale(F.cross_entropy(one.model(x), y)).backward()
        if overflow:
            next(one.model.parameters()).grad.fill_(math.inf)  # type: ignore[union-attr]
        scaler.step(one.optimizers[0])
        scaler.update()

    limit, run = 0.5, Run(optimizers, strong)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with run.attach(UpdateClamp(limit, "fan")) as session:
        for seed, overflow in enumerate([True, False, True, False]):
            alone, before, rates = run.uncontrolled(), run.parameters, run.rates
            twin = torch.amp.GradScaler("cpu", init_scale=2.0**10)
            twin.load_state_dict(scaler.state_dict())
            told = len(session.interventions)
            step(alone, twin, seed, overflow)
            step(run, scaler, seed, overflow)
            assert frozen(scaler.state_dict()) == frozen(twin.state_dict())
            if overflow:
                assert frozen(run.parameters) == frozen(before)
                assert len(session.interventions) == told
            else:
                assert all(assert_all_held(before, alone.parameters, run.parameters, limit, "fan", rates))


@EITHER_WAY
def test_a_matrix_without_gradient_is_left_as_the_optimizer_left_it(relative_to: Any) -> None:
    """It was not decayed either; so nothing of it is over, however strong it is."""
    run = Run(lambda model: [torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.5)])
    run.model.get_parameter("2.weight").data.mul_(10.0)
    with run.attach(UpdateClamp(0.004, relative_to)) as session:
        for seed in range(3):
            run.backward(seed)
            run.model.get_parameter("2.weight").grad = None
            before = run.parameters["2.weight"]
            run.update()
            assert frozen(run.parameters["2.weight"]) == frozen(before)
    assert [one.saw["matrices"] for one in session.interventions] == [2, 2, 2]


def test_matrices_that_are_frozen_or_of_no_optimizer_are_left_out() -> None:
    def optimizers(model: nn.Module) -> list[Optimizer]:
        return [torch.optim.AdamW([p for name, p in model.named_parameters() if not name.startswith("4")], 1e-2)]

    run = Run(optimizers)
    run.model.get_parameter("2.weight").requires_grad_(False)
    before = run.parameters
    with run.attach(UpdateClamp(0.1, "fan")) as session:
        run.step(1)
        assert set(session.latest.layers(CEILING)) == {"0.weight"}
        run.model.get_parameter("2.weight").requires_grad_(True)
        run.step(2)
        assert set(session.latest.layers(CEILING)) == {"0.weight", "2.weight"}
    assert frozen(run.parameters["4.weight"]) == frozen(before["4.weight"])
    assert [one.saw["matrices"] for one in session.interventions] == [1, 2]


def test_accumulated_gradients_make_one_step() -> None:
    alone, run = prepared(adamw), prepared(adamw)

    def step(one: Run) -> None:
        one.optimizers[0].zero_grad()
        for seed in (3, 4, 5):
            x, y = batch(seed)
            (F.cross_entropy(one.model(x), y) / 3).backward()
        one.update()

    before, rates = run.parameters, run.rates
    step(alone)
    with run.attach(UpdateClamp(0.5, "fan")) as session:
        step(run)
    assert assert_all_held(before, alone.parameters, run.parameters, 0.5, "fan", rates) == [True] * 3
    assert len(session.interventions) == 1


@pytest.mark.parametrize("skipped", [0, 1])
def test_of_a_joint_step_that_one_optimizer_skips_the_other_is_held(skipped: int) -> None:
    """As a scaler may have it, or a schedule of its own."""
    alone, run = prepared(muon_and_adamw), prepared(muon_and_adamw)
    before = run.parameters
    stays = ("0", "2") if skipped == 0 else ("4",)
    rates = {n: rate._replace(weight_decay=0.0) if n.startswith(stays) else rate for n, rate in run.rates.items()}
    for one in (alone, run):
        session = one.attach(UpdateClamp(0.1, "fan")) if one is run else None
        one.backward(3)
        one.optimizers[1 - skipped].step()
    assert session is not None
    assert frozen(run.parameters) == frozen(alone.parameters), "open: the other may yet come"
    run.model(batch(4)[0])
    over = assert_all_held(before, alone.parameters, run.parameters, 0.1, "fan", rates)
    assert over == ([False, False, True] if skipped == 0 else [True, True, False])
    assert set(session.latest.layers(CEILING)) == ({"4.weight"} if skipped == 0 else {"0.weight", "2.weight"})
    session.close()
    assert [one.saw["matrices"] for one in session.interventions] == [sum(over)]
