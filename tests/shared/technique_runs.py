"""What the tests of training techniques share: a model of blocks that drop, trained alike with and without Redline."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import redline

FEATURES, WIDTH, CLASSES, BATCH = 6, 8, 5, 7
R = "redline_normalized_step_size"
COMPARED = (
    R,
    "redline_update_norm",
    "redline_weight_spectral_norm",
    "redline_update_spectral_norm",
    "redline_gradient_norm",
    "redline_loss",
    "redline_activation_step_size",
)


class Block(nn.Module):
    """A residual block with dropout inside."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(F.silu(self.up(x))))


class Blocks(nn.Module):
    """Blocks in a list, as in language models; ``call`` is how each is called, if not directly."""

    def __init__(self, dropout: float = 0.1, call: Callable[..., Tensor] | None = None) -> None:
        super().__init__()
        self.call = call
        self.body = nn.Linear(FEATURES, WIDTH)
        self.layers = nn.ModuleList(Block(dropout) for _ in range(2))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        for block in self.layers:
            x = block(x) if self.call is None else self.call(block, x)
        return self.head(x)


LABELS = {
    "body.weight",
    "layers.0.up.weight",
    "layers.0.down.weight",
    "layers.1.up.weight",
    "layers.1.down.weight",
    "head.weight",
}


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, FEATURES, generator=generator), torch.randint(0, CLASSES, (BATCH,), generator=generator)


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)


def every_step() -> list[redline.Monitor]:
    return [
        redline.WeightSpectrum(1),
        redline.UpdateSpectrum(1),
        redline.GhostRadius(1, max_samples=None),
        redline.StepHealth(1),
    ]


@dataclass
class Trained:
    """What came of a run: the parameters in their order, and the readings of each step by metric and labels."""

    parameters: list[Tensor]
    losses: list[float]
    readings: list[dict[Any, float]] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    steps: float = 0

    def equals(self, other: Trained) -> bool:
        """Whether the parameters are the same in every bit."""
        return all(torch.equal(*pair) for pair in zip(self.parameters, other.parameters, strict=True))

    def differences(self, other: Trained, within: float = 1e-4) -> list[Any]:
        """The readings that are not the other's; both must have the same ones."""
        found: list[Any] = []
        for step, (ours, theirs) in enumerate(zip(self.readings, other.readings, strict=True)):
            assert ours
            assert ours.keys() == theirs.keys()
            found += [
                (step, series, ours[series], theirs[series])
                for series in ours
                if not math.isclose(ours[series], theirs[series], rel_tol=within)
            ]
        return found

    @property
    def labels(self) -> set[str]:
        """The layers that there were spectra of."""
        return {
            series.labels[0]
            for one in self.readings
            for series in one
            if series.metric == "redline_weight_spectral_norm"
        }


def nothing(model: Any) -> Any:
    """Of the model, nothing is changed."""
    return model


def train(
    make: Callable[[], nn.Module] = Blocks,
    *,
    watched: bool,
    ahead: Callable[[Any], nn.Module] = nothing,
    afterwards: Callable[[Any], nn.Module] = nothing,
    warm: int = 0,
    steps: int = 4,
    optimizer: Callable[[nn.Module], Optimizer] = sgd,
    compiled_step: Callable[[Optimizer], Callable[[], Any]] = lambda optimizer: optimizer.step,
    monitors: Callable[[], Sequence[redline.Monitor]] = every_step,
    module: str | None = None,
) -> Trained:
    """Train, and give what came of it.

    Args:
        make: makes the model.
        watched: whether Redline is attached, after ``warm`` steps.
        ahead: prepares the model before that, ``afterwards`` after that; what they return is called.
        warm: steps ahead of attaching.
        steps: further steps.
        optimizer: of the model.
        compiled_step: makes of the optimizer, ahead of the first step, what steps it.
        monitors: makes them.
        module: of ``redline.attach``.
    """
    torch.manual_seed(0)
    model = make()
    stepper = optimizer(model)
    update = compiled_step(stepper)
    called = ahead(model)
    trained = Trained([], [])
    session: redline.Session | None = None
    for step in range(-warm, steps):
        if step == 0:
            if watched:
                session = redline.attach(called, stepper, monitors=monitors(), module=module)
            called = called if afterwards is nothing else afterwards(model)
        x, y = batch(100 + step)
        loss = F.cross_entropy(called(x), y)
        if session is not None:
            session.observe(loss=loss)
        loss.backward()
        update()
        stepper.zero_grad()
        trained.losses.append(loss.item())
        if session is not None:
            values = session.latest.values
            trained.readings.append({one: value for one, value in values.items() if one.metric in COMPARED})
    if session is not None:
        trained.steps = session.latest.value("redline_steps_total")
        trained.notes = session.notes
        session.close()
    trained.parameters = [parameter.detach().clone() for parameter in model.parameters()]
    return trained


def reference(before: nn.Module, after: nn.Module, x: Tensor) -> float:
    """r of the step between two copies of a model on these inputs: its whole Jacobian in float64, dropout off."""
    model = copy.deepcopy(before).double()
    for inner in model.modules():
        if isinstance(inner, nn.Dropout):
            inner.eval()
    start = {name: parameter.detach() for name, parameter in model.named_parameters()}
    step = {name: parameter.detach().double() - start[name] for name, parameter in after.named_parameters()}
    jacobian = torch.func.jacrev(lambda point: torch.func.functional_call(model, point, (x.double(),)))(start)
    tangent = sum(jacobian[name].flatten(2) @ step[name].flatten() for name in start)
    assert isinstance(tangent, Tensor)
    return float((tangent.amax(-1) - tangent.amin(-1)).max() / math.pi)
