"""What the tests of SpikeGuard share: optimizers, schedulers, and a run that keeps its state of every step.

Each controlled run is held against a twin without Redline that does by hand, through ``state_dict`` and
``load_state_dict``, what the guard is said to do.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bits import frozen
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR, OneCycleLR
from torch.utils._pytree import tree_map
from torch_optimizers import adamw_fused, muon_and_adamw

import redline


class Net(nn.Module):
    """Two matrices around a BatchNorm, whose running statistics a roll-back has to bring back."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(torch.tanh(self.norm(self.body(x)))))


def sgd(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)]


def adamw_foreach(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.AdamW(model.parameters(), 1e-2, foreach=True, amsgrad=True)]


def adamw_with_a_rate_in_a_tensor(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.AdamW(model.parameters(), torch.tensor(1e-2), foreach=False)]


EVERY_OPTIMIZER = pytest.mark.parametrize(
    "optimizers", [sgd, adamw_foreach, adamw_fused, adamw_with_a_rate_in_a_tensor, muon_and_adamw]
)


def no_schedulers(optimizers: Sequence[Optimizer]) -> list[Any]:
    return []


def falling(optimizers: Sequence[Optimizer]) -> list[Any]:
    return [ExponentialLR(optimizer, 0.99) for optimizer in optimizers]


def one_cycle(optimizers: Sequence[Optimizer]) -> list[Any]:
    """Sets the momentum too."""
    return [OneCycleLR(optimizer, 0.1, total_steps=200) for optimizer in optimizers]


Spoil = Callable[["Run"], None]


class Run:
    """A model in training; two made alike are alike.

    Attributes:
        before: of a run with Redline, everything that training changes, by step, after backward and before the update.
        after: the same after the update, before the schedulers step.
    """

    def __init__(
        self,
        optimizers: Callable[[nn.Module], list[Optimizer]] = sgd,
        schedulers: Callable[[Sequence[Optimizer]], list[Any]] = no_schedulers,
        controllers: Sequence[redline.Controller] | None = None,
        *,
        told_of_schedulers: bool = True,
        drop: float = 0.0,
    ) -> None:
        torch.manual_seed(0)
        self.model = Net(drop)
        self.optimizers = optimizers(self.model)
        self.schedulers = schedulers(self.optimizers)
        self.losses: list[float] = []
        self.before: list[dict[str, Any]] = []
        self.after: list[dict[str, Any]] = []
        self._session: redline.Session | None = None
        if controllers is not None:
            self._session = redline.attach(
                self.model,
                self.optimizers,
                monitors=[],
                controllers=controllers,
                schedulers=self.schedulers if told_of_schedulers else [],
            )

    @property
    def session(self) -> redline.Session:
        assert self._session is not None
        return self._session

    @property
    def did(self) -> list[tuple[int, str]]:
        return [(one.step, one.action) for one in self.session.interventions]

    @property
    def groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def state(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"model": self.model}
        parts |= {f"optimizer {k}": optimizer for k, optimizer in enumerate(self.optimizers)}
        parts |= {f"scheduler {k}": scheduler for k, scheduler in enumerate(self.schedulers)}
        return {name: copied(part.state_dict()) for name, part in parts.items()}

    def load(self, state: dict[str, Any]) -> None:
        """By hand what a roll-back is said to do."""
        state = copied(state)
        self.model.load_state_dict(state["model"])
        for k, optimizer in enumerate(self.optimizers):
            optimizer.load_state_dict(state[f"optimizer {k}"])
        for k, scheduler in enumerate(self.schedulers):
            scheduler.load_state_dict(state[f"scheduler {k}"])

    def step(self, *, spoil: Sequence[str] = (), shown: float | None = None, shift: int = 0) -> None:
        """One step, on a batch of its own.

        Args:
            spoil: "batch" has all labels wrong and counts ten times, "nan" has a NaN among the inputs, "parameters" are
                multiplied by -30 ahead of the step, the "rate" is a thousand times as high in this step.
            shown: the loss to tell the session, in place of the true one.
            shift: of the labels: another task.
        """
        if "parameters" in spoil:
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.mul_(-30)
        x, y = batch(len(self.losses))
        if "batch" in spoil:
            y = (y + 1) % 3
        if "nan" in spoil:
            x[0, 0] = math.nan
        loss = F.cross_entropy(self.model(x), (y + shift) % 3) * (10 if "batch" in spoil else 1)
        self.losses.append(loss.item())
        if self._session is not None:
            self._session.observe(loss=loss if shown is None else shown)
        loss.backward()
        rates = [copy.deepcopy(group["lr"]) for group in self.groups]
        if "rate" in spoil:
            for group in self.groups:
                group["lr"] *= 1000
        if self._session is not None:
            self.before.append(self.state())
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if "rate" in spoil:
            for group, rate in zip(self.groups, rates, strict=True):
                group["lr"] = rate
        if self._session is not None:
            self.after.append(self.state())
        for scheduler in self.schedulers:
            scheduler.step()

    def skip(self, back_to: dict[str, Any] | None = None) -> None:
        """By hand what a withheld step, or one that is rolled back, is said to be."""
        if back_to is not None:
            self.load(back_to)
        self.losses.append(math.nan)
        for scheduler in self.schedulers:
            scheduler.step()

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()


def batch(seed: int) -> tuple[Tensor, Tensor]:
    """64 samples of a task that can be learned."""
    teacher = torch.randn(6, 3, generator=torch.Generator().manual_seed(1234))
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(seed))
    return x, (x @ teacher).argmax(1)


def copied(state: dict[str, Any]) -> dict[str, Any]:
    """A copy of plain containers with tensors in them."""
    return tree_map(lambda value: value.detach().clone() if isinstance(value, Tensor) else value, dict(state))


def assert_same(one: Any, other: Any) -> None:
    assert frozen(one) == frozen(other)


def differing(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    """The parts of two states that are not the same bits."""
    return {name for name in one.keys() | other.keys() if frozen(one.get(name)) != frozen(other.get(name))}
