"""What the tests of the session share: a monitor, a sink and a controller that watch, and a run."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sinks import Keep
from torch import Tensor, nn
from torch.optim import Optimizer

import redline
from redline import Need, Readings, Scale, Step


@pytest.fixture(autouse=True, scope="module")
def quiet_machine() -> Iterator[None]:
    """One thread, since with tensors this small several only wait for one another, and few objects to search."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


class Watching(redline.Monitor):
    """Does what it is told at each step at which it is due."""

    def __init__(
        self,
        act: Callable[[Step, Readings], None] = lambda step, readings: None,
        every: int | Callable[[int], bool] = 1,
        *,
        needs: Need = Need.NOTHING,
        after_commit: bool = False,
    ) -> None:
        super().__init__(every)
        self.act, self.needs, self.after_commit = act, needs, after_commit

    def measure(self, step: Step, readings: Readings) -> None:
        self.act(step, readings)


class Keeping(Keep):
    """Keeps all that it is handed."""

    def __init__(self, every: int | Callable[[int], bool] = 1) -> None:
        super().__init__(every)
        self.opened: list[redline.RunInfo] = []
        self.reports: list[redline.StabilityReport] = []

    def open(self, run: redline.RunInfo) -> None:
        self.opened.append(run)

    def close(self, report: redline.StabilityReport) -> None:
        self.reports.append(report)


class Scaling(redline.Controller):
    """Scales every step, and remembers how many."""

    def __init__(self, factor: float = 0.5) -> None:
        self.factor, self.inspected = factor, 0

    def inspect(self, step: Step) -> Iterable[Scale]:
        self.inspected += 1
        return [Scale(self.factor, "as told.", saw={"tau": float(step.update.norm)})]

    def state_dict(self) -> dict[str, Any]:
        return {"inspected": self.inspected}

    def load_state_dict(self, state: Any) -> None:
        self.inspected = state["inspected"]


WIDTH, CLASSES, BATCH = 37, 5, 11  # odd sizes: a tensor of (37, 37) in memory is the body's or made from it


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


def sgd(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)]


class Run:
    """A model with its optimizers; two made alike are alike."""

    def __init__(
        self,
        optimizers: Callable[[nn.Module], list[Optimizer]] = sgd,
        model: Callable[[], nn.Module] = Net,
    ) -> None:
        torch.manual_seed(0)
        self.model = model()
        self.optimizers = optimizers(self.model)

    def loss(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(BATCH, WIDTH, generator=generator)
        y = torch.randint(0, CLASSES, (BATCH,), generator=generator)
        return F.cross_entropy(self.model(x), y)

    def backward(self, seed: int) -> None:
        self.loss(seed).backward()

    def update(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self, seed: int) -> None:
        self.backward(seed)
        self.update()

    def attach(
        self,
        *monitors: redline.Monitor,
        controllers: Sequence[redline.Controller] = (),
        sinks: Sequence[redline.Sink] = (),
        **options: Any,
    ) -> redline.Session:
        return redline.attach(
            self.model, self.optimizers, monitors=monitors, controllers=controllers, sinks=sinks, **options
        )

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    @property
    def gradient_norm(self) -> float:
        return norm([p.grad for p in self.model.parameters() if p.grad is not None])

    def hooks(self) -> int:
        """How many hooks there are on the model's modules and on the optimizers."""
        on_modules = (
            len(hooks)
            for module in self.model.modules()
            for kind, hooks in vars(module).items()
            if kind.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))
        )
        on_optimizers = (
            len(hooks)
            for optimizer in self.optimizers
            for kind, hooks in vars(optimizer).items()
            if kind.endswith("_hooks")
        )
        return sum(on_modules) + sum(on_optimizers)


def norm(tensors: Iterable[Tensor]) -> float:
    return float(torch.stack([tensor.detach().double().norm() for tensor in tensors]).norm())


def often() -> list[redline.Monitor]:
    """The default monitors, due much more often than by default."""
    return [
        redline.WeightSpectrum(1),
        redline.UpdateSpectrum(1),
        redline.GhostRadius(1, max_samples=None),
        redline.StepHealth(1),
    ]


def in_memory(*shape: int) -> int:
    """How many tensors of this shape are alive in the process."""
    gc.collect()
    return sum(isinstance(one, Tensor) and tuple(one.shape) == shape for one in gc.get_objects())
