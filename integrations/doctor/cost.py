"""What a step of a model costs, plain and watched, measured on its example batch."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from redline.errors import ConfigurationError, RedlineWarning
from redline.integrations.attach import attach
from redline.integrations.doctor.subject import Subject
from redline.monitors import default_monitors
from redline.numerics.tangents import default_logits, read_logits
from redline.optimizers import numbered
from redline.readings import Snapshot
from redline.session import Session

_WARM_UP, _PAIRS, _LEAST_PAIRS = 3, 5, 2
_PATIENCE = 30.0  # seconds
_HORIZON = 1000  # steps over which a schedule is averaged


@dataclass(frozen=True)
class Cost:
    """One thing that takes time.

    Attributes:
        what: in words, or a monitor's name.
        seconds: each time, the median of a few.
        per_step: how many times a step it happens, on average.
    """

    what: str
    seconds: float
    per_step: float

    @property
    def amortized(self) -> float:
        """Seconds a step."""
        return self.seconds * self.per_step


@dataclass(frozen=True)
class Costs:
    """What was measured.

    Attributes:
        plain: seconds of a step without Redline: forward, backward and AdamW.
        first: seconds that the first measurement takes beyond it; spectra start cold.
        costs: of watching, by what takes them.
        between_steps: bytes that Redline keeps between steps.
        optimizer_state: bytes of AdamW's state.
        snapshot: what was read.
        unmoved: parameters that got no gradient.
        notes: what could not be measured, in words.
    """

    plain: float
    first: float
    costs: tuple[Cost, ...]
    between_steps: int
    optimizer_state: int
    snapshot: Snapshot
    unmoved: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def share(self) -> float:
        """Time of watching over time of training."""
        return sum(cost.amortized for cost in self.costs) / self.plain


def measure_costs(subject: Subject) -> Costs:
    """Train the subject's model for a few steps on its example batch and random labels, and take the time.

    It changes the model: pass a copy.

    Raises:
        ConfigurationError: nothing can be trained.
    """
    trained = [parameter for parameter in subject.model.parameters() if parameter.requires_grad]
    if not trained:
        raise ConfigurationError(f"got a model from {subject.name} without a parameter that requires gradients.")
    optimizer = torch.optim.AdamW(trained)
    step = partial(_step, subject, optimizer)
    for _ in range(_WARM_UP):
        step()
    unmoved = tuple(name for name, p in subject.model.named_parameters() if p.requires_grad and p.grad is None)
    monitors = default_monitors()
    rates = [sum(map(monitor.due, range(_HORIZON))) / _HORIZON for monitor in monitors]
    ticks: list[list[float]] = [[] for _ in monitors]
    for monitor, rate, found in zip(monitors, rates, ticks, strict=True):
        if rate < 1:
            monitor.due = _even
        vars(monitor)["measure"] = partial(_timed, monitor.measure, found, subject)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RedlineWarning)  # they are told here
        with attach(subject.model, optimizer, monitors=monitors, logits=subject.logits) as session:
            due, idle = _pairs(step, session)
            snapshot, between = session.latest, _bytes_kept(session)
    each = [statistics.median(found[1:] or found or [0.0]) for found in ticks]
    always = sum(tick for tick, rate in zip(each, rates, strict=True) if rate == 1)
    shared = statistics.median(one.own for one in due[1:]) - sum(each)
    hooks = statistics.median(one.own for one in idle) - always
    costs = [
        *map(Cost, numbered([type(monitor).__name__ for monitor in monitors]), each, rates),
        Cost("copies of parameters, inputs and readings", max(shared - hooks, 0.0), min(rates)),
        Cost("hooks and gradient norms", max(hooks, 0.0), 1.0),
    ]
    return Costs(
        plain=statistics.median(one.plain for one in idle),
        first=due[0].own,
        costs=tuple(costs),
        between_steps=between,
        optimizer_state=bytes_of(tree_leaves([dict(state) for state in optimizer.state.values()])),
        snapshot=snapshot,
        unmoved=unmoved,
        notes=session.notes,
    )


def bytes_of(values: Sequence[Any]) -> int:
    """Of the tensors among them."""
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))


class _Watched(NamedTuple):
    """One step: seconds of training, and of Redline."""

    plain: float
    own: float


def _pairs(step: Callable[[], float], session: Session) -> tuple[list[_Watched], list[_Watched]]:
    """Steps at which all is due, and between them steps at which only that is which always is."""
    found: tuple[list[_Watched], list[_Watched]] = [], []
    started = time.perf_counter()
    while len(found[0]) <= _PAIRS and (len(found[0]) <= _LEAST_PAIRS or time.perf_counter() - started < _PATIENCE):
        for kind in found:
            before = session.seconds[1]
            took = step()
            own = session.seconds[1] - before
            kind.append(_Watched(took - own, own))
    return found


def _step(subject: Subject, optimizer: torch.optim.Optimizer) -> float:
    """One step of training; how long it took."""
    optimizer.zero_grad()
    _wait(subject)
    start = time.perf_counter()
    z, mask = read_logits(subject.model(*subject.args, **subject.kwargs), subject.logits or default_logits)
    _loss(z if mask is None else z[mask]).backward()
    optimizer.step()
    _wait(subject)
    return time.perf_counter() - start


def _loss(logits: Tensor) -> Tensor:
    """Cross-entropy against labels that do not matter; of a single logit, the binary one."""
    logits = logits.reshape(-1, logits.shape[-1]).float()
    if logits.shape[-1] == 1:
        return F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))
    labels = torch.arange(len(logits), device=logits.device) % logits.shape[-1]
    return F.cross_entropy(logits, labels)


def _timed(measure: Callable[..., None], found: list[float], subject: Subject, *args: Any) -> None:
    _wait(subject)
    start = time.perf_counter()
    measure(*args)
    _wait(subject)
    found.append(time.perf_counter() - start)


def _wait(subject: Subject) -> None:
    if any(parameter.is_cuda for parameter in subject.model.parameters()):
        torch.cuda.synchronize()


def _even(step: int) -> bool:
    return step % 2 == 0


def _bytes_kept(session: Session) -> int:
    return bytes_of(tree_leaves(session.state_dict()))
