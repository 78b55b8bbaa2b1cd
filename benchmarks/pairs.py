"""Two trainings of the byte-level model, one plain and one watched, a step each in turn."""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

import redline
from redline.integrations.demo.data import byte_batch, library_bytes
from redline.integrations.demo.models import ByteLM


class Trainer:
    """A model in training, one step at a time."""

    def __init__(self, device: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = ByteLM().to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.device, self.session = device, None

    def step(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        inputs, targets = inputs.to(self.device), targets.to(self.device)
        loss = F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten())
        if self.session is not None:
            self.session.observe(loss=loss)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def timed(self, inputs: torch.Tensor, targets: torch.Tensor) -> float:
        self._wait()
        start = time.perf_counter()
        self.step(inputs, targets)
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def measure(
    attach: Callable[[Trainer], redline.Session], seed: int, *, steps: int, batch: int, device: str
) -> tuple[float, float]:
    """Seconds of all plain steps, and of all watched ones; the order turns over from pair to pair."""
    text = library_bytes()
    plain, watched = (Trainer(device, seed) for _ in range(2))
    windows = torch.Generator().manual_seed(seed)
    seconds = [0.0, 0.0]
    for trainer in (plain, watched):
        for _ in range(3):  # before attaching: the kernels' own warm-up, of both alike
            trainer.step(*byte_batch(text, batch, 64, windows))
    watched.session = attach(watched)
    for index in range(steps):
        inputs, targets = byte_batch(text, batch, 64, windows)
        for which in (0, 1) if index % 2 else (1, 0):
            seconds[which] += (plain, watched)[which].timed(inputs, targets)
    watched.session.close()
    return seconds[0], seconds[1]
