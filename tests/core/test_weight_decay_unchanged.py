"""Asking whether weight decay is decoupled changes nothing of the run, its optimizers or its random streams."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from bits import frozen
from decaying_optimizers import DECOUPLED, Descent, Lion, Make, ids
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, Adagrad, AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from redline.weight_decay import DecayRules, why_coupled


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
