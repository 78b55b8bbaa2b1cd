"""What the tests of decisions on single matrices share: controllers that decide as told, and a run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytest
import torch
from bits import frozen
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Muon, Optimizer, RMSprop

import redline
from redline import (
    Decay,
    Scale,
    ScaleMatrices,
    Step,
)
from redline.parameters import MatrixLayer

Answer = Callable[[Step], Iterable[Any]]


Make = Callable[[nn.Module], list[Optimizer]]


Numbers = Callable[[Sequence[float]], Tensor]


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


FACTORS = dict(zip(LAYERS, (0.5, 1.0, 0.0625, 0.3, 0.0, 1.7), strict=True))


DECAYS = dict(zip(LAYERS, (3.0, WD, 0.05, 0.2, 0.0, 1.5), strict=True))


def answers(numbers: Numbers) -> tuple[Answer, Answer]:
    return scaling(FACTORS, numbers), decaying({"wide.weight": 0.25, "experts[1]": 0.0}, numbers)
