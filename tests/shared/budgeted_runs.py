"""What the tests of the overhead budget share: a clock set by hand, and a run in which all take their time by it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import redline
from redline import Need, Readings, Scale, Snapshot, Step


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Costing(redline.Monitor):
    """Takes its time, and draws a tangent where it is told to need one."""

    def __init__(
        self,
        clock: Clock,
        cost: float | Callable[[int], float],
        every: int | Callable[[int], bool] = 1,
        needs: Need = Need.NOTHING,
    ) -> None:
        super().__init__(every)
        self.clock, self.cost, self.needs = clock, cost, needs
        self.steps: list[int] = []

    def measure(self, step: Step, readings: Readings) -> None:
        self.steps.append(step.index)
        if Need.TANGENT in self.needs:
            assert step.tangent(None) is not None
        self.clock.now += self.cost(step.index) if callable(self.cost) else self.cost


class Rare(Costing):
    """Another, with a name of its own."""


class Keeping(redline.Sink):
    def __init__(self, clock: Clock, cost: float = 0.0, every: int | Callable[[int], bool] = 1) -> None:
        super().__init__(every)
        self.clock, self.cost = clock, cost
        self.snapshots: list[Snapshot] = []

    def emit(self, snapshot: Snapshot) -> None:
        self.clock.now += self.cost
        self.snapshots.append(snapshot)

    @property
    def steps(self) -> list[int]:
        return [snapshot.step for snapshot in self.snapshots]


class Slow(redline.Controller):
    """Takes long to decide, and holds every step."""

    needs = Need.TANGENT

    def __init__(self, clock: Clock, cost: float) -> None:
        self.clock, self.cost = clock, cost
        self.asked: list[int] = []

    def inspect(self, step: Step) -> Iterable[Scale]:
        self.clock.now += self.cost
        self.asked.append(step.index)
        tangent = step.tangent(None)
        assert tangent is not None
        return [Scale(1 / (1 + tangent.normalized_step_size), "as told.")]


class Run:
    """A step of training takes 1 second."""

    def __init__(self, clock: Clock, controllers: Sequence[redline.Controller] = (), batch: int = 5) -> None:
        torch.manual_seed(0)
        self.clock, self.controllers, self.batch = clock, controllers, batch
        self.model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.5)

    def attach(self, *monitors: redline.Monitor, budget: float | None, **more: Any) -> redline.Session:
        return redline.attach(
            self.model,
            self.optimizer,
            monitors=monitors,
            controllers=self.controllers,
            overhead_budget=budget,
            run="run",
            **more,
        )

    def steps(self, count: int, seconds: float = 1.0) -> None:
        for seed in range(count):
            x = torch.randn(self.batch, 3, generator=torch.Generator().manual_seed(seed))
            loss = nn.functional.cross_entropy(self.model(x), torch.arange(self.batch) % 3)
            self.clock.now += seconds
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    @property
    def parameters(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]
