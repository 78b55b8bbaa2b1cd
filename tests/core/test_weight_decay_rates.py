"""The rates by which each parameter decays: its group's, tried out once and read each time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decaying_optimizers import Descent, Raising
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from redline.weight_decay import DecayRules, Rates


class Counted(Descent):
    """Counts the steps that any of its kind is asked to take."""

    steps = 0

    def move(self, parameter: Tensor, group: dict[str, Any], lr: float, decay: float) -> None:
        type(self).steps += 1
        super().move(parameter, group, lr, decay)


class CountedCoupled(Counted):
    def move(self, parameter: Tensor, group: dict[str, Any], lr: float, decay: float) -> None:
        super().move(parameter, group, lr, decay / lr)


@pytest.fixture(autouse=True)
def nothing_counted() -> None:
    Counted.steps = CountedCoupled.steps = 0


def named(*shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in zip("abcdef", shapes, strict=False)}


def test_rates_are_those_of_each_parameters_group() -> None:
    parameters = named((4, 6), (6,), (3, 2), (2, 2))
    a, b, c, d = parameters.values()
    optimizer = AdamW(
        [
            {"params": [a, b], "lr": 0.5, "weight_decay": 0.25},
            {"params": [c], "lr": 0.125, "weight_decay": 0.0},
            {"params": [d]},
        ],
        lr=2.0,
        weight_decay=0.0625,
    )
    rates = DecayRules().rates(optimizer, parameters)
    assert rates == {
        "a": Rates(0.5, 0.25, None),
        "b": Rates(0.5, 0.25, None),
        "c": Rates(0.125, 0.0, None),
        "d": Rates(2.0, 0.0625, None),
    }
    assert [one.decay for one in rates.values()] == [0.125, 0.125, 0.0, 0.125]


def test_rates_are_given_of_the_named_parameters_alone() -> None:
    parameters = named((4, 6), (6,), (3, 2))
    optimizer = AdamW(list(parameters.values())[:2], lr=0.5, weight_decay=0.25)
    assert DecayRules().rates(optimizer, {"b": parameters["b"], "c": parameters["c"]}) == {"b": Rates(0.5, 0.25, None)}


def test_rates_of_coupled_decay_are_no_decay_and_the_reason() -> None:
    parameters = named((4, 6))
    rates = DecayRules().rates(Adam(parameters.values(), lr=0.5, weight_decay=0.25), parameters)["a"]
    assert (rates.lr, rates.weight_decay, rates.decay) == (0.5, 0.0, 0.0)
    assert rates.coupled is not None
    assert "the weight decay of Adam is not decoupled" in rates.coupled


def test_each_group_is_asked_by_its_own_settings() -> None:
    parameters = named((4, 6), (6,), (3, 2))
    optimizer = SGD(
        [{"params": [one], "momentum": m} for one, m in zip(parameters.values(), (0.9, 0.0, 0.5), strict=True)],
        lr=0.1,
        weight_decay=0.25,
    )
    rates = DecayRules().rates(optimizer, parameters)
    assert [one.coupled is None for one in rates.values()] == [False, True, False]
    assert [one.weight_decay for one in rates.values()] == [0.0, 0.25, 0.0]


def test_optimizers_of_one_session_are_asked_each_for_itself() -> None:
    rules, first, second = DecayRules(), named((4, 6)), named((3, 2))
    coupled = rules.rates(Adam(first.values(), weight_decay=0.1), first)["a"]
    decoupled = rules.rates(AdamW(second.values(), weight_decay=0.1), second)["a"]
    assert coupled.coupled is not None
    assert decoupled.coupled is None


def test_a_group_is_tried_out_once_and_its_rates_are_read_each_time() -> None:
    parameters, rules = named((4, 6), (6,)), DecayRules()
    a, b = parameters.values()
    optimizer = CountedCoupled([{"params": [a]}, {"params": [b]}], lr=0.5, weight_decay=0.25)
    rules.rates(optimizer, parameters)
    tried = CountedCoupled.steps
    assert tried > 1
    for lr in (0.25, 0.125):
        optimizer.param_groups[0]["lr"] = lr
        assert rules.rates(optimizer, parameters)["a"].lr == lr
        assert rules.rates(optimizer, parameters)["b"].lr == 0.5
    assert CountedCoupled.steps == tried
    other = DecayRules()
    other.rates(optimizer, {"a": a, "b": b})
    assert CountedCoupled.steps == 2 * tried


def test_what_is_not_decayed_is_never_tried_out() -> None:
    parameters, rules = named((4, 6), (6,)), DecayRules()
    a, b = parameters.values()
    optimizer = Counted([{"params": [a]}, {"params": [b], "weight_decay": torch.tensor(0.0)}], lr=0.5)
    assert rules.rates(optimizer, parameters) == dict.fromkeys("ab", Rates(0.5, 0.0, None))
    assert Counted.steps == 0
    optimizer.param_groups[0]["weight_decay"] = 0.25
    assert rules.rates(optimizer, parameters) == {"a": Rates(0.5, 0.25, None), "b": Rates(0.5, 0.0, None)}
    once = Counted.steps
    assert once > 0
    optimizer.param_groups[0]["weight_decay"] = 0.0
    assert rules.rates(optimizer, parameters)["a"] == Rates(0.5, 0.0, None)
    assert Counted.steps == once


def test_raising_on_a_group_without_decay_is_no_reason() -> None:
    parameters = named((4, 6))
    assert DecayRules().rates(Raising(parameters.values(), lr=0.5), parameters) == {"a": Rates(0.5, 0.0, None)}


def test_an_optimizer_without_rates_has_none() -> None:
    class Fixed(Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {})

    parameters = named((4, 6))
    rates = DecayRules().rates(Fixed(list(parameters.values())), parameters)
    assert rates == {"a": Rates(0.0, 0.0, "Fixed has no learning rate in its groups")}


def test_rates_in_tensors_are_floats_that_a_schedule_does_not_change() -> None:
    parameters = named((4, 6))
    lr, weight_decay = torch.tensor(0.3), torch.tensor(0.7, dtype=torch.float64)
    optimizer = AdamW(parameters.values(), lr=lr, weight_decay=0.1, foreach=False)
    optimizer.param_groups[0]["weight_decay"] = weight_decay
    rates = DecayRules().rates(optimizer, parameters)["a"]
    lr.mul_(0.5)
    weight_decay.zero_()
    assert type(rates.lr) is type(rates.weight_decay) is float
    assert rates == Rates(float(torch.tensor(0.3)), 0.7, None)


class Elsewhere(Tensor):
    """Passes for a tensor of an accelerator."""

    device = property(lambda self: torch.device("cuda", 0))  # type: ignore[assignment]


def test_rates_in_tensors_of_an_accelerator_stay_there_and_a_schedule_does_not_change_them() -> None:
    parameters = named((4, 6))
    lr, weight_decay = (torch.tensor(value).as_subclass(Elsewhere) for value in (0.3, 0.7))
    optimizer = AdamW(parameters.values(), lr=lr, weight_decay=0.1, foreach=False)
    optimizer.param_groups[0]["weight_decay"] = weight_decay
    rates = DecayRules().rates(optimizer, parameters)["a"]
    lr.mul_(0.5)
    weight_decay.zero_()
    assert isinstance(rates.lr, Elsewhere)
    assert isinstance(rates.weight_decay, Elsewhere)
    assert rates.coupled is None
    assert float(rates.decay) == pytest.approx(0.3 * 0.7)


def test_decay_in_a_tensor_of_an_accelerator_is_tried_out_whatever_its_value() -> None:
    """Nobody waits to find out whether it is 0."""
    parameters = named((4, 6))
    optimizer = Adam(parameters.values(), lr=0.3)
    optimizer.param_groups[0]["weight_decay"] = torch.tensor(0.0).as_subclass(Elsewhere)
    rates = DecayRules().rates(optimizer, parameters)["a"]
    assert rates.weight_decay == 0
    assert rates.coupled is not None
