"""Copies of a training run's state, to go back to."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map

from redline.errors import ConfigurationError
from redline.optimizers import OptimizerState, copy_of


class RunSnapshot:
    """All that training changes: parameters that the optimizers move, buffers, optimizers' and schedulers' state.

    Random states and the data are left out: they go on.
    """

    def __init__(
        self,
        read_tensors: Callable[[], Mapping[str, Tensor]],
        optimizers: Sequence[Optimizer],
        schedulers: Sequence[Any],
    ) -> None:
        """``read_tensors``: the live parameters and buffers, by name."""
        self._read_tensors, self._optimizers, self._schedulers = read_tensors, optimizers, schedulers
        self._kept: dict[str, Any] | None = None
        self.step = -1
        self.memory: Literal["device", "host"] = "device"
        self.in_checkpoints = True

    def take(self, step: int, memory: Literal["device", "host"], in_checkpoints: bool) -> None:
        """Copy everything as it stands, in place of the last copy."""
        self.step, self.memory, self.in_checkpoints = step, memory, in_checkpoints
        copied = _to_host if memory == "host" else copy_of
        self._kept = None  # not two at a time
        self._kept = {
            "tensors": tree_map(copied, dict(self._read_tensors())),
            "optimizers": [OptimizerState.of(optimizer, copied) for optimizer in self._optimizers],
            "schedulers": [copy.deepcopy(scheduler.state_dict()) for scheduler in self._schedulers],
        }

    @property
    def taken(self) -> bool:
        """Whether there is anything to go back to."""
        return self._kept is not None

    @property
    def bytes(self) -> int:
        """What the copies take up."""
        kept = self._kept or {"optimizers": []}
        leaves = tree_leaves([{**kept, "optimizers": [vars(state) for state in kept["optimizers"]]}])
        return sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor))

    def restore(self) -> None:
        """Put everything back, in place.

        An optimizer's group settings come back together with the schedulers that set them: to put a rate back under a
        scheduler that goes on would bend its course.
        """
        assert self._kept is not None
        self._wait()
        live = self._read_tensors()
        for name, kept in self._kept["tensors"].items():
            if name not in live:
                continue  # taken away since
            if live[name].shape == kept.shape:
                live[name].detach().copy_(kept)
            else:
                live[name].data = kept.to(live[name].device, copy=True)  # a cache that has grown
        for optimizer, state in zip(self._optimizers, self._kept["optimizers"], strict=True):
            state.restore(optimizer, groups=bool(self._schedulers))
        for scheduler, state in zip(self._schedulers, self._kept["schedulers"], strict=True):
            scheduler.load_state_dict(copy.deepcopy(state))
        owners = [getattr(scheduler, "optimizer", None) for scheduler in self._schedulers]
        for scheduler, owner in zip(self._schedulers, owners, strict=True):
            if owner is not None and owners.count(owner) == 1:
                _set_rates(scheduler)

    def _wait(self) -> None:
        """For copies to pinned memory, which may still be under way."""
        if self.memory == "host" and torch.cuda.is_available():
            torch.cuda.synchronize()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint carries: all of it, or nothing."""
        if self._kept is None or not self.in_checkpoints:
            return {}
        self._wait()
        return {
            "step": self.step,
            "memory": self.memory,
            "tensors": self._kept["tensors"],
            "optimizers": [vars(state) for state in self._kept["optimizers"]],
            "schedulers": self._kept["schedulers"],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state_dict`` gave.

        Raises:
            ConfigurationError: it is of a run with other optimizers or schedulers.
        """
        if not state:
            return
        for what, here in (("optimizers", self._optimizers), ("schedulers", self._schedulers)):
            if len(state[what]) != len(here):
                raise ConfigurationError(
                    f"got a snapshot of a run with {len(state[what])} {what} for one with {len(here)}; expected the "
                    f"same {what} as when the state was saved, or a state saved with SpikeGuard(in_checkpoints=False)."
                )
        self.step, self.memory, self.in_checkpoints = state["step"], state["memory"], True
        self._kept = {
            "tensors": dict(state["tensors"]),
            "optimizers": [OptimizerState(**one) for one in state["optimizers"]],
            "schedulers": list(state["schedulers"]),
        }


class RunningStatistics:
    """The running statistics of normalization layers as they were before a step's first forward.

    A batch whose gradients are withheld has already been counted in them, and one with a NaN would leave it there.
    """

    def __init__(self, model: nn.Module) -> None:
        self._norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
        self._kept: list[tuple[Tensor, Tensor]] = []

    def keep(self) -> None:
        """Copy them as they stand."""
        self._kept = [
            (buffer, buffer.detach().clone())
            for norm in self._norms
            if norm.training
            for buffer in norm.buffers(recurse=False)
        ]

    def restore(self) -> None:
        """Put them back."""
        for buffer, kept in self._kept:
            buffer.copy_(kept)

    def forget(self) -> None:
        """The step has ended."""
        self._kept = []


def _set_rates(scheduler: Any) -> None:
    """Rates as the scheduler says: those in the groups may have been spiked in the very step of the snapshot."""
    if not hasattr(scheduler, "get_last_lr"):
        return
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=False):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = float(rate)


def _to_host(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.device.type == "cpu":
        return copy_of(value)
    host = torch.empty_like(value, device="cpu", pin_memory=value.device.type == "cuda")
    return host.copy_(value.detach(), non_blocking=True)
