"""The processes that train one model together, and what they tell one another."""

from __future__ import annotations

import time
import zlib
from functools import lru_cache
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from redline.errors import ConfigurationError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")

_ARRIVAL = 300.0  # seconds for all ranks to attach; models are loaded at different speeds
_attached = count()  # every process attaches in the same order: the n-th time is everybody's n-th time


@lru_cache(maxsize=2)  # of the default group that there is: sessions come and go, and each group keeps its connections
def _own_group(default: ProcessGroup, backend: str | None) -> ProcessGroup:
    """A group of all ranks that nobody else uses."""
    return torch.distributed.new_group(backend=backend)


class Ranks:
    """The ranks of a run.

    What one is told all are told: each call is a collective that every rank makes at the same point of the same step.
    Messages go over a group of Redline's own, so that they never mix with the run's. Nobody's host waits for an
    accelerator.

    Attributes:
        rank: this process's place, from 0.
        size: how many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        """Of more than one they meet here.

        Raises:
            ConfigurationError: not all of them come within five minutes.
        """
        self.rank, self.size = rank, size
        self._group: ProcessGroup | None = None
        self._of_hosts: ProcessGroup | None = None
        if size > 1:
            self._meet()
            self._group = _own_group(torch.distributed.group.WORLD, None)

    @classmethod
    def of_run(cls) -> Ranks:
        """All of the default process group, or this process alone where there is none."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())
        return cls()

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over ranks of a tensor of one shape and dtype on all, the same on each bit for bit."""
        if self._group is None:
            return tensor
        total = tensor.detach().clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=self._group)
        return total

    def rows(self, row: Tensor) -> Tensor:
        """Every rank's ``(k,)`` as ``(size, k)``, by rank."""
        if self._group is None:
            return row.detach()[None]
        rows = [torch.empty_like(row) for _ in range(self.size)]
        torch.distributed.all_gather(rows, row.detach().contiguous(), group=self._group)
        return torch.stack(rows)

    def highest(self, number: Tensor) -> Tensor:
        """The largest of the ranks' 0-d tensors; NaN if one is."""
        return number if self._group is None else self.rows(number.reshape(1)).amax()

    def any(self, flag: bool) -> bool:
        """Whether it is true on any rank; hosts wait for one another, not for their devices."""
        if self._group is None:
            return flag
        told = torch.tensor(int(flag))
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX, group=self._hosts())
        return bool(told)

    def objects(self, of_this: T) -> list[T]:
        """Every rank's object, by rank, pickled on the way; hosts wait for one another, not for their devices."""
        if self._group is None:
            return [of_this]
        told: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(told, of_this, group=self._hosts())
        return told

    def _hosts(self) -> ProcessGroup:
        """A group that does not go through the devices, made when first asked for."""
        if self._of_hosts is None:
            self._of_hosts = _own_group(torch.distributed.group.WORLD, "gloo")
        return self._of_hosts

    def _meet(self) -> None:
        """See that every rank attaches, ahead of the first call that would wait for it without end."""
        store = torch.distributed.distributed_c10d._get_default_store()
        key, until = f"redline/attached/{next(_attached)}", time.monotonic() + _ARRIVAL
        store.add(key, 1)
        while (here := store.add(key, 0)) < self.size:
            if time.monotonic() > until:
                raise ConfigurationError(
                    f"got Redline attached on {here} of {self.size} ranks; expected on all: readings are taken, and "
                    "decided on, by all of them together. Attach on every rank; sinks speak on rank 0 alone anyway."
                )
            time.sleep(0.01)

    def refuse_different(self, said: str, what: str, device: torch.device | None = None) -> None:
        """Raise on all ranks where not all say the same.

        Args:
            said: anything; its checksum is compared.
            what: it is, and why it has to be the same, for the message.
            device: where the group's tensors are; the host by default.

        Raises:
            ConfigurationError: one of them differs from rank 0.
        """
        told = self.rows(torch.tensor([zlib.crc32(said.encode())], device=device)).flatten().tolist()
        for rank, one in enumerate(told):
            if one != told[0]:
                raise ConfigurationError(f"got other {what} on rank {rank} than on rank 0; expected the same on all.")
