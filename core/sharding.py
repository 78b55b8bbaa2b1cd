"""Where a model's parameters lie: whole on each rank, or a part on each (DTensors)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from redline.host_copy import moved_to
from redline.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed.tensor import DeviceMesh, DTensor, Placement


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor: one tensor over several ranks, however it is placed on them."""
    return hasattr(tensor, "placements")


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: of a DTensor its part, of another all of it; in the same memory, detached."""
    given: Any = tensor.detach()
    part: Tensor = given.to_local() if is_sharded(tensor) else given
    return part


@dataclass(frozen=True)
class Sharding:
    """How one tensor lies over the ranks of its mesh.

    Attributes:
        mesh: of the ranks.
        placements: one a dimension of the mesh.
        shape: of the whole tensor.
        stride: of the whole tensor.
        share: 1 / how many ranks of the run hold the same part: what this rank's part counts in a sum over all ranks.
    """

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: torch.Size
    stride: tuple[int, ...]
    share: float

    @classmethod
    def of(cls, tensor: Tensor, ranks: int = 1) -> Sharding:
        """That of a DTensor in a run of so many ranks; its mesh tiles the run, as all meshes of a run do."""
        given: Any = tensor
        sizes = zip(given.placements, given.device_mesh.shape, strict=True)
        parts = math.prod(size for placement, size in sizes if not placement.is_replicate())
        return cls(given.device_mesh, tuple(given.placements), tensor.shape, tensor.stride(), parts / ranks)

    def whole(self, part: Tensor) -> DTensor:
        """The tensor whose part on this rank is ``part``."""
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            part, self.mesh, self.placements, run_check=False, shape=self.shape, stride=self.stride
        )

    def summed(self, part: Tensor) -> Tensor:
        """A part of it that is no term of a sum: where it is placed as ``Partial`` the ranks exchange their terms."""
        from torch.distributed.tensor import Shard

        if not any(placement.is_partial() for placement in self.placements):
            return part
        placements = [Shard(0) if placement.is_partial() else placement for placement in self.placements]
        return self.whole(part).redistribute(placements=placements).to_local()


class Layout:
    """How the parameters of a run lie over its ranks.

    Attributes:
        ranks: of the run.
        shardings: by name, of the parameters that are DTensors.
    """

    def __init__(self, ranks: Ranks | None = None, parameters: Mapping[str, Tensor] | None = None) -> None:
        """``parameters``: by name; on every rank the same ones."""
        self.ranks = ranks or Ranks()
        self.shardings = {
            name: Sharding.of(parameter, self.ranks.size)
            for name, parameter in (parameters or {}).items()
            if is_sharded(parameter)
        }

    def norms(self, parts: Iterable[tuple[str, Tensor]]) -> Tensor:
        """L2 norm of each whole tensor, ``(n,)``, float32 or float64, on one device, the same on every rank.

        Args:
            parts: by the name of the parameter, this rank's part of what lies as the parameter does.
        """
        if self.ranks.size == 1:
            return together(torch.linalg.vector_norm(part) for _, part in parts)
        return self.ranks.total(together(self._square(name, part) for name, part in parts)).sqrt()

    def norm(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """L2 norm of all of them together, 0-d, the same on every rank."""
        if self.ranks.size == 1:
            return torch.nn.utils.get_total_norm(list(tensors.values()))
        return torch.linalg.vector_norm(self.norms(tensors.items()))

    def _square(self, name: str, part: Tensor) -> Tensor:
        """What this rank adds to the square of a norm, 0-d, float64."""
        sharding = self.shardings.get(name)
        share = 1 / self.ranks.size if sharding is None else sharding.share
        part = part if sharding is None else sharding.summed(part)
        return share * torch.linalg.vector_norm(part).double().square()


def together(numbers: Iterable[Tensor]) -> Tensor:
    """0-d tensors as ``(n,)``, on the device of the first."""
    numbers = list(numbers)
    return torch.stack([moved_to(one, numbers[0]) for one in numbers]) if numbers else torch.zeros(0)
