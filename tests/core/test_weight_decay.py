"""Weight decay: whether it can be told from the rest of an update is what two real runs say, one of them without."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    Muon,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
)
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from redline.weight_decay import DecayRules, Rates, why_coupled

Make = Callable[..., Optimizer]


# Optimizers of the tests' own -------------------------------------------------------------------------------------


class Descent(Optimizer):
    """Gradient descent; subclasses say how a parameter moves."""

    def __init__(self, params: Any, lr: float = 0.1, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.move(parameter, group, group["lr"], group["weight_decay"])

    def move(self, parameter: Tensor, group: dict[str, Any], lr: float, decay: float) -> None:
        parameter.mul_(1 - lr * decay).sub_(lr * parameter.grad)


class Lion(Descent):
    """Sign updates of an interpolated momentum."""

    def move(self, parameter: Tensor, group: dict[str, Any], lr: float, decay: float) -> None:
        state, gradient = self.state[parameter], parameter.grad
        momentum = state.setdefault("momentum", torch.zeros_like(parameter))
        parameter.mul_(1 - lr * decay).sub_(lr * (0.9 * momentum + 0.1 * gradient).sign())
        momentum.lerp_(gradient, 0.01)


class CoupledLion(Lion):
    """The decay is lost in the sign."""

    def move(self, parameter: Tensor, group: dict[str, Any], lr: float, decay: float) -> None:
        parameter.grad.add_(parameter, alpha=decay)
        super().move(parameter, group, lr, 0.0)


class OwnRate(Descent):
    """Decays by the weight decay alone, whatever the learning rate."""

    def move(self, parameter: Tensor, group: dict[str, Any], lr: float, decay: float) -> None:
        super().move(parameter, group, lr, decay / lr)


class DecayLast(Descent):
    """Shrinks what the update has made of the parameter, not what was there before it."""

    def move(self, parameter: Tensor, group: dict[str, Any], lr: float, decay: float) -> None:
        super().move(parameter, group, lr, 0.0)
        parameter.mul_(1 - lr * decay)


class EverySecond(Descent):
    """Leaves the decay out at every second step."""

    every = 2

    def move(self, parameter: Tensor, group: dict[str, Any], lr: float, decay: float) -> None:
        state = self.state[parameter]
        state["moves"] = state.get("moves", 0) + 1
        super().move(parameter, group, lr, decay if state["moves"] % self.every else 0.0)


class EveryThird(EverySecond):
    every = 3


class Cautious(Descent):
    """Decays only where that goes along with the gradient."""

    def move(self, parameter: Tensor, group: dict[str, Any], lr: float, decay: float) -> None:
        along = (parameter * parameter.grad > 0).to(parameter.dtype)
        parameter.sub_(lr * decay * along * parameter + lr * parameter.grad)


class ByShape(Descent):
    """Adjusts its rate to the shape, and decays by what it makes of it."""

    def move(self, parameter: Tensor, group: dict[str, Any], lr: float, decay: float) -> None:
        rows, columns = parameter.shape
        super().move(parameter, group, lr * (rows / columns) ** 0.5, decay)


class Anchored(Descent):
    """Pulls towards where it started, not towards 0."""

    def move(self, parameter: Tensor, group: dict[str, Any], lr: float, decay: float) -> None:
        start = self.state[parameter].setdefault("start", parameter.clone())
        pull = lr * decay * (parameter - start)
        parameter.sub_(pull + lr * parameter.grad)


# What is true -----------------------------------------------------------------------------------------------------


def goes_by_the_rate(make: Make, settings: Mapping[str, Any], lr: float = 0.3, decay: float = 0.7) -> bool:
    """Whether at each of 60 real steps decay moves a parameter by ``-lr * wd * theta``, and by nothing else.

    Three optimizers are fed the same gradients: one goes its way, with decay; ahead of each step two others, with decay
    and without, are put where it is. In float64, at rates and on a shape of the test's own.
    """
    generator = torch.Generator().manual_seed(7)
    first = torch.randn((3, 5), generator=generator, dtype=torch.float64)
    parameters = [nn.Parameter(first.clone()) for _ in range(2)]
    optimizers = [
        make([parameter], lr=lr, weight_decay=weight_decay, **settings)
        for parameter, weight_decay in zip(parameters, (decay, 0.0), strict=True)
    ]
    for _ in range(60):
        before = parameters[0].detach().clone()
        gradient = torch.randn((3, 5), generator=generator, dtype=torch.float64)
        for parameter, optimizer in zip(parameters, optimizers, strict=True):
            parameter.detach().copy_(before)
            parameter.grad = gradient.clone()
            optimizer.step()
        difference = parameters[0].detach() - parameters[1].detach()
        if not torch.allclose(difference, -lr * decay * before, rtol=1e-7, atol=1e-9):
            return False
    return True


DECOUPLED: list[tuple[Make, dict[str, Any]]] = [
    (AdamW, {}),
    (AdamW, {"foreach": True}),
    (AdamW, {"fused": True}),
    (AdamW, {"amsgrad": True, "maximize": True}),
    (Adam, {"decoupled_weight_decay": True}),
    (NAdam, {"decoupled_weight_decay": True}),
    (RAdam, {"decoupled_weight_decay": True}),
    (Muon, {}),
    (Muon, {"adjust_lr_fn": "original"}),
    (Muon, {"adjust_lr_fn": "match_rms_adamw", "nesterov": False}),
    (SGD, {}),
    (SGD, {"foreach": True, "maximize": True}),
    (Adafactor, {}),
    (ASGD, {"lambd": 0.0}),
    (Descent, {}),
    (Lion, {}),
]
COUPLED: list[tuple[Make, dict[str, Any]]] = [
    (Adam, {}),
    (NAdam, {}),
    (RAdam, {}),
    (SGD, {"momentum": 0.9}),
    (SGD, {"momentum": 0.9, "nesterov": True}),
    (SGD, {"momentum": 0.5, "dampening": 0.9}),
    (Adagrad, {}),
    (RMSprop, {}),
    (Adadelta, {}),
    (Adamax, {}),
    (ASGD, {}),  # its rate falls with time, and the decay with it
    (ASGD, {"lambd": 0.1}),
    (CoupledLion, {}),
    (OwnRate, {}),
    (DecayLast, {}),
    (EverySecond, {}),
    (EveryThird, {}),
    (Cautious, {}),
    (ByShape, {}),
    (Anchored, {}),
]


def ids(value: Any) -> str:
    return value.__name__ if isinstance(value, type) else "-".join(map(str, value.items() if value else ["plain"]))


@pytest.mark.parametrize(("make", "settings"), DECOUPLED, ids=ids)
def test_decoupled_decay_is_told_from_the_rest(make: Make, settings: dict[str, Any]) -> None:
    assert goes_by_the_rate(make, settings)
    optimizer = make([nn.Parameter(torch.randn(4, 6))], lr=0.02, weight_decay=0.1, **settings)
    assert why_coupled(optimizer, optimizer.param_groups[0]) is None


@pytest.mark.parametrize(("make", "settings"), COUPLED, ids=ids)
def test_decay_that_is_coupled_or_goes_by_another_rate_is_said_by_name(make: Make, settings: dict[str, Any]) -> None:
    assert not goes_by_the_rate(make, settings)
    optimizer = make([nn.Parameter(torch.randn(4, 6))], lr=0.02, weight_decay=0.1, **settings)
    assert why_coupled(optimizer, optimizer.param_groups[0]) == (
        f"the weight decay of {type(optimizer).__name__} is not decoupled from the gradient, or does not go by the "
        "group's rate"
    )


@pytest.mark.parametrize("kind", [AdamW, Adam, NAdam, RAdam])
@pytest.mark.parametrize("foreach", [False, True])
def test_settings_for_another_device_do_not_keep_an_optimizer_from_being_tried_out(kind: Make, foreach: bool) -> None:
    """A capturable one refuses parameters of the CPU, where the scratch copy lives."""
    settings: dict[str, Any] = {} if kind is AdamW else {"decoupled_weight_decay": True}
    parameter = nn.Parameter(torch.randn(4, 6))
    optimizer = kind([parameter], lr=torch.tensor(1e-3), weight_decay=0.1, capturable=True, foreach=foreach, **settings)
    parameter.grad = torch.ones(4, 6)
    with pytest.raises((AssertionError, RuntimeError), match="capturable"):
        optimizer.step()
    assert why_coupled(optimizer, optimizer.param_groups[0]) is None


def test_a_loss_scale_that_a_scaler_has_left_is_not_taken_along() -> None:
    """With ``found_inf`` a fused step does nothing: it would look like decay that is not there."""
    optimizer = AdamW([nn.Parameter(torch.randn(4, 6))], weight_decay=0.1, fused=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(1.0)  # type: ignore[attr-defined]
    assert why_coupled(optimizer, optimizer.param_groups[0]) is None


def test_where_the_run_makes_its_tensors_does_not_matter() -> None:
    """As after ``torch.set_default_device("cuda")``; here it is a device on which nothing has a value."""
    optimizer = AdamW([nn.Parameter(torch.randn(4, 6))], weight_decay=0.1)
    with torch.device("meta"):
        assert why_coupled(optimizer, optimizer.param_groups[0]) is None


@pytest.mark.parametrize("shape", [(7,), (), (2, 3, 4, 5), (100, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_answer_is_that_of_the_rule_whatever_the_parameters_are(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.zeros(shape, dtype=dtype))
    for lr, weight_decay in ((0.0, 0.1), (1e-8, 1e-8), (10.0, 3.0)):
        for optimizer, decoupled in (
            (AdamW([parameter], lr, weight_decay=weight_decay), True),
            (Adam([parameter], lr, weight_decay=weight_decay), False),
        ):
            assert (why_coupled(optimizer, optimizer.param_groups[0]) is None) is decoupled


# Optimizers that cannot be tried out ------------------------------------------------------------------------------


class Raising(Descent):
    def move(self, parameter: Tensor, group: dict[str, Any], lr: float, decay: float) -> None:
        raise KeyError("of its own making")


class NeedsClosure(Descent):
    def step(self, closure: Any) -> None:  # type: ignore[override]
        closure()
        super().step()


class KnowsItsParameters(Descent):
    """Looks for each parameter among those it was made with."""

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **settings)
        self.places = [id(p) for group in self.param_groups for p in group["params"]]

    def move(self, parameter: Tensor, group: dict[str, Any], lr: float, decay: float) -> None:
        if id(parameter) not in self.places:
            raise ValueError("not of mine")
        super().move(parameter, group, lr, decay)


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        (Raising, "KeyError: 'of its own making'"),
        (NeedsClosure, "TypeError: "),
        (KnowsItsParameters, "ValueError: not of mine)"),
    ],
)
def test_an_optimizer_that_cannot_be_tried_out_counts_as_coupled_and_says_why(kind: Make, error: str) -> None:
    optimizer = kind([nn.Parameter(torch.randn(4, 6))], weight_decay=0.1)
    reason = why_coupled(optimizer, optimizer.param_groups[0])
    assert reason is not None
    assert reason.startswith(f"{kind.__name__} could not be tried out on a scratch parameter ({error}")  # type: ignore[attr-defined]
    parameter = optimizer.param_groups[0]["params"][0]
    (rates,) = DecayRules().rates(optimizer, {"weight": parameter}).values()
    assert rates == Rates(0.1, 0.0, reason)


# Asking changes nothing -------------------------------------------------------------------------------------------


def frozen(value: Any) -> Any:
    """A copy that compares by bits: tensors as their type and bytes."""
    if isinstance(value, Tensor):
        data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return str(value.dtype), tuple(value.shape), data
    if isinstance(value, dict):
        return {key: frozen(inner) for key, inner in value.items()}
    return [frozen(inner) for inner in value] if isinstance(value, (list, tuple)) else value


class Noisy(Descent):
    """Draws from the run's stream at each step."""

    def move(self, parameter: Tensor, group: dict[str, Any], lr: float, decay: float) -> None:
        super().move(parameter, group, lr, decay)
        parameter.add_(torch.randn_like(parameter), alpha=1e-3)


class Asked:
    """An optimizer in the middle of a run, with hooks and a scheduler on it."""

    def __init__(self, make: Make, settings: Mapping[str, Any]) -> None:
        torch.manual_seed(0)
        self.parameters = [nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(3, 2))]
        groups = [{"params": [one], "weight_decay": 0.1 + k} for k, one in enumerate(self.parameters)]
        self.optimizer = make(groups, lr=0.02, **settings)
        self.fired: list[Optimizer] = []
        self.optimizer.register_step_pre_hook(lambda optimizer, *_: self.fired.append(optimizer))
        self.optimizer.register_step_post_hook(lambda optimizer, *_: self.fired.append(optimizer))
        self.scheduler = LambdaLR(self.optimizer, lambda step: 0.9**step)
        for seed in range(3):
            self.step(seed)
        self.gradients(3)

    def gradients(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)

    def step(self, seed: int) -> None:
        self.gradients(seed)
        self.optimizer.step()
        self.scheduler.step()

    @property
    def everything(self) -> Any:
        return frozen(
            {
                "parameters": [one.detach() for one in self.parameters],
                "gradients": [one.grad for one in self.parameters],
                "state": self.optimizer.state_dict(),
                "defaults": self.optimizer.defaults,
                "scheduler": {k: v for k, v in self.scheduler.state_dict().items() if k != "lr_lambdas"},
                "stream": torch.get_rng_state(),
                "fired": len(self.fired),
            }
        )


@pytest.mark.parametrize(
    ("make", "settings"),
    [*DECOUPLED[:3], (Muon, {}), (Adafactor, {}), (SGD, {"momentum": 0.9}), (Adagrad, {}), (Lion, {}), (Noisy, {})],
    ids=ids,
)
def test_asking_changes_nothing(make: Make, settings: dict[str, Any]) -> None:
    left_alone, asked = Asked(make, settings), Asked(make, settings)
    torch.manual_seed(1)
    before, held = asked.everything, dict(vars(asked.optimizer))
    owners = [id(group) for group in asked.optimizer.param_groups]
    states = {key: id(state) for key, state in asked.optimizer.state.items()}
    python, of_numpy = random.getstate(), repr(np.random.get_state())  # noqa: NPY002 the stream of others

    DecayRules().rates(asked.optimizer, dict(zip("ab", asked.parameters, strict=True)))
    for group in asked.optimizer.param_groups:
        why_coupled(asked.optimizer, group)

    assert asked.everything == before
    assert (random.getstate(), repr(np.random.get_state())) == (python, of_numpy)  # noqa: NPY002
    assert vars(asked.optimizer).keys() == held.keys()
    assert all(vars(asked.optimizer)[name] is value for name, value in held.items()), "the very objects"
    assert [id(group) for group in asked.optimizer.param_groups] == owners
    assert {key: id(state) for key, state in asked.optimizer.state.items()} == states
    torch.manual_seed(1)
    left_alone.step(4)
    torch.manual_seed(1)
    asked.step(4)
    assert asked.everything == left_alone.everything
    assert len(asked.fired) == 8, "two hooks at each of four steps"
    assert {id(one) for one in asked.fired} == {id(asked.optimizer)}


def test_asking_fires_no_hook_that_is_on_all_optimizers() -> None:
    """Such as one that counts a run's steps."""
    optimizer = AdamW([nn.Parameter(torch.randn(4, 6))], weight_decay=0.1)
    fired: list[Any] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *of: fired.append(of)),
        register_optimizer_step_post_hook(lambda *of: fired.append(of)),
    ]
    try:
        why_coupled(optimizer, optimizer.param_groups[0])
    finally:
        for handle in handles:
            handle.remove()
    assert fired == []


class KeepsBooks(Descent):
    """What it keeps outlasts a step, on itself and in its groups, and is written in place."""

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, **settings)
        self.history: list[float] = []
        self.count = torch.zeros(())
        self.stream = torch.Generator().manual_seed(3)
        for group in self.param_groups:
            group["total"] = torch.zeros(())
            group["norms"] = []

    def move(self, parameter: Tensor, group: dict[str, Any], lr: float, decay: float) -> None:
        super().move(parameter, group, lr, decay)
        self.count += 1
        self.history.append(float(parameter.norm()))
        group["total"] += parameter.norm()
        group["norms"].append(float(parameter.norm()))
        torch.rand(1, generator=self.stream)

    @property
    def books(self) -> Any:
        groups = [(group["total"], group["norms"]) for group in self.param_groups]
        return frozen([self.history, self.count, self.stream.get_state(), *groups])


def test_asking_writes_nothing_into_what_an_optimizer_keeps_on_itself_and_in_its_groups() -> None:
    optimizer = KeepsBooks([nn.Parameter(torch.randn(4, 6))], weight_decay=0.1)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(4, 6)
    optimizer.step()
    before = copy.deepcopy(optimizer.books)
    assert before[0] != [], "it keeps books"
    why_coupled(optimizer, optimizer.param_groups[0])
    assert optimizer.books == before


class Around(Optimizer):
    """Built around another optimizer, which takes the steps: they share their groups."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner.param_groups, inner.defaults)
        self.inner = inner
        self.param_groups = inner.param_groups

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step()


def test_asking_an_optimizer_that_is_built_around_another_moves_no_parameter_of_the_run() -> None:
    parameter = nn.Parameter(torch.randn(4, 6))
    optimizer = Around(AdamW([parameter], weight_decay=0.1))
    parameter.grad = torch.ones(4, 6)
    optimizer.step()
    before = frozen([parameter.detach(), optimizer.inner.state_dict()])
    why_coupled(optimizer, optimizer.param_groups[0])
    assert frozen([parameter.detach(), optimizer.inner.state_dict()]) == before


# Rates ------------------------------------------------------------------------------------------------------------


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
