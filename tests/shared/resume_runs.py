"""What the tests of resumed runs share: runs to cut, what goes wrong in them, and when two of them are the same.

What travels is what a user would save: the ``state_dict`` of model, optimizers, schedulers and session, through
``torch.save`` and ``torch.load(weights_only=True)``, or a Lightning checkpoint.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from bits import frozen
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR

import redline

COUNTER = "redline_interventions_total"
STEPS = 40


class Net(nn.Module):
    """Two matrices around a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.body(x))))


def sgd(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)]


def clamp() -> list[redline.Controller]:
    return [redline.StepClamp(max_r=0.05)]


def non_finite() -> list[redline.Controller]:
    return [redline.NonFiniteGuard(stop_after=4)]


def spike() -> list[redline.Controller]:
    return [redline.SpikeGuard(window=18, every=18)]


def all_three() -> list[redline.Controller]:
    return [*non_finite(), *spike(), *clamp()]


Made = Callable[[], list[redline.Controller]]
Incidents = Mapping[int, str]
Did = dict[str, list[int]]  # steps at which the guards did something, by action


def batch(seed: int, incident: str = "") -> tuple[Tensor, Tensor]:
    """64 samples of a task that can be learned, with a NaN among them or all labels wrong."""
    teacher = torch.randn(6, 3, generator=torch.Generator().manual_seed(1234))
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(seed))
    y = (x @ teacher).argmax(1)
    if incident == "nan":
        x[0, 0] = math.nan
    return x, (y + 1) % 3 if incident == "batch" else y


def loss_of(net: nn.Module, index: int, incident: str) -> Tensor:
    if incident == "parameters":
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(-30)
    x, y = batch(index, incident)
    return F.cross_entropy(net(x), y) * (10 if incident == "batch" else 1)


def trace(session: redline.Session) -> list[Any]:
    return frozen([vars(one) for one in session.interventions])


def guards_did(session: redline.Session) -> Did:
    """What was done beside scaling."""
    found: Did = {}
    for one in session.interventions:
        if one.action != "scale":
            steps = found.setdefault(one.action, [])
            if one.step not in steps:
                steps.append(one.step)
    return found


def assert_sessions_agree(one: redline.Session, other: redline.Session) -> None:
    """In all that is no time: log, counters, readings, history and the controllers' own state."""
    assert trace(one) == trace(other)
    for metric in (COUNTER, "redline_steps_total", "redline_nonfinite_total"):
        assert one.latest.series(metric) == other.latest.series(metric)
    for metric in ("redline_loss", "redline_step_scale", "redline_gradient_norm"):
        assert frozen(one.latest.value(metric)) == frozen(other.latest.value(metric))
    assert frozen(one.state_dict()["control"]) == frozen(other.state_dict()["control"])
    reports = [session.report() for session in (one, other)]
    assert reports[0].snapshots == reports[1].snapshots
    assert reports[0].interventions == reports[1].interventions
    assert frozen([reports[0].first_loss, reports[0].last_loss]) == frozen(
        [reports[1].first_loss, reports[1].last_loss]
    )


class Run:
    """A model in training, with Redline."""

    def __init__(
        self,
        optimizers: Callable[[nn.Module], list[Optimizer]],
        controllers: Sequence[redline.Controller],
        incidents: Incidents,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        self.model = Net()
        self.optimizers = optimizers(self.model)
        self.schedulers = [ExponentialLR(optimizer, 0.99) for optimizer in self.optimizers]
        self.incidents = incidents
        self.session = redline.attach(
            self.model,
            self.optimizers,
            monitors=[redline.StepHealth()],
            controllers=controllers,
            schedulers=self.schedulers,
        )

    def steps(self, first: int, last: int) -> None:
        for index in range(first, last):
            loss = loss_of(self.model, index, self.incidents.get(index, ""))
            self.session.observe(loss=loss)
            loss.backward()
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            for scheduler in self.schedulers:
                scheduler.step()

    def parts(self) -> list[Any]:
        return [self.model, *self.optimizers, *self.schedulers]

    def training(self) -> Any:
        return frozen([part.state_dict() for part in self.parts()])

    def save(self) -> io.BytesIO:
        file = io.BytesIO()
        torch.save([part.state_dict() for part in (*self.parts(), self.session)], file)
        return file

    def load(self, file: io.BytesIO) -> None:
        file.seek(0)
        for part, state in zip((*self.parts(), self.session), torch.load(file, weights_only=True), strict=True):
            part.load_state_dict(state)


def cut_and_resumed(
    optimizers: Callable[[nn.Module], list[Optimizer]], controllers: Made, incidents: Incidents, cut: int
) -> Run:
    first = Run(optimizers, controllers(), incidents)
    first.steps(0, cut)
    file = first.save()
    first.session.close()
    second = Run(optimizers, controllers(), incidents, seed=1)
    second.load(file)
    second.steps(cut, STEPS)
    return second
