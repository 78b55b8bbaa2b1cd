"""Weight decay: which part of an update it is, and whether it can be told from the rest.

Decoupled decay moves a parameter by ``-lr * wd * theta`` whatever its gradient, so that ``p = q - lr * wd * theta``
with ``q`` the update net of decay. Which optimizers decay so is not known by name: each is asked, on a scratch copy.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

_STEPS = 4  # momentum tells coupled decay from decoupled only at the second
_SHAPE = (8, 2)  # not square: rates adjusted to the shape differ from the group's
_LEARNING_RATE, _WEIGHT_DECAY = 0.5, 0.5  # large, so that a rate that drifts from the group's shows
_TOLERANCE = 1e-6  # some compute in float32
# Settings that ask for another device, a graph or a loss scale.
_PLAIN = {"foreach": False, "fused": False, "capturable": False, "differentiable": False}
_LOSS_SCALE = ("grad_scale", "found_inf")


class Rates(NamedTuple):
    """What one parameter's update goes by.

    Attributes:
        lr: learning rate: its group's, times what the whole update was scaled by; a float, or a 0-d tensor.
        weight_decay: its group's, or what a controller put in its place; for a stack of matrices a tensor that
            broadcasts against the parameter if they differ. 0 where the decay is not decoupled.
        coupled: why the group's decay cannot be told from the rest of the update, or None where it can.
    """

    lr: float | Tensor
    weight_decay: float | Tensor
    coupled: str | None

    @property
    def decay(self) -> float | Tensor:
        """``lr * wd``, the share of itself by which decoupled decay shrank the parameter; 0 for none."""
        return self.lr * self.weight_decay


class DecayRules:
    """How the parameter groups of a session's optimizers decay; each is tried out once."""

    def __init__(self) -> None:
        self._coupled: dict[tuple[Optimizer, int], str | None] = {}

    def rates(self, optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Rates]:
        """The rates of the named parameters, as the groups have them now."""
        names = {id(parameter): name for name, parameter in parameters.items()}
        found: dict[str, Rates] = {}
        for place, group in enumerate(optimizer.param_groups):
            lr, weight_decay = _kept(group.get("lr")), _kept(group.get("weight_decay"))
            coupled = None
            if group.get("lr") is None:
                coupled = f"{type(optimizer).__name__} has no learning rate in its groups"
            elif isinstance(weight_decay, Tensor) or weight_decay:
                if (optimizer, place) not in self._coupled:
                    self._coupled[optimizer, place] = why_coupled(optimizer, group)
                coupled = self._coupled[optimizer, place]
            rates = Rates(lr, 0.0 if coupled else weight_decay, coupled)
            found.update({names[id(p)]: rates for p in group["params"] if id(p) in names})
        return found

    def rates_of_step(self, optimizer: Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Rates]:
        """The same for the step about to be made: 0 where none is, without a gradient or after an overflow."""
        skipped = getattr(optimizer, "found_inf", None)  # a GradScaler leaves it to fused optimizers
        rates = self.rates(optimizer, parameters)
        left: dict[Rates, Rates] = {}  # one a group
        for name, one in rates.items():
            if parameters[name].grad is None:
                rates[name] = one._replace(lr=0.0)
            elif isinstance(skipped, Tensor):
                if one not in left:
                    left[one] = one._replace(lr=_kept(one.lr * (1 - skipped.to(parameters[name].device))))
                rates[name] = left[one]
        return rates


def why_coupled(optimizer: Optimizer, group: Mapping[str, Any]) -> str | None:
    """Why the decay of a group's parameters cannot be told from the rest of their updates, or None where it can.

    Two scratch copies of the optimizer are given the same gradients, one with decay and one without, from the same
    weights at each of a few steps: decay that is decoupled, at the group's own rate, is all they differ by.
    """
    name = type(optimizer).__name__
    try:
        decoupled = _differ_by_decoupled_decay(optimizer, group)
    except Exception as error:  # noqa: BLE001 an optimizer of any kind; the run goes on without what needs this
        return f"{name} could not be tried out on a scratch parameter ({type(error).__name__}: {error})"
    return (
        None
        if decoupled
        else f"the weight decay of {name} is not decoupled from the gradient, or does not go by the group's rate"
    )


def _differ_by_decoupled_decay(optimizer: Optimizer, group: Mapping[str, Any]) -> bool:
    generator = torch.Generator().manual_seed(0)

    def drawn() -> Tensor:
        return torch.randn(_SHAPE, generator=generator, dtype=torch.float64, device="cpu")

    decayed, plain = nn.Parameter(drawn()), nn.Parameter(drawn())
    twins = [_scratch(optimizer, group, decayed, _WEIGHT_DECAY), _scratch(optimizer, group, plain, 0.0)]
    # Some round at random, and some compile.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.compiler.set_stance("force_eager"):
        for _ in range(_STEPS):
            before, gradient = decayed.detach().clone(), drawn()
            plain.detach().copy_(before)
            decayed.grad, plain.grad = gradient, gradient.clone()
            for twin in twins:
                step: Any = type(twin).step
                # torch's wrapper calls the hooks that are on all optimizers.
                (step.__wrapped__ if getattr(step, "hooked", False) else step)(twin)
            expected = -_LEARNING_RATE * _WEIGHT_DECAY * before
            if not torch.allclose(decayed.detach() - plain.detach(), expected, rtol=0, atol=_TOLERANCE):
                return False
    return True


def _scratch(optimizer: Optimizer, group: Mapping[str, Any], parameter: nn.Parameter, weight_decay: float) -> Optimizer:
    """An optimizer of the same class and settings over one parameter, without state, hooks or schedulers.

    Raises:
        TypeError: it is built around something that trains: a copy might move the run's own parameters.
    """
    twin: Optimizer = object.__new__(type(optimizer))
    own = {
        key: value
        for key, value in vars(optimizer).items()
        if key not in ("state", "param_groups", "step", *_LOSS_SCALE) and not key.endswith("_hooks")
    }  # schedulers wrap the instance's step
    settings = {key: value for key, value in group.items() if key not in ("params", "lr", "weight_decay")}
    for leaf in tree_leaves([list(own.values()), list(settings.values())]):
        if isinstance(leaf, (Optimizer, nn.Module, nn.Parameter)):
            raise TypeError(f"it is built around a {type(leaf).__name__}")

    def copied(leaf: Any) -> Any:
        return leaf.detach().clone() if isinstance(leaf, Tensor) else copy.deepcopy(leaf, {id(optimizer): twin})

    vars(twin).update(tree_map(copied, own))
    vars(twin).update({key: OrderedDict() for key in vars(optimizer) if key.endswith("_hooks")})
    plain = {key: value for key, value in _PLAIN.items() if key in group}
    twin.defaults = {**twin.defaults, **plain}
    twin.state = defaultdict(dict)
    lr = torch.tensor(_LEARNING_RATE) if isinstance(group.get("lr"), Tensor) else _LEARNING_RATE  # of the same kind
    scratch_rates = {"params": [parameter], "lr": lr, "weight_decay": weight_decay}
    twin.param_groups = [{**tree_map(copied, settings), **plain, **scratch_rates}]
    return twin


def _kept(value: float | Tensor | None) -> float | Tensor:
    """A rate, 0 for none; a copy of one in a tensor, which a schedule may go on to change in place."""
    if not isinstance(value, Tensor):
        return float(value or 0.0)
    return float(value) if value.device.type == "cpu" else value.detach().clone()
