"""Decisions on single matrices: what is committed of a step that is scaled or decayed by matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from bits import assert_same_bits, frozen
from matrix_decision_runs import (
    COUPLED,
    DECAYS,
    FACTORS,
    LAYERS,
    WD,
    Deciding,
    Joint,
    Make,
    Numbers,
    Run,
    assert_committed,
    decaying,
    each,
    muon_and_adamw,
    optimizers,
    over,
    scaling,
    two_adamw,
)
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, Adam, AdamW, NAdam, RAdam


def plain(number: Any) -> Tensor:
    """A number of a decision for a test to look at, wherever it is."""
    return torch.as_tensor(number, dtype=torch.float64).as_subclass(Tensor)


DECOUPLED = [
    over(AdamW, foreach=False),
    over(AdamW, foreach=True),
    over(AdamW, fused=True),
    over(AdamW, lr=torch.tensor(0.125), fused=True),
    over(Adam, decoupled_weight_decay=True),
    over(NAdam, decoupled_weight_decay=True),
    over(RAdam, decoupled_weight_decay=True),
    over(Adafactor),
    over(SGD),
    muon_and_adamw,
    two_adamw,
]


# Scaling ----------------------------------------------------------------------------------------------------------


@optimizers(DECOUPLED)
def test_scale_matrices_commits_a_share_of_the_update_net_of_decay_and_the_decay_whole(
    make: Make, numbers: Numbers
) -> None:
    run = Run(make)
    alone, before, net, decays = run.twin(), run.parameters, run.net(2), run.decays()
    alone.step(2)
    controller = Deciding(scaling(FACTORS, numbers))
    with run.attach(controller):
        run.step(2)
    assert_committed(run, before, net, run.rates, decays, factors=FACTORS)
    assert frozen(run.parameters["wide.bias"]) == frozen(alone.parameters["wide.bias"]), "a vector was not decided on"
    assert run.state == alone.state, "moments and counters are the optimizer's own"
    moved = (run.parameters["wide.weight"] - alone.parameters["wide.weight"]).abs().max()
    assert float(moved) > 1e-3, "the decision shows"


@optimizers(DECOUPLED)
def test_the_net_update_is_that_of_an_optimizer_without_decay(make: Make) -> None:
    run = Run(make)
    net = run.net(2)
    controller = Deciding()
    with run.attach(controller):
        run.step(2)
    for name, tensor in controller.net[0].items():
        torch.testing.assert_close(tensor, net[name], rtol=0, atol=1e-14)
    assert controller.net[0].keys() == net.keys()


@optimizers(COUPLED)
def test_where_decay_is_coupled_the_whole_update_is_scaled(make: Make, numbers: Numbers) -> None:
    run = Run(make)
    alone, before = run.twin(), run.parameters
    alone.step(2)
    update = {name: tensor - before[name] for name, tensor in alone.parameters.items()}
    controller = Deciding(scaling(FACTORS, numbers))
    with run.attach(controller):
        run.step(2)
    assert_committed(run, before, update, run.rates, dict.fromkeys(before, 0.0), factors=FACTORS)
    assert_same_bits(controller.net[0], update)
    assert all("is not decoupled" in rates.coupled for rates in controller.rates[0].values())


class Zeros(nn.Module):
    """A matrix and a stack with entries of -0.0, which come through only if nobody computes with them."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.randn(40, 30))
        self.stack = nn.Parameter(torch.randn(3, 20, 10))
        with torch.no_grad():
            self.one[::2] = -0.0
            self.stack[:, ::2] = -0.0

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.one.T


def zero_fed(run: Run, seed: int) -> None:
    """Where the parameter is -0.0 the gradient is 0, and plain descent leaves it there."""
    run.feed(seed)
    for parameter in run.model.parameters():
        parameter.grad[parameter == 0] = 0.0  # type: ignore[index]
    run.update()


EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])


STACKED = ["one", "stack[0]", "stack[1]", "stack[2]"]


@EVERY_DTYPE
@pytest.mark.parametrize("make", [over(SGD), over(AdamW), over(SGD, momentum=0.9)], ids=lambda make: make.__name__)
def test_factors_of_one_leave_the_optimizers_own_bits_and_no_trace(
    make: Make, dtype: torch.dtype, numbers: Numbers
) -> None:
    run = Run(make, dtype, Zeros, steps=0)
    alone = run.twin()
    with run.attach(Deciding(scaling(dict.fromkeys(STACKED, 1.0), numbers))) as session:
        for seed in range(3):
            zero_fed(alone, seed)
            zero_fed(run, seed)
    assert_same_bits(run.parameters, alone.parameters)
    assert torch.signbit(run.parameters["one"][::2]).all()
    assert session.interventions == ()
    assert session.latest.value("redline_interventions_total", controller="Deciding", action="scale") == 0


@EVERY_DTYPE
def test_factor_of_one_among_others_leaves_the_optimizers_own_bits(dtype: torch.dtype, numbers: Numbers) -> None:
    run = Run(over(AdamW), dtype, Zeros, steps=0)
    alone = run.twin()
    zero_fed(alone, 0)
    with run.attach(Deciding(scaling({"one": 1.0, "stack[0]": 1.0, "stack[1]": 0.5}, numbers))) as session:
        zero_fed(run, 0)
    here, there = run.parameters, alone.parameters
    assert frozen(here["one"]) == frozen(there["one"])
    assert frozen(here["stack"][0]) == frozen(there["stack"][0])
    assert frozen(here["stack"][2]) == frozen(there["stack"][2]), "the third was not decided on"
    assert not torch.equal(here["stack"][1], there["stack"][1])
    assert len(session.interventions) == 1


@EVERY_DTYPE
def test_factor_of_zero_without_decay_is_the_parameter_as_it_was(dtype: torch.dtype, numbers: Numbers) -> None:
    run = Run(over(AdamW, weight_decay=0.0), dtype, Zeros, steps=0)
    before = run.parameters
    with run.attach(Deciding(scaling(dict.fromkeys(STACKED, 0.0), numbers))):
        run.step(0)
    assert_same_bits(run.parameters, before)


def test_factors_one_after_the_other_multiply_and_the_decay_stays_whole(numbers: Numbers) -> None:
    run = Run(over(AdamW))
    before, net = run.parameters, run.net(2)
    second = Joint(scaling(dict.fromkeys(LAYERS, 0.3), numbers), per_parameter=True)
    with run.attach(Deciding(scaling(FACTORS, numbers)), second):
        run.step(2)
    factors = {name: 0.3 * factor for name, factor in FACTORS.items()}
    assert_committed(run, before, net, run.rates, run.decays(), factors=factors)
    for name, tensor in second.net[0].items():
        torch.testing.assert_close(tensor, each(FACTORS, 1.0, name) * net[name], rtol=0, atol=1e-14)
        left = each(FACTORS, 1.0, name) * net[name] - run.decays()[name] * before[name]
        torch.testing.assert_close(second.seen[0][name], left, rtol=0, atol=1e-14)


# Updates that are not finite --------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight_decay", [0.0, WD])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_factor_of_zero_drops_an_update_that_is_not_finite_and_keeps_the_decay(
    value: float, weight_decay: float, numbers: Numbers
) -> None:
    run = Run(over(AdamW, weight_decay=weight_decay))
    before, net, alone = run.parameters, run.net(2), run.twin()
    for one in (run, alone):
        one.feed(2)
        one.model.wide.weight.grad[0, 1] = value
        one.model.experts.grad[1] = value
    alone.update()
    after = Joint()
    with run.attach(Deciding(scaling({"wide.weight": 0.0, "experts[1]": 0.0}, numbers)), after):
        run.update()
    net = {name: tensor.nan_to_num() for name, tensor in net.items()}
    factors = {"wide.weight": 0.0, "experts[1]": 0.0}
    assert_committed(run, before, net, run.rates, run.decays(), factors=factors)
    assert not alone.parameters["wide.weight"].isfinite().all(), "the optimizer's own was not finite"
    assert all(tensor.isfinite().all() for tensor in after.seen[0].values()), "and nobody sees it any more"
    if not weight_decay:
        assert frozen(run.parameters["wide.weight"]) == frozen(before["wide.weight"])
        assert frozen(run.parameters["experts"][1]) == frozen(before["experts"][1])


# Decay ------------------------------------------------------------------------------------------------------------


@optimizers(DECOUPLED)
def test_decay_moves_each_matrix_by_its_own(make: Make, numbers: Numbers) -> None:
    run = Run(make)
    alone, before, net, decays = run.twin(), run.parameters, run.net(2), run.decays()
    alone.step(2)
    second = Joint()
    with run.attach(Deciding(decaying(DECAYS, numbers)), second):
        run.step(2)
    assert_committed(run, before, net, run.rates, decays, decays=DECAYS)
    assert frozen(run.parameters["wide.bias"]) == frozen(alone.parameters["wide.bias"])
    assert run.state == alone.state
    for name, rates in second.rates[0].items():
        in_force = each(DECAYS, decays[name] / run.rates[name], name)
        assert bool((plain(rates.weight_decay) == in_force).all())
        torch.testing.assert_close(second.net[0][name], net[name], rtol=0, atol=1e-13)


@pytest.mark.parametrize("make", [over(AdamW), over(NAdam, decoupled_weight_decay=True)], ids=lambda one: one.__name__)
def test_decay_is_that_of_an_optimizer_with_it_in_its_groups(make: Make, numbers: Numbers) -> None:
    run = Run(make)
    other = run.twin(weight_decay=0.25)
    with run.attach(Deciding(decaying(dict.fromkeys(LAYERS, 0.25), numbers))) as session:
        for seed in range(2, 5):
            run.step(seed)
            other.step(seed)
    for name in set(run.parameters) - {"wide.bias"}:
        torch.testing.assert_close(run.parameters[name], other.parameters[name], rtol=1e-12, atol=1e-13)
    assert [one.action for one in session.interventions] == ["decay"] * 3
    assert {group["weight_decay"] for optimizer in run.optimizers for group in optimizer.param_groups} == {WD}


def test_decay_of_matrices_whose_group_has_none(numbers: Numbers) -> None:
    run = Run(over(SGD, momentum=0.9, weight_decay=0.0))
    before, net = run.parameters, run.net(2)
    with run.attach(Deciding(decaying(DECAYS, numbers))):
        run.step(2)
    assert_committed(run, before, net, run.rates, run.decays(), decays=DECAYS)


@EVERY_DTYPE
@pytest.mark.parametrize("width", [torch.float64, torch.float32])
def test_decay_equal_to_the_groups_leaves_the_optimizers_own_bits(
    dtype: torch.dtype, width: torch.dtype, numbers: Numbers
) -> None:
    """0.7 is none of them; of float32 it is the one nearest to 0.7 that is as good as the group's."""
    run = Run(over(SGD, weight_decay=0.7), dtype, Zeros, steps=0)
    alone = run.twin()
    same = dict.fromkeys(STACKED, 0.7)
    with run.attach(Deciding(decaying(same, lambda values: numbers(values).to(width), None))):
        for seed in range(2):
            zero_fed(alone, seed)
            zero_fed(run, seed)
    assert_same_bits(run.parameters, alone.parameters)


@pytest.mark.parametrize("width", [torch.float64, torch.float32, torch.bfloat16])
@EVERY_DTYPE
def test_matrices_of_a_stack_that_are_not_decided_on_keep_the_optimizers_own_bits(
    dtype: torch.dtype, width: torch.dtype, numbers: Numbers
) -> None:
    def narrow(values: Sequence[float]) -> Tensor:
        return numbers(values).to(width)

    for answer in (decaying({"stack[1]": 0.25}, narrow), scaling({"stack[1]": 0.25}, narrow)):
        run = Run(over(SGD, weight_decay=0.7), dtype, Zeros, steps=0)
        alone = run.twin()
        with run.attach(Deciding(answer)):
            zero_fed(alone, 0)
            zero_fed(run, 0)
        here, there = run.parameters, alone.parameters
        assert frozen(here["one"]) == frozen(there["one"])
        assert frozen(here["stack"][0]) == frozen(there["stack"][0])
        assert frozen(here["stack"][2]) == frozen(there["stack"][2])
        assert not torch.equal(here["stack"][1], there["stack"][1])


def test_decays_of_one_stack_by_several_controllers(numbers: Numbers) -> None:
    run = Run(over(AdamW))
    before, net = run.parameters, run.net(2)
    first = Deciding(decaying({"experts[0]": 0.1, "wide.weight": 0.1}, numbers))
    second = Deciding(decaying({"experts[2]": 0.2}, numbers))
    third = Deciding(decaying({"experts[0]": 0.4, "wide.weight": 0.3}, numbers))
    with run.attach(first, second, third):
        run.step(2)
    decays = {"experts[0]": 0.4, "experts[2]": 0.2, "wide.weight": 0.3}
    assert_committed(run, before, net, run.rates, run.decays(), decays=decays)


class Grid(nn.Module):
    """A stack of two by three matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.grid = nn.Parameter(torch.randn(2, 3, 5, 4))


def test_stacks_of_several_dimensions(numbers: Numbers) -> None:
    run = Run(over(AdamW), model=Grid)
    before, net, decay = run.parameters["grid"], run.net(2)["grid"], run.decays()["grid"]
    factors = torch.tensor([[0.1, 1.0, 0.3], [1.0, 0.5, 0.6]], dtype=torch.float64).reshape(2, 3, 1, 1)
    told = {f"grid[{e}]": float(factor) for e, factor in enumerate(factors.flatten()) if e not in (1, 3)}
    with run.attach(Deciding(scaling(dict(reversed(told.items())), numbers))):
        run.step(2)
    expected = before + factors * net - decay * before
    torch.testing.assert_close(run.parameters["grid"], expected, rtol=0, atol=1e-14)
