"""Decisions on single matrices: what is committed is a closed form of the update net of decay, and of the decay.

With ``W`` as it was before the step and ``p = q - lr * wd * W`` the update that the optimizer made, ``ScaleMatrices``
commits ``W + f * q - lr * wd * W`` and ``Decay`` ``W + q - lr * wd' * W``. Here ``q`` comes from a twin without decay,
which is fed the same gradients from the same weights.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from runs import HostReads
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, Adam, AdamW, Muon, NAdam, Optimizer, RAdam, RMSprop
from torch.optim.lr_scheduler import LambdaLR

import redline
from redline import (
    ConfigurationError,
    ControllerError,
    Decay,
    Need,
    RedlineWarning,
    Reject,
    RunStoppedError,
    Scale,
    ScaleMatrices,
    Step,
    metrics,
)
from redline.controller import RunOutline
from redline.parameters import MatrixLayer
from redline.readings import Readings
from redline.transaction import StepTransaction

Answer = Callable[[Step], Iterable[Any]]
Make = Callable[[nn.Module], list[Optimizer]]
Numbers = Callable[[Sequence[float]], Tensor]


# Doubles ----------------------------------------------------------------------------------------------------------


class Deciding(redline.Controller):
    """Answers what it is told to, and keeps what it was shown."""

    per_parameter = True

    def __init__(self, *answers: Answer, **attributes: Any) -> None:
        self.answers = answers
        vars(self).update(attributes)
        self.seen: list[dict[str, Tensor]] = []
        self.net: list[dict[str, Tensor]] = []
        self.rates: list[dict[str, Any]] = []

    def inspect(self, step: Step) -> Iterable[Any]:
        self.seen.append({name: tensor.clone() for name, tensor in step.update.tensors.items()})
        self.rates.append(dict(step.rates))
        self.net.append({name: step.net_update(name).clone() for name in step.rates})
        for answer in self.answers:
            yield from answer(step)


class Joint(Deciding):
    """Another class, so that it has another name in a session."""

    per_parameter = False


class Lengthening(Joint):
    lengthens = True


def named(step: Any, names: Iterable[str]) -> list[MatrixLayer]:
    layers = {layer.name: layer for layer in step.layers}
    return [layers[name] for name in names]


def host(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class Elsewhere(Tensor):
    """Passes for a tensor of an accelerator, until it is brought to the CPU."""

    device = property(lambda self: torch.device("xpu", 0))  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> Elsewhere:
        return self.clone()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        to = args[1] if func is Tensor.to and len(args) > 1 else None
        here = to == torch.device("cpu") or (isinstance(to, Tensor) and not isinstance(to, Elsewhere))
        return result.as_subclass(Tensor) if here else result


def elsewhere(values: Sequence[float]) -> Tensor:
    return host(values).as_subclass(Elsewhere)


def plain(number: Any) -> Tensor:
    """A number of a decision for a test to look at, wherever it is."""
    return torch.as_tensor(number, dtype=torch.float64).as_subclass(Tensor)


@pytest.fixture(params=[host, elsewhere], ids=["host", "accelerator"])
def numbers(request: pytest.FixtureRequest) -> Numbers:
    """Where the numbers of a decision are."""
    return request.param


def scaling(factors: Mapping[str, float], numbers: Numbers = host, reason: str = "as told.", **saw: Any) -> Answer:
    return lambda step: [ScaleMatrices(named(step, factors), numbers(list(factors.values())), reason, saw)]


def decaying(
    decays: Mapping[str, float], numbers: Numbers = host, reason: str | None = "as told.", **saw: Any
) -> Answer:
    return lambda step: [Decay(named(step, decays), numbers(list(decays.values())), reason, saw)]


def jointly(factor: float | Tensor) -> Answer:
    return lambda step: [Scale(factor, "jointly.")]


def at(index: int, answer: Answer) -> Answer:
    return lambda step: answer(step) if step.index == index else []


# Runs -------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A matrix, a vector, a convolution, a transposed one, and a stack of three matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(5, 7)
        self.conv = nn.Conv2d(2, 3, (3, 2), bias=False)
        self.turned = nn.ConvTranspose1d(4, 3, 2, bias=False)
        self.experts = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(x)


LAYERS = ["experts[0]", "experts[1]", "experts[2]", "wide.weight", "conv.weight", "turned.weight"]
WD = 0.75  # the same number in every precision


def over(kind: Callable[..., Optimizer], **settings: Any) -> Make:
    def make(model: nn.Module) -> list[Optimizer]:
        return [kind(model.parameters(), **{"lr": 0.125, "weight_decay": WD, **copy.deepcopy(settings)})]

    make.__name__ = "-".join([kind.__name__, *settings])
    return make


def muon_and_adamw(model: nn.Module) -> list[Optimizer]:
    parameters = list(model.parameters())
    return [
        Muon([one for one in parameters if one.dim() == 2], 0.25, weight_decay=0.3),
        AdamW([one for one in parameters if one.dim() != 2], 0.125, weight_decay=WD),
    ]


def two_adamw(model: nn.Module) -> list[Optimizer]:
    """Of which the first has its rate in a tensor, which schedules change in place."""
    first = model.wide.weight
    others = [one for one in model.parameters() if one is not first]
    return [
        AdamW([first], torch.tensor(0.25), weight_decay=0.3, fused=True),
        AdamW(others, 0.125, weight_decay=WD),
    ]


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
COUPLED = [over(Adam), over(SGD, momentum=0.9), over(RMSprop)]


def optimizers(makes: Sequence[Make]) -> Any:
    return pytest.mark.parametrize("make", makes, ids=[make.__name__ for make in makes])


class Run:
    """A model with its optimizers, fed gradients; two made alike are alike."""

    def __init__(
        self, make: Make, dtype: torch.dtype = torch.float64, model: Callable[[], nn.Module] = Net, steps: int = 2
    ) -> None:
        torch.manual_seed(0)
        self.model = model().to(dtype)
        self.optimizers = make(self.model)
        for seed in range(steps):
            self.step(seed)

    def feed(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)

    def update(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def step(self, seed: int) -> None:
        self.feed(seed)
        self.update()

    def attach(self, *controllers: redline.Controller, **arguments: Any) -> redline.Session:
        return redline.attach(self.model, self.optimizers, controllers=controllers, **{"monitors": [], **arguments})

    def twin(self, **settings: Any) -> Run:
        """A copy that nobody controls, with other settings in its groups."""
        twin = copy.copy(self)
        twin.model, twin.optimizers = copy.deepcopy((self.model, self.optimizers))
        for optimizer in twin.optimizers:
            for group in optimizer.param_groups:
                group.update(settings)
        return twin

    def net(self, seed: int) -> dict[str, Tensor]:
        """``q`` of the step to come, in float64: what a twin without decay does."""
        before, twin = self.parameters, self.twin(weight_decay=0.0)
        twin.step(seed)
        return {name: tensor.double() - before[name].double() for name, tensor in twin.parameters.items()}

    def decays(self, weight_decay: float | None = None) -> dict[str, float]:
        """``lr * wd`` of each parameter's group, as they are now; another ``wd`` if given."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return {
            names[id(parameter)]: float(group["lr"]) * (group["weight_decay"] if weight_decay is None else weight_decay)
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }

    @property
    def rates(self) -> dict[str, float]:
        return self.decays(1.0)

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    @property
    def state(self) -> Any:
        return frozen([optimizer.state_dict() for optimizer in self.optimizers])


def frozen(value: Any) -> Any:
    """A copy that compares by bits: tensors as their type and bytes."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), bits(value)
    if isinstance(value, dict):
        return {key: frozen(inner) for key, inner in value.items()}
    return [frozen(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same_bits(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name in expected if bits(actual[name]) != bits(expected[name])] == []


def each(values: Mapping[str, float], default: float, name: str) -> Tensor:
    """What a parameter's matrices were given, in a shape that multiplies it."""
    if name != "experts":
        return torch.tensor(values.get(name, default), dtype=torch.float64)
    given = [values.get(f"experts[{e}]", default) for e in range(3)]
    return torch.tensor(given, dtype=torch.float64).reshape(3, 1, 1)


def assert_committed(
    run: Run,
    before: Mapping[str, Tensor],
    net: Mapping[str, Tensor],
    rates: Mapping[str, float],
    group_decays: Mapping[str, float],
    *,
    factors: Mapping[str, float] | None = None,
    decays: Mapping[str, float] | None = None,
    joint: float = 1.0,
) -> None:
    """``W + s * (f * q - lr * wd * W)`` in float64, each matrix with its own ``f`` and ``wd``."""
    for name, tensor in run.parameters.items():
        start, update = before[name].double(), net[name]
        decay = rates[name] * each(decays or {}, group_decays[name] / rates[name], name)
        expected = start + joint * (each(factors or {}, 1.0, name) * update - decay * start)
        error = (tensor.double() - expected).abs()
        bound = 16 * torch.finfo(tensor.dtype).eps * (start.abs() + update.abs() + 1e-2)
        assert bool((error <= bound).all()), f"{name} is off by up to {float(error.max()):.3g}"


# Scaling ----------------------------------------------------------------------------------------------------------

FACTORS = dict(zip(LAYERS, (0.5, 1.0, 0.0625, 0.3, 0.0, 1.7), strict=True))


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
    assert bits(run.parameters["wide.bias"]) == bits(alone.parameters["wide.bias"]), "a vector was not decided on"
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
    assert bits(here["one"]) == bits(there["one"])
    assert bits(here["stack"][0]) == bits(there["stack"][0])
    assert bits(here["stack"][2]) == bits(there["stack"][2]), "the third was not decided on"
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
        assert bits(run.parameters["wide.weight"]) == bits(before["wide.weight"])
        assert bits(run.parameters["experts"][1]) == bits(before["experts"][1])


# Decay ------------------------------------------------------------------------------------------------------------

DECAYS = dict(zip(LAYERS, (3.0, WD, 0.05, 0.2, 0.0, 1.5), strict=True))


@optimizers(DECOUPLED)
def test_decay_moves_each_matrix_by_its_own(make: Make, numbers: Numbers) -> None:
    run = Run(make)
    alone, before, net, decays = run.twin(), run.parameters, run.net(2), run.decays()
    alone.step(2)
    second = Joint()
    with run.attach(Deciding(decaying(DECAYS, numbers)), second):
        run.step(2)
    assert_committed(run, before, net, run.rates, decays, decays=DECAYS)
    assert bits(run.parameters["wide.bias"]) == bits(alone.parameters["wide.bias"])
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
        assert bits(here["one"]) == bits(there["one"])
        assert bits(here["stack"][0]) == bits(there["stack"][0])
        assert bits(here["stack"][2]) == bits(there["stack"][2])
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


# Together ---------------------------------------------------------------------------------------------------------


@optimizers([over(AdamW), over(SGD), muon_and_adamw])
@pytest.mark.parametrize("joint", [1.0, 0.4])
@pytest.mark.parametrize("order", list(itertools.permutations(range(2))), ids=["scale first", "decay first"])
def test_scale_and_decay_of_matrices_and_then_of_the_joint_step(
    make: Make, order: Sequence[int], joint: float, numbers: Numbers
) -> None:
    run = Run(make)
    before, net, decays = run.parameters, run.net(2), run.decays()
    answers = [scaling(FACTORS, numbers), decaying(DECAYS, numbers)]
    first, second = (Deciding(answers[k]) for k in order)
    clamp = Joint(jointly(joint))
    with run.attach(clamp, first, second):
        run.step(2)
    assert_committed(run, before, net, run.rates, decays, factors=FACTORS, decays=DECAYS, joint=joint)
    for name, seen in clamp.seen[0].items():
        decay = run.rates[name] * each(DECAYS, decays[name] / run.rates[name], name)
        left = each(FACTORS, 1.0, name) * net[name] - decay * before[name]
        torch.testing.assert_close(seen, left, rtol=0, atol=1e-13)


@pytest.mark.parametrize("order", list(itertools.permutations(range(2))), ids=["scale first", "decay first"])
def test_scale_and_decay_by_one_controller(order: Sequence[int], numbers: Numbers) -> None:
    run = Run(over(AdamW))
    before, net = run.parameters, run.net(2)
    answers = [scaling(FACTORS, numbers), decaying(DECAYS, numbers)]
    with run.attach(Deciding(*(answers[k] for k in order))):
        run.step(2)
    assert_committed(run, before, net, run.rates, run.decays(), factors=FACTORS, decays=DECAYS)


@pytest.mark.parametrize("whole", [False, True], ids=["of one parameter", "of the whole step"])
@pytest.mark.parametrize("decided", ["scale", "decay"])
@pytest.mark.parametrize("first", [0.5, 0.0])
def test_a_matrix_decision_after_a_scale_is_one_on_what_is_left(
    decided: str, first: float, whole: bool, numbers: Numbers
) -> None:
    """A scale is as if the rate had been another, for the decay too: that stays whole, or gives place to another."""
    run = Run(over(AdamW))
    before, net, rate, decay = run.parameters, run.net(2), 0.125, 0.125 * WD
    scale = Scale(first, "first.", None if whole else "wide.weight")
    answer = (scaling if decided == "scale" else decaying)({"wide.weight": 0.25}, numbers)
    controller = Deciding(answer)
    with run.attach(Deciding(lambda step: [scale]), controller):
        run.step(2)
    start, q = before["wide.weight"], first * net["wide.weight"]
    torch.testing.assert_close(controller.net[0]["wide.weight"], q, rtol=0, atol=1e-14)
    expected = start + (0.25 * q - first * decay * start if decided == "scale" else q - first * rate * 0.25 * start)
    torch.testing.assert_close(run.parameters["wide.weight"], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "when", [lambda: True, lambda: torch.tensor(True).as_subclass(Elsewhere)], ids=["known", "not"]
)
def test_a_rejected_step_goes_back_all_the_way(when: Callable[[], Any], numbers: Numbers) -> None:
    run = Run(over(AdamW))
    before = run.parameters
    answers = (scaling(FACTORS, numbers), decaying(DECAYS, numbers))
    rejecting = Joint(lambda step: [Reject("as told.", when=when())])
    with run.attach(Deciding(*answers), rejecting) as session:
        run.feed(2)
        with nullcontext() if isinstance(when(), Tensor) else pytest.raises(RunStoppedError, match="rejected step 0"):
            run.update()
        assert_same_bits(run.parameters, before)
        assert [one.action for one in session.interventions][-1] == "reject"
        if isinstance(when(), Tensor):  # it stops once that is read
            with pytest.raises(RunStoppedError, match="Joint rejected step 0: as told"):
                run.update()
        assert_same_bits(run.parameters, before)


@pytest.mark.parametrize("decided", ["scale", "decay"])
def test_a_step_that_was_rejected_stays_rejected_whatever_is_decided_then(decided: str) -> None:
    run = Run(over(AdamW))
    before = run.parameters
    answer = (scaling if decided == "scale" else decaying)({"wide.weight": 0.25}, elsewhere)
    rejecting = Deciding(lambda step: [Reject("as told.", when=torch.tensor(True).as_subclass(Elsewhere))])
    with run.attach(rejecting, Deciding(answer)):
        run.step(2)
        assert_same_bits(run.parameters, before)


# Half precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factors", "decays"), [(FACTORS, DECAYS), (FACTORS, {}), ({}, DECAYS)], ids=["both", "scaled", "decayed"]
)
def test_half_precision_is_computed_in_float32_and_rounded_once(
    factors: Mapping[str, float], decays: Mapping[str, float], numbers: Numbers
) -> None:
    """Of the update as it was applied, rounded to bfloat16 by the optimizer; it is as large as the weights."""
    run = Run(over(SGD, lr=0.5), torch.bfloat16, steps=0)
    alone, before = run.twin(), run.parameters
    alone.step(2)
    with run.attach(Deciding(scaling(factors, numbers), decaying(decays, numbers))):
        run.step(2)
    for name in ("wide.weight", "conv.weight", "turned.weight", "experts"):
        start, after = before[name].double(), alone.parameters[name].double()
        factor, decay = each(factors, 1.0, name), each(decays, WD, name)
        expected = start + factor * (after - start + 0.5 * WD * start) - 0.5 * decay * start
        assert torch.equal(run.parameters[name], expected.bfloat16()), name


def test_updates_are_shown_in_float32_for_half_precision(numbers: Numbers) -> None:
    run = Run(over(SGD, lr=0.5), torch.bfloat16, steps=0)
    second = Joint()
    with run.attach(Deciding(scaling(FACTORS, numbers)), second):
        run.step(2)
    assert {tensor.dtype for tensor in (*second.seen[0].values(), *second.net[0].values())} == {torch.float32}
    assert {tensor.dtype for tensor in run.parameters.values()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@optimizers([over(AdamW), over(AdamW, fused=True), over(SGD), two_adamw])
def test_other_precisions_to_their_own_rounding(make: Make, dtype: torch.dtype, numbers: Numbers) -> None:
    """``q`` is then what the applied update was without its decay, ``p + lr * wd * W``."""
    run = Run(make, dtype)
    alone, before = run.twin(), run.parameters
    decays = run.decays()
    alone.step(2)
    net = {
        name: after.double() - before[name].double() * (1 - decays[name]) for name, after in alone.parameters.items()
    }
    with run.attach(Deciding(decaying(DECAYS, numbers), scaling(FACTORS, numbers)), Joint(jointly(0.75))):
        run.step(2)
    assert_committed(run, before, net, run.rates, decays, factors=FACTORS, decays=DECAYS, joint=0.75)


# The rates of the step --------------------------------------------------------------------------------------------


def answers(numbers: Numbers) -> tuple[Answer, Answer]:
    return scaling(FACTORS, numbers), decaying({"wide.weight": 0.25, "experts[1]": 0.0}, numbers)


def test_the_rates_are_those_of_each_step_as_schedules_set_them(numbers: Numbers) -> None:
    run = Run(over(AdamW))
    scheduler = LambdaLR(run.optimizers[0], lambda step: 0.5**step)
    with run.attach(Deciding(scaling(FACTORS, numbers))):
        for seed in range(2, 6):
            run.optimizers[0].param_groups[0]["weight_decay"] = 0.1 * seed
            before, net, rates, decays = run.parameters, run.net(seed), run.rates, run.decays()
            run.step(seed)
            assert_committed(run, before, net, rates, decays, factors=FACTORS)
            scheduler.step()


@optimizers([muon_and_adamw, two_adamw])
def test_a_scheduler_that_steps_between_the_optimizers_of_a_joint_step_comes_too_late_for_it(
    make: Make, numbers: Numbers
) -> None:
    run = Run(make)
    before, net, rates, decays = run.parameters, run.net(2), run.rates, run.decays()
    group = run.optimizers[0].param_groups[0]
    schedulers = [LambdaLR(run.optimizers[0], lambda step: 0.1**step)]
    assert run.rates == rates
    run.feed(2)
    controller = Deciding(*answers(numbers))
    with run.attach(controller):
        run.optimizers[0].step()
        schedulers[0].step()
        group["weight_decay"] = 5.0
        run.optimizers[1].step()
    assert float(group["lr"]) == pytest.approx(0.1 * rates["wide.weight"])
    assert_committed(run, before, net, rates, decays, factors=FACTORS, decays={"wide.weight": 0.25, "experts[1]": 0.0})
    assert {name: float(one.lr) for name, one in controller.rates[0].items()} == rates


def test_rates_that_the_closure_sets_are_those_of_the_step(numbers: Numbers) -> None:
    run = Run(over(AdamW))
    group = run.optimizers[0].param_groups[0]
    group.update(lr=9.0, weight_decay=9.0)
    before, twin = run.parameters, run.twin(lr=0.25, weight_decay=0.0)
    twin.step(2)
    net = {name: tensor - before[name] for name, tensor in twin.parameters.items()}

    def closure() -> None:
        group.update(lr=0.25, weight_decay=0.5)
        run.feed(2)

    with run.attach(Deciding(scaling(FACTORS, numbers))):
        run.optimizers[0].step(closure)
    rates = dict.fromkeys(before, 0.25)
    assert_committed(run, before, net, rates, dict.fromkeys(before, 0.125), factors=FACTORS)


def test_rates_in_tensors_of_an_accelerator(numbers: Numbers) -> None:
    run = Run(over(AdamW, lr=torch.tensor(0.125).as_subclass(Elsewhere), foreach=False), torch.float32)
    before, net, rates, decays = run.parameters, run.net(2), run.rates, run.decays()
    controller, second = Deciding(*answers(numbers)), Joint()
    with run.attach(controller, second):
        run.step(2)
    assert isinstance(controller.rates[0]["wide.weight"].lr, Elsewhere)
    assert_committed(run, before, net, rates, decays, factors=FACTORS, decays={"wide.weight": 0.25, "experts[1]": 0.0})
    for name, tensor in second.net[0].items():
        expected = each(FACTORS, 1.0, name) * net[name]
        torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-6)


def test_a_session_without_decisions_on_single_parameters_has_no_rates() -> None:
    """It tries no optimizer out."""
    run = Run(over(AdamW))
    joint = Joint(jointly(0.5))
    with run.attach(joint):
        run.step(2)
    assert joint.rates == [{}]


# Several optimizers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skipped", [0, 1])
def test_of_a_joint_step_of_which_one_was_skipped_the_others_matrices_are_decided_on(
    skipped: int, numbers: Numbers
) -> None:
    run = Run(muon_and_adamw)
    before, net, rates, decays = run.parameters, run.net(2), run.rates, run.decays()
    of = ["wide.weight"] if skipped else [name for name in LAYERS if name != "wide.weight"]
    factors = {name: FACTORS[name] for name in of}
    controller = Deciding(scaling(factors, numbers), decaying({name: DECAYS[name] for name in of}, numbers))
    run.feed(2)
    with run.attach(controller):
        run.optimizers[1 - skipped].step()
    untouched = [name for name in before if (name == "wide.weight") is (skipped == 0)]
    assert controller.rates[0].keys() == before.keys() - set(untouched)
    assert_same_bits({name: run.parameters[name] for name in untouched}, {name: before[name] for name in untouched})
    for name in untouched:
        net[name] = torch.zeros_like(net[name])
        decays[name] = 0.0
    assert_committed(run, before, net, rates, decays, factors=factors, decays={name: DECAYS[name] for name in of})


@pytest.mark.parametrize("decided", ["scale", "decay"])
def test_a_decision_on_a_matrix_whose_optimizer_was_skipped_is_refused(decided: str) -> None:
    run = Run(muon_and_adamw)
    answer = (scaling if decided == "scale" else decaying)({"conv.weight": 0.5, "wide.weight": 0.5})
    run.feed(2)
    alone = run.twin()
    session = run.attach(Deciding(answer))
    alone.feed(2)
    alone.optimizers[1].step()
    run.optimizers[1].step()
    with pytest.raises(
        ConfigurationError,
        match=r"got a decision on 'wide\.weight' from Deciding, which the step did not move; expected the name",
    ):
        session.close()
    assert_same_bits(run.parameters, alone.parameters)


# Steps that leave a matrix out ------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [over(AdamW), over(SGD), over(Adafactor)], ids=lambda make: make.__name__)
def test_a_matrix_without_a_gradient_stays_where_the_optimizer_leaves_it(make: Make, numbers: Numbers) -> None:
    """Such as that of an expert that no token went to: it is skipped, and not decayed either."""
    run = Run(make)
    before, net, decays = run.parameters, run.net(2), run.decays()
    run.feed(2)
    run.model.wide.weight.grad = None
    controller = Deciding(scaling(FACTORS, numbers))
    with run.attach(controller):
        run.update()
    assert bits(run.parameters["wide.weight"]) == bits(before["wide.weight"])
    assert not controller.net[0]["wide.weight"].any()
    net["wide.weight"], decays["wide.weight"] = torch.zeros_like(net["wide.weight"]), 0.0
    assert_committed(run, before, net, run.rates, decays, factors=FACTORS)


def test_decay_lets_no_matrix_without_a_gradient_grow(numbers: Numbers) -> None:
    run = Run(over(AdamW))
    before = run.parameters["wide.weight"]
    run.feed(2)
    run.model.wide.weight.grad = None
    with run.attach(Deciding(decaying({"wide.weight": 0.25}, numbers))):
        run.update()
    # Skipped, as the optimizer skips it, or decayed as it was told to be.
    allowed = [before, before - 0.125 * 0.25 * before]
    assert any(torch.allclose(run.parameters["wide.weight"], one, rtol=0, atol=1e-14) for one in allowed)


@pytest.mark.parametrize("decided", ["scale", "decay"])
def test_a_fused_step_that_a_scaler_made_a_no_op_stays_one(decided: str, numbers: Numbers) -> None:
    run = Run(over(AdamW, fused=True), torch.float32)
    before = run.parameters
    answer = (scaling if decided == "scale" else decaying)(dict.fromkeys(LAYERS, 0.25), numbers)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with run.attach(Deciding(answer)):
        x = torch.ones(1, 5)
        run.feed(2)
        scaler.scale(run.model(x).sum()).backward()
        run.model.wide.weight.grad[0, 0] = math.inf
        scaler.step(run.optimizers[0])
        scaler.update()
    assert scaler.get_scale() == 2.0, "there was an overflow"
    assert_same_bits(run.parameters, before)


# Traces -----------------------------------------------------------------------------------------------------------


def test_traces_say_what_was_done_and_name_the_worst_layer(numbers: Numbers) -> None:
    run = Run(over(AdamW))
    reason = "{layer} was {sigma:.3g} over {limit}; {{braces}}."
    two = {"conv.weight": 0.5, "experts[2]": 0.25}
    saw = {"worst": numbers([1.0])[0], "sigma": numbers([2.5])[0], "limit": 1.0}
    controllers = [Deciding(scaling(two, numbers, reason, **saw)), Deciding(decaying(two, numbers, reason, **saw))]
    with run.attach(*controllers) as session:
        run.step(2)
        run.step(3)
    words = "experts[2] was 2.5 over 1.0; {braces}."
    expected = {"worst": 1.0, "sigma": 2.5, "limit": 1.0}
    assert [(one.step, one.controller, one.action, one.reason, dict(one.saw)) for one in session.interventions] == [
        (0, "Deciding", "scale", words, expected),
        (0, "Deciding-2", "decay", words, expected),
        (1, "Deciding", "scale", words, expected),
        (1, "Deciding-2", "decay", words, expected),
    ]


def test_words_without_a_worst_layer_are_as_they_stand(numbers: Numbers) -> None:
    run = Run(over(AdamW))
    with run.attach(Deciding(scaling({"conv.weight": 0.5}, numbers, "{layer}, {x:.1f}", x=2.0))) as session:
        run.step(2)
    assert [one.reason for one in session.interventions] == ["{layer}, {x:.1f}"]


def test_a_decay_without_a_reason_leaves_no_trace_and_is_carried_out(numbers: Numbers) -> None:
    run = Run(over(AdamW))
    before, net = run.parameters, run.net(2)
    saw = {"worst": numbers([0.0])[0]}
    with run.attach(Deciding(decaying(DECAYS, numbers, None, **saw))) as session:
        run.step(2)
        assert session.interventions == ()
        assert session.latest.value("redline_interventions_total", controller="Deciding", action="decay") == 0
    assert_committed(run, before, net, run.rates, run.decays(), decays=DECAYS)
    assert not session.report().to_dict()["interventions"]


def test_interventions_are_counted_by_action_from_the_start(numbers: Numbers) -> None:
    run = Run(over(AdamW))
    with run.attach(Deciding(at(1, scaling(FACTORS, numbers)), decaying(DECAYS, numbers))) as session:
        total = session.latest.series("redline_interventions_total")
        assert total["Deciding", "scale"] == total["Deciding", "decay"] == 0
        for seed in range(3):
            run.step(seed)
        total = session.latest.series("redline_interventions_total")
    assert (total["Deciding", "scale"], total["Deciding", "decay"]) == (1, 3)
    assert sum(total.values()) == 4


def test_on_an_accelerator_nobody_waits_and_the_trace_is_told_later() -> None:
    def reads(numbers: Numbers) -> tuple[list[str], redline.Session]:
        run = Run(over(AdamW, fused=True), torch.float32)
        saw = {"worst": numbers([0.0])[0], "share": numbers([0.3])[0]}
        told = (scaling(FACTORS, numbers, "{share:.1f} of {layer}.", **saw), decaying(DECAYS, numbers, "decay", **saw))
        joint = Joint(jointly(numbers([0.5])[0]), needs=Need.UPDATE)
        session = run.attach(Deciding(*told), joint)
        run.step(2)  # at the first what optimizers keep is looked at
        run.feed(3)
        with HostReads() as found:
            run.update()
        return found.seen, session

    seen, session = reads(elsewhere)
    assert seen == []
    told = [(one.step, one.action, one.reason) for one in session.interventions]
    each_step = [("scale", "0.3 of experts[0]."), ("decay", "decay"), ("scale", "jointly.")]
    assert told == [(step, *one) for step in range(2) for one in each_step]
    total = session.latest.series("redline_interventions_total")
    assert (total["Deciding", "scale"], total["Deciding", "decay"], total["Joint", "scale"]) == (2, 2, 2)
    session.close()
    seen, session = reads(host)
    assert seen != [], "what is on the host is looked at"
    session.close()


@pytest.mark.parametrize(
    "second",
    [decaying(DECAYS, elsewhere, "second."), scaling(FACTORS, host, "second.")],
    ids=["a decay", "of the host"],
)
def test_on_an_accelerator_traces_are_told_oldest_first(second: Answer) -> None:
    """Also if a later one has nothing that would have to be waited for."""
    run = Run(over(AdamW))
    first = scaling(FACTORS, elsewhere, "first.")
    with run.attach(Deciding(at(0, first), at(1, second))) as session:
        run.step(2)
        run.step(3)
    assert [(one.step, one.reason) for one in session.interventions] == [(0, "first."), (1, "second.")]


def test_on_an_accelerator_the_run_is_that_of_the_host() -> None:
    def run(numbers: Numbers) -> tuple[dict[str, Tensor], Any, Any, Any]:
        one = Run(muon_and_adamw)
        change = {
            1: scaling(FACTORS, numbers, "{layer}", worst=numbers([2.0])[0]),
            2: decaying(DECAYS, numbers, "{layer}", worst=numbers([3.0])[0]),
        }
        change[3] = scaling(dict.fromkeys(LAYERS, 1.0), numbers)
        controller = Deciding(*(at(index, answer) for index, answer in change.items()))
        with one.attach(controller, Joint(at(2, jointly(numbers([0.5])[0])))) as session:
            for seed in range(5):
                one.step(seed)
            latest = session.latest
        return one.parameters, one.state, session.interventions, latest.series("redline_interventions_total")

    on_host, on_device = run(host), run(elsewhere)
    for name, tensor in on_host[0].items():
        torch.testing.assert_close(on_device[0][name], tensor, rtol=1e-13, atol=1e-14)
    assert on_device[1:] == on_host[1:]
    assert [one.action for one in on_host[2]] == ["scale", "decay", "scale"]


# Readings ---------------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """Logits that are linear in the one parameter: a scaled step has exactly a scaled r."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 20) / 20)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class LinearStack(nn.Module):
    """The same of a stack."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 4, 20) / 20)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.sum(0).T


def learn(run: Run) -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(16, 20, generator=generator, dtype=torch.float64)
    run.optimizers[0].zero_grad()
    F.cross_entropy(run.model(x), torch.arange(16) % 4).backward()
    run.update()


def measuring(factor: float) -> Answer:
    def answer(step: Step) -> Iterable[Scale]:
        assert step.tangent(None) is not None
        return [Scale(factor, "jointly.")]

    return answer


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_the_committed_size_is_that_of_what_matrix_decisions_left_if_someone_measured_it(
    factor: float, numbers: Numbers
) -> None:
    run = Run(over(SGD, weight_decay=0.0), model=Linear, steps=0)
    controllers = [Deciding(scaling({"weight": 0.25}, numbers)), Joint(measuring(factor), needs=Need.TANGENT)]
    with run.attach(*controllers, monitors=[redline.GhostRadius(1, max_samples=None)]) as session:
        learn(run)
        latest = session.latest
    proposed = latest.value("redline_normalized_step_size")
    assert latest.value("redline_committed_step_size") == pytest.approx(0.25 * factor * proposed, rel=1e-9)
    assert latest.value("redline_step_scale") == factor


@pytest.mark.parametrize("decided", ["scale", "decay"])
def test_the_committed_size_is_absent_where_nobody_measured_what_was_left(decided: str, numbers: Numbers) -> None:
    run = Run(over(SGD), model=Linear, steps=0)
    answer = (scaling if decided == "scale" else decaying)({"weight": 0.25}, numbers)
    with run.attach(Deciding(at(1, answer)), monitors=[redline.GhostRadius(1, max_samples=None)]) as session:
        learn(run)
        latest = session.latest
        assert latest.value("redline_committed_step_size") == latest.value("redline_normalized_step_size")
        learn(run)
        assert "redline_committed_step_size" not in session.latest
        assert session.latest.value("redline_step_scale") == 1


@pytest.mark.parametrize(("model", "names"), [(Linear, ["weight"]), (LinearStack, ["weight[0]", "weight[1]"])])
def test_factors_of_one_leave_the_committed_size_as_measured(model: type[nn.Module], names: list[str]) -> None:
    run = Run(over(SGD), model=model, steps=0)
    same = Deciding(scaling(dict.fromkeys(names, 1.0)))
    with run.attach(same, monitors=[redline.GhostRadius(1, max_samples=None)]) as session:
        learn(run)
        latest = session.latest
    assert latest.value("redline_committed_step_size") == latest.value("redline_normalized_step_size")


def test_a_decay_equal_to_the_groups_leaves_the_committed_size_as_measured() -> None:
    run = Run(over(SGD), model=Linear, steps=0)
    same = Deciding(decaying({"weight": WD}, reason=None))
    with run.attach(same, monitors=[redline.GhostRadius(1, max_samples=None)]) as session:
        learn(run)
        latest = session.latest
    assert latest.value("redline_committed_step_size") == latest.value("redline_normalized_step_size")


class ReadsOut(Deciding):
    """Reads something of each matrix, and keeps what it was shown."""

    def read_out(self, step: Step, readings: Readings) -> None:
        self.weights = {name: tensor.detach().clone() for name, tensor in step.weights.items()}
        self.in_force = dict(step.rates)
        names = [layer.name for layer in step.layers]
        values = torch.arange(len(names)) + 10.0 * step.index
        readings.layers(metrics.WEIGHT_DECAY_IN_FORCE, names, values, values != 1)


def test_readings_of_a_controller_reach_the_snapshot(numbers: Numbers) -> None:
    run = Run(over(AdamW))
    with run.attach(ReadsOut(decaying({"wide.weight": 0.25}, numbers))) as session:
        run.step(2)
        values = session.latest.layers("redline_weight_decay_in_force")
        assert values == {name: float(k) for k, name in enumerate(LAYERS) if k != 1}
        run.step(3)
        assert session.latest.layers("redline_weight_decay_in_force")["experts[2]"] == 12.0


def test_readings_are_asked_for_when_all_have_decided() -> None:
    run = Run(over(AdamW))
    first, second = ReadsOut(), Deciding(decaying({"wide.weight": 0.25}))
    with run.attach(first, second):
        run.step(2)
    assert first.rates[0]["wide.weight"].weight_decay == WD
    assert first.in_force["wide.weight"].weight_decay == 0.25


# The order of the controllers -------------------------------------------------------------------------------------


def test_what_lengthens_first_then_single_matrices_then_the_rest() -> None:
    """So that clamps have the last word."""
    asked: list[str] = []

    def note(name: str, *decisions: Answer) -> tuple[Answer, ...]:
        return (lambda step: (asked.append(name), [])[1], *decisions)

    run = Run(over(AdamW))
    before, net = run.parameters, run.net(2)
    controllers = [
        Joint(*note("joint", jointly(0.5))),
        Lengthening(*note("lengthening", jointly(3.0))),
        Joint(*note("another joint")),
        Deciding(*note("scaling", scaling(FACTORS))),
        Deciding(*note("decaying", decaying(DECAYS))),
        Lengthening(*note("another lengthening")),
    ]
    with run.attach(*controllers) as session:
        run.step(2)
    assert asked == ["lengthening", "another lengthening", "scaling", "decaying", "joint", "another joint"]
    assert_committed(run, before, net, run.rates, run.decays(), factors=FACTORS, decays=DECAYS, joint=1.5)
    assert [one.controller for one in session.interventions] == ["Lengthening", "Deciding", "Deciding-2", "Joint"]
    assert session.latest.value("redline_step_scale") == 1.5
    left = [dict.fromkeys(LAYERS, 1.0), dict.fromkeys(LAYERS, 3.0), {name: 3.0 * FACTORS[name] for name in LAYERS}]
    for controller, factors in zip((controllers[1], controllers[3], controllers[0]), left, strict=True):
        for name in set(net) - {"wide.bias"}:
            expected = each(factors, 1.0, name) * net[name]
            torch.testing.assert_close(controller.net[0][name], expected, rtol=0, atol=1e-13)


# Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [scaling({"wide.weight": 0.5}), decaying({"wide.weight": 0.5})])
@pytest.mark.parametrize("kind", [Joint, Lengthening])
def test_decisions_on_matrices_from_a_controller_of_the_joint_step_are_refused(
    kind: type[Deciding], answer: Answer
) -> None:
    run = Run(over(AdamW))
    alone = run.twin()
    alone.step(2)
    with run.attach(kind(answer)):
        with pytest.raises(
            ControllerError, match=rf"{kind.__name__} failed at step 0 .*expected per_parameter = True on it"
        ):
            run.step(2)
        assert_same_bits(run.parameters, alone.parameters)


@pytest.mark.parametrize("answer", [scaling({"wide.weight": 0.5}), decaying({"wide.weight": 0.5})])
def test_decisions_on_an_update_that_nobody_kept_are_refused(answer: Answer) -> None:
    class Blind(redline.Controller):
        per_parameter, needs = True, Need.GRADIENTS

        def inspect(self, step: Step) -> Iterable[Any]:
            return answer(step)

    run = Run(over(AdamW))
    with run.attach(Blind()), pytest.raises(ControllerError, match=r"expected Need\.UPDATE in it"):
        run.step(2)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1)])
@pytest.mark.parametrize(("kind", "what"), [(ScaleMatrices, "factors"), (Decay, "weight decays")])
def test_another_number_of_factors_than_of_matrices_is_refused(
    kind: type[ScaleMatrices] | type[Decay], what: str, shape: tuple[int, ...]
) -> None:
    layers = [MatrixLayer(name, name, 7, 5) for name in ("one", "two")]
    match = rf"got {what} of shape .* for 2 matrices; expected one each"
    with pytest.raises(ConfigurationError, match=match):
        kind(layers, torch.ones(shape), "as told.")
    run = Run(over(AdamW))
    with (
        run.attach(Deciding(lambda step: [kind(step.layers[:2], torch.ones(shape), "as told.")])),
        pytest.raises(ConfigurationError, match=match),
    ):
        run.step(2)


@pytest.mark.parametrize("decided", ["scale", "decay"])
def test_a_decision_on_a_matrix_that_no_optimizer_holds_is_refused(decided: str, numbers: Numbers) -> None:
    run = Run(lambda model: [AdamW([model.wide.weight, model.experts], 0.125, weight_decay=WD)])
    alone = run.twin()
    alone.step(2)
    answer = (scaling if decided == "scale" else decaying)({"wide.weight": 0.5, "conv.weight": 0.5}, numbers)
    with run.attach(Deciding(answer)):
        with pytest.raises(
            ConfigurationError, match=r"got a decision on 'conv\.weight' from Deciding, which the step did not move"
        ):
            run.step(2)
        assert_same_bits(run.parameters, alone.parameters)


@optimizers(COUPLED)
def test_a_decay_in_place_of_a_coupled_one_is_refused(make: Make, numbers: Numbers) -> None:
    run = Run(make)
    alone = run.twin()
    alone.step(2)
    with run.attach(Deciding(decaying(DECAYS, numbers))):
        kind = type(run.optimizers[0]).__name__
        with pytest.raises(
            ConfigurationError,
            match=r"got a weight decay for 'experts' from Deciding; expected one that can be told from the rest of the "
            rf"update: the weight decay of {kind} is not decoupled",
        ):
            run.step(2)
        assert_same_bits(run.parameters, alone.parameters)


def test_of_a_refused_step_nothing_is_carried_out_and_the_run_can_go_on(numbers: Numbers) -> None:
    run = Run(
        lambda model: [
            Adam([model.wide.weight], 0.125, weight_decay=WD),
            AdamW([model.conv.weight, model.experts], 0.125, weight_decay=WD),
        ]
    )
    alone = run.twin()
    alone.step(2)
    wrong = decaying({"conv.weight": 0.1, "wide.weight": 0.1}, numbers)
    with run.attach(Deciding(scaling({"experts[1]": 0.1}, numbers), at(0, wrong))):
        with pytest.raises(ConfigurationError, match=r"got a weight decay for 'wide\.weight'"):
            run.step(2)
        assert_same_bits(run.parameters, alone.parameters)
        before, net = run.parameters, run.net(3)
        coupled = run.twin()
        coupled.step(3)
        run.step(3)
    assert bits(run.parameters["wide.weight"]) == bits(coupled.parameters["wide.weight"])
    expected = before["experts"] * (1 - 0.125 * WD) + each({"experts[1]": 0.1}, 1.0, "experts") * net["experts"]
    torch.testing.assert_close(run.parameters["experts"], expected, rtol=0, atol=1e-14)


# The beginning ----------------------------------------------------------------------------------------------------


class Beginning(Deciding):
    """Keeps what it is told when a session begins."""

    def __init__(self, refuse: str | None = None, say: Sequence[str] = (), **attributes: Any) -> None:
        super().__init__(**attributes)
        self.refuse, self.say = refuse, say
        self.begun: list[RunOutline] = []

    def begin(self, run: RunOutline) -> None:
        self.begun.append(run)
        for text in self.say:
            run.note(text)
        if self.refuse:
            raise ConfigurationError(self.refuse)


def test_a_controller_is_told_once_what_it_is_to_control() -> None:
    run = Run(muon_and_adamw)
    run.model.conv.weight.requires_grad_(False)
    run.model.conv.weight.grad = None
    controller = Beginning()
    with run.attach(controller, Beginning(per_parameter=False)):
        assert len(controller.begun) == 1, "ahead of any step"
        run.feed(2)
        run.update()
        run.step(3)
    (outline,) = controller.begun
    assert [layer.name for layer in outline.layers] == LAYERS
    assert list(outline.optimizers) == run.optimizers
    decoupled = dict.fromkeys(run.parameters, (0.125, WD, None)) | {"wide.weight": (0.25, 0.3, None)}
    assert {name: tuple(rates) for name, rates in outline.rates.items()} == decoupled, "frozen ones too"
    with run.attach(controller):
        pass
    assert len(controller.begun) == 2, "once a session"


def test_a_controller_is_told_which_decay_is_coupled() -> None:
    run = Run(over(Adam))
    controller = Beginning()
    with run.attach(controller):
        pass
    reasons = {rates.coupled for rates in controller.begun[0].rates.values()}
    assert len(reasons) == 1
    assert "the weight decay of Adam is not decoupled" in str(reasons)


def test_what_a_controller_says_at_the_beginning_is_a_warning_and_a_note_under_its_name() -> None:
    run = Run(over(AdamW))
    first, second = Beginning(), Beginning(say=["this and that.", "this and that."])
    with pytest.warns(RedlineWarning, match=r"Beginning-2: this and that\.") as caught:
        session = run.attach(first, second)
    assert len(caught) == 1
    assert session.notes == ("Beginning-2: this and that.",)
    session.close()


def test_a_controller_that_refuses_the_run_is_heard_and_nothing_stays_behind() -> None:
    run = Run(over(AdamW))
    alone = run.twin()

    def hooks() -> list[int]:
        return [
            len(run.optimizers[0]._optimizer_step_pre_hooks),
            len(run.optimizers[0]._optimizer_step_post_hooks),
            *(len(module._forward_pre_hooks) for module in run.model.modules()),
        ]

    before = hooks()
    controller = Beginning(refuse="got that; expected this.")
    with pytest.raises(ConfigurationError, match=r"^got that; expected this\.$"):
        run.attach(controller)
    assert hooks() == before
    run.step(2)
    alone.step(2)
    assert_same_bits(run.parameters, alone.parameters)
    assert controller.seen == [], "there is no session that would ask it"


# The transaction alone --------------------------------------------------------------------------------------------


def transaction(dtype: torch.dtype = torch.float64) -> tuple[StepTransaction, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    before, after = (torch.randn(3, 4, 5, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    parameter = nn.Parameter(before.clone())
    made = StepTransaction()
    made.save({"one": parameter})
    with torch.no_grad():
        parameter.copy_(after)
    return made, parameter, before, after


FORMS: list[Callable[[float], Any]] = [
    float,
    lambda value: torch.tensor(value, dtype=torch.float64),
    lambda value: torch.full((3, 1, 1), value, dtype=torch.float64),
]


@pytest.mark.parametrize("forms", list(itertools.product(FORMS, repeat=2)), ids=lambda forms: "")
def test_shares_as_floats_and_as_tensors_commit_the_same(forms: Sequence[Callable[[float], Any]]) -> None:
    first, second = forms
    made, parameter, before, after = transaction()
    made.shrink("one", first(0.125))
    made.scale_net("one", second(0.3), first(0.25))
    made.scale(first(0.5), ["one"])
    made.shrink("one", second(-0.0625))
    # p + d W is q; then less 0.125 W, so that 0.375 W of decay would be in force; told 0.25, the rest is scaled too.
    update, decay = after - before, 0.25
    left = update - 0.125 * before
    left = 0.3 * (left + decay * before) - decay * before
    left = 0.5 * left + 0.0625 * before
    torch.testing.assert_close(made.update()["one"], left, rtol=0, atol=1e-14)
    made.commit()
    torch.testing.assert_close(parameter.detach(), before + left, rtol=0, atol=1e-14)


@pytest.mark.parametrize("form", FORMS, ids=["float", "0-d", "stack"])
def test_shrinking_by_nothing_and_back_leaves_the_bits(form: Callable[[float], Any]) -> None:
    made, parameter, _, after = transaction(torch.float32)
    made.shrink("one", form(0.0))
    made.shrink("one", form(0.25))
    made.shrink("one", form(-0.25))
    made.scale_net("one", form(1.0), form(0.5))
    made.commit()
    assert bits(parameter) == bits(after)


def test_shrinking_alone_starts_from_what_the_optimizer_wrote() -> None:
    """To take the update first would lose what of a small result is left of a large parameter."""
    made, parameter = StepTransaction(), nn.Parameter(torch.full((3,), 2.0**20))
    made.save({"one": parameter})
    with torch.no_grad():
        parameter.fill_(1.1)
    made.shrink("one", 2.0**-20)
    made.commit()
    torch.testing.assert_close(parameter.detach(), torch.full((3,), 0.1), rtol=0, atol=1e-7)


def test_decisions_end_with_their_commit() -> None:
    made, parameter, before, after = transaction()
    made.scale_net("one", 0.5, 0.25)
    made.commit()
    once = parameter.detach().clone()
    torch.testing.assert_close(once, before + 0.5 * (after - before) - 0.125 * before, rtol=0, atol=1e-14)
    made.commit()
    assert torch.equal(parameter, once)
    torch.testing.assert_close(made.update()["one"], once - before, rtol=0, atol=0)
    made.scale(0.0)
    made.close()
    assert (made.parameters, made.before, made.update()) == ({}, {}, {})
    made.commit()
    assert torch.equal(parameter, once)


def test_whether_a_decision_acts_is_told_from_its_numbers_or_its_words() -> None:
    layers = [MatrixLayer("one", "one", 7, 5)]
    assert bool(ScaleMatrices(layers, torch.tensor([0.5]), "").acts)
    assert not bool(ScaleMatrices(layers, torch.tensor([1.0]), "").acts)
    assert ScaleMatrices(layers, torch.tensor([math.nan]), "").acts
    assert Decay(layers, torch.tensor([0.5]), "").acts is True
    assert Decay(layers, torch.tensor([0.5]), None).acts is False
    assert not bool(ScaleMatrices((), torch.zeros(0), "").acts)
