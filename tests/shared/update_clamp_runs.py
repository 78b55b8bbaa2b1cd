"""What the tests of UpdateClamp share: optimizers, a run, and a reference that takes singular values in float64."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from bits import frozen
from torch import Tensor, nn
from torch.optim import Optimizer

import redline
import redline.spectrum_tracker
import redline.update_limits
from redline.numerics import top_singular_values

FEATURES, CLASSES, BATCH = 12, 5, 16


CEILING = "redline_weight_spectral_ceiling"


TOLERANCE = 1e-3  # of sigma_1, as asked for


class SGDW(Optimizer):
    """SGD with momentum and decoupled weight decay (arXiv 1711.05101, algorithm 1)."""

    def __init__(
        self, parameters: Any, lr: float | Tensor, momentum: float = 0.9, weight_decay: float | Tensor = 0.0
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    buffer = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                    buffer.mul_(group["momentum"]).add_(parameter.grad)
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * buffer)


class Lion(Optimizer):
    """The sign of an average of gradients (arXiv 2302.06675, algorithm 2)."""

    def __init__(
        self, parameters: Any, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            fast, slow = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is not None:
                    average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
                    sign = average.lerp(parameter.grad, 1 - fast).sign()
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * sign)
                    average.lerp_(parameter.grad, 1 - slow)


Optimizers = Callable[[nn.Module], list[Optimizer]]


def sgd(model: nn.Module) -> list[Optimizer]:
    """Without momentum torch's decay is decoupled."""
    return [torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.5)]


def sgdw(model: nn.Module) -> list[Optimizer]:
    return [SGDW(model.parameters(), 0.1, weight_decay=0.5)]


def adamw(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.5)]


def adamw_fused(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.5, fused=True)]


def lion(model: nn.Module) -> list[Optimizer]:
    return [Lion(model.parameters(), 3e-3, weight_decay=1.0)]


def muon_and_adamw(model: nn.Module) -> list[Optimizer]:
    """The last matrix is AdamW's, as a head mostly is."""
    *matrices, head = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() != 2]
    return [
        torch.optim.Muon(matrices, 0.02, weight_decay=0.5),
        torch.optim.AdamW([head, *vectors], 1e-2, weight_decay=0.2),
    ]


EITHER_WAY = pytest.mark.parametrize("relative_to", ["fan", "weight"])


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 20), nn.Tanh(), nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, FEATURES, generator=generator)
    return x, torch.randint(0, CLASSES, (BATCH,), generator=generator)


class Rate(NamedTuple):
    lr: float
    weight_decay: float

    @property
    def decay(self) -> float:
        return self.lr * self.weight_decay


class Run:
    """A model with its optimizers; two made alike are alike."""

    def __init__(self, optimizers: Optimizers = adamw, model: Callable[[], nn.Module] = plain) -> None:
        torch.manual_seed(0)
        self.model = model()
        self.optimizers = optimizers(self.model)

    def backward(self, seed: int) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        x, y = batch(seed)
        F.cross_entropy(self.model(x), y).backward()

    def give(self, seed: int, sizes: Mapping[str, float]) -> None:
        """Random gradients, of the sizes given for parameters whose names begin so, else of size 1."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.model.named_parameters():
            size = next((size for start, size in sizes.items() if name.startswith(start)), 1.0)
            parameter.grad = size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)

    def update(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def step(self, seed: int) -> None:
        self.backward(seed)
        self.update()

    def attach(self, *controllers: redline.Controller, **arguments: Any) -> redline.Session:
        arguments = {"monitors": [], **arguments}
        return redline.attach(self.model, self.optimizers, controllers=controllers, **arguments)

    def uncontrolled(self) -> Run:
        """A copy, which nobody watches."""
        twin = copy.copy(self)
        twin.model, twin.optimizers = copy.deepcopy((self.model, self.optimizers))
        for mine, its in zip(self.model.parameters(), twin.model.parameters(), strict=True):
            its.grad = None if mine.grad is None else mine.grad.clone()
        return twin

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    @property
    def rates(self) -> dict[str, Rate]:
        """As the groups have them; all that decays here is decoupled."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return {
            names[id(parameter)]: Rate(float(group["lr"]), float(group.get("weight_decay", 0.0)))
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }

    @property
    def everything(self) -> Any:
        return frozen(self.model.state_dict()), [frozen(optimizer.state_dict()) for optimizer in self.optimizers]


def prepared(optimizers: Optimizers = adamw, model: Callable[[], nn.Module] = plain) -> Run:
    """Two steps in, so that moments are there."""
    run = Run(optimizers, model)
    run.step(1)
    run.step(2)
    return run


def top(matrix: Tensor) -> float:
    """The largest singular value, in float64."""
    return float(torch.linalg.svdvals(matrix.detach().double())[0])


def fan(matrix: Tensor) -> float:
    return math.sqrt(matrix.shape[0] / matrix.shape[1])


def limit_of(before: Tensor, limit: float, relative_to: str, rate: Rate) -> float:
    return limit * (rate.lr * fan(before) if relative_to == "fan" else top(before))


def net(before: Tensor, after: Tensor, decay: float) -> Tensor:
    """The update net of decoupled decay."""
    return after.double() - (1 - decay) * before.double()


def assert_held(before: Tensor, own: Tensor, actual: Tensor, limit: float, decay: float) -> bool:
    """One matrix under a limit of ``sigma_1``, ``own`` being what the optimizer alone makes of it.

    Returns:
        Whether it was over.
    """
    proposed, committed = net(before, own, decay), net(before, actual, decay)
    sigma = top(proposed)
    if sigma <= limit * (1 - 2 * TOLERANCE):
        assert frozen(actual) == frozen(own), "under the limit it is the optimizer's own"
        return False
    if sigma > limit:
        assert top(committed) <= limit * (1 + TOLERANCE), "within the limit"
        assert top(committed) >= limit * (1 - 2 * TOLERANCE), "and as long as allowed"
    factor = (committed * proposed).sum() / proposed.square().sum()
    expected = (1 - decay) * before.double() + factor * proposed
    rounding = 2 * torch.finfo(actual.dtype).eps * (before.double().abs() + proposed.abs())
    bound = rounding + 1e-5 * proposed.abs().amax()  # the factor is fitted to what was rounded
    assert bool(((actual.double() - expected).abs() <= bound).all()), "the same way, with the whole of the decay"
    return sigma > limit


def assert_all_held(
    before: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    actual: Mapping[str, Tensor],
    limit: float,
    relative_to: str,
    rates: Mapping[str, Rate],
) -> list[bool]:
    """Vectors untouched; of the matrices, whether each was over."""
    over = []
    for name in before:
        if before[name].dim() == 1:
            assert frozen(actual[name]) == frozen(own[name]), name
        else:
            at_most = limit_of(before[name], limit, relative_to, rates[name])
            over.append(assert_held(before[name], own[name], actual[name], at_most, rates[name].decay))
    return over


class Decaying(redline.Controller):
    """Decays matrices by decays of its own."""

    per_parameter = True

    def __init__(self, decays: Callable[[int], Mapping[str, float]]) -> None:
        self.decays = decays

    def inspect(self, step: redline.Step) -> Iterable[redline.Decay]:
        wanted = self.decays(step.index)
        layers = [layer for layer in step.layers if layer.name in wanted]
        return [redline.Decay(layers, torch.tensor([wanted[layer.name] for layer in layers]), "so.")] if layers else []


class Stacks(nn.Module):
    """Experts in one parameter, heads of experts, and position embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(0.3 * torch.randn(4, 7, 5))
        self.heads = nn.Parameter(0.3 * torch.randn(2, 3, 4, 6))
        self.position = nn.Parameter(0.3 * torch.randn(1, 6, 9))
        self.token = nn.Parameter(0.3 * torch.randn(1, 1, 9))


def whole(tensor: Tensor) -> list[Tensor]:
    return [tensor.flatten(1)]


def accelerate(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, tensors pass for those of an accelerator wherever Redline asks whether it would have to wait.

    Spectra are then taken as there: for a fixed number of iterations, nobody looking.
    """
    askers = {"is_on_host", "by_parameter", "inspect", "_kept"}
    real = torch._C.TensorBase.device.__get__

    def device(tensor: Tensor) -> Any:
        asking = sys._getframe(1)
        if asking.f_code.co_name in askers and asking.f_globals["__name__"].startswith("redline."):
            return SimpleNamespace(type="accelerator")
        return real(tensor)

    def begin() -> None:
        monkeypatch.setattr(torch.Tensor, "device", property(device), raising=False)
        unwatched = partial(top_singular_values, watched=False)
        monkeypatch.setattr("redline.spectrum_tracker.top_singular_values", unwatched)

    return begin
