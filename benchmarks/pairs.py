"""Two trainings of one model, one plain and one watched, a step each in turn."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from frame import wait
from torch import Tensor, nn

import redline
from redline.integrations.demo.data import byte_batch, library_bytes
from redline.integrations.demo.models import ByteLM

Batches = Callable[[torch.Generator], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Workload:
    """What is trained: a model, and batches of inputs and targets for a cross-entropy."""

    model: Callable[[], nn.Module]
    batches: Batches

    @property
    def parameters(self) -> int:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in self.model().parameters())


def byte_batches(batch: int) -> Batches:
    text = library_bytes()
    return lambda generator: byte_batch(text, batch, 64, generator)


def byte_level(batch: int) -> Workload:
    return Workload(ByteLM, byte_batches(batch))


class Trainer:
    """A model in training, one step at a time."""

    def __init__(self, model: Callable[[], nn.Module], device: str, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = model().to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.device, self.session = device, None

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        inputs, targets = inputs.to(self.device), targets.to(self.device)
        loss = F.cross_entropy(self.model(inputs).flatten(0, -2), targets.flatten())
        if self.session is not None:
            self.session.observe(loss=loss)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def timed(self, inputs: Tensor, targets: Tensor) -> float:
        wait(self.device)
        start = time.perf_counter()
        self.step(inputs, targets)
        wait(self.device)
        return time.perf_counter() - start


Attach = Callable[[Trainer], redline.Session]


def measure(
    attach: Attach,
    workload: Workload,
    seed: int,
    *,
    pairs: int,
    device: str,
    warmup: int = 3,
    before_close: Callable[[Trainer], None] = lambda trainer: None,
) -> Tensor:
    """Seconds of each plain step and of each watched one: ``(pairs, 2)``, float64.

    The order turns over from pair to pair. Both start from one model after ``warmup`` steps; at 3 that is no more than
    the kernels' own warm-up.
    """
    windows = torch.Generator().manual_seed(seed)
    plain = Trainer(workload.model, device, seed)
    for _ in range(warmup):
        plain.step(*workload.batches(windows))
    watched = copy.deepcopy(plain)
    watched.session = attach(watched)
    seconds = torch.zeros(pairs, 2, dtype=torch.float64)
    for index in range(pairs):
        inputs, targets = workload.batches(windows)
        for which in (0, 1) if index % 2 else (1, 0):
            seconds[index, which] = (plain, watched)[which].timed(inputs, targets)
    before_close(watched)
    watched.session.close()
    return seconds
