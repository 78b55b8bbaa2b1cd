"""What the ranks send one another while an optimizer steps, counted as torch hands it to the process group."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from rank_training import batches, model, optimizer_of, wrapped
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import redline
from redline import GhostRadius, StepHealth, UpdateSpectrum, WeightSpectrum
from redline.spectrum_tracker import SpectrumTracker

# Of each collective, which of its arguments is what this rank hands over.
_HANDED_OVER = {"allreduce_": 0, "allgather_": 1, "_allgather_base_": 1, "all_reduce": 0, "all_gather_into_tensor": 0}


class Traffic(TorchDispatchMode):
    """While it is open, messages and bytes by collective; any other collective is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func._schema.name.partition("::")
        if space in ("c10d", "_c10d_functional") and name not in ("wait_tensor", "barrier", "monitored_barrier_"):
            sent = [leaf for leaf in tree_leaves(args[_HANDED_OVER[name]]) if isinstance(leaf, Tensor)]
            self.messages[name] += 1
            self.bytes[name] += sum(leaf.numel() * leaf.element_size() for leaf in sent)
        return func(*args, **(kwargs or {}))


def monitors(which: str) -> list[redline.Monitor]:
    """The monitors whose traffic is counted, due at each step."""
    made: dict[str, Any] = {
        "health": lambda: [StepHealth()],
        "weights": lambda: [WeightSpectrum(1, tolerance=1e-6)],
        "updates": lambda: [UpdateSpectrum(1, tolerance=1e-6)],
        "radius": lambda: [GhostRadius(1, max_samples=None)],
    }
    return made[which]()


def sent(rank: int, how: str, which: str, steps: int = 3) -> dict[str, Any]:
    """Messages and bytes of the last step, and the rounds of each matrix in each of its spectral measurements."""
    net = wrapped(model(), how)
    optimizer = optimizer_of(net)
    rounds: list[list[int]] = []
    measure = SpectrumTracker.measure

    def seen(self: SpectrumTracker, *args: Any) -> Any:
        estimate = measure(self, *args)
        rounds.append([passes // 2 for passes in estimate.passes.tolist()])
        return estimate

    SpectrumTracker.measure = seen  # type: ignore[method-assign]
    with redline.attach(net, optimizer, monitors=monitors(which)) as session:
        for tokens, targets in batches(steps, rank, dist.get_world_size()):
            loss = F.cross_entropy(net(tokens).flatten(0, 1), targets.flatten())
            session.observe(loss=loss)
            loss.backward()
            rounds.clear()
            with Traffic() as traffic:
                optimizer.step()
            optimizer.zero_grad()
        assert session.notes == (), session.notes
    return {
        "messages": sum(traffic.messages.values()),
        "bytes": sum(traffic.bytes.values()),
        "rounds": list(rounds),
    }
