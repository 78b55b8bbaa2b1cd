"""Where a model's parameters lie: whole on each rank, or a part on each (DTensors)."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from redline.errors import ConfigurationError
from redline.host_copy import moved_to
from redline.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed.tensor import DeviceMesh, DTensor, Placement


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor: one tensor over several ranks, however it is placed on them."""
    return hasattr(tensor, "placements")


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: of a DTensor its part, of another all of it; in the same memory, detached."""
    tensor = tensor.detach()
    if not is_sharded(tensor):
        return tensor
    part: Tensor = tensor.to_local()  # type: ignore[operator]
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
    def of(cls, tensor: Tensor, ranks: int) -> Sharding:
        """That of a DTensor in a run of so many ranks; its mesh tiles the run, as all meshes of a run do."""
        given: Any = tensor
        sizes = zip(given.placements, given.device_mesh.shape, strict=True)
        parts = math.prod(size for placement, size in sizes if not placement.is_replicate())
        return cls(given.device_mesh, tuple(given.placements), tensor.shape, tensor.stride(), parts / ranks)

    @cached_property
    def places(self) -> tuple[tuple[int, int], ...]:
        """Where this rank's part begins and how long it is, in each dimension."""
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        counts, firsts = compute_local_shape_and_global_offset(self.shape, self.mesh, self.placements)
        return tuple(zip(firsts, counts, strict=True))

    def splits(self, dimension: int) -> bool:
        """Whether ranks hold other places along a dimension."""
        sizes = zip(self.placements, self.mesh.shape, strict=True)
        return any(size > 1 and getattr(placement, "dim", None) == dimension for placement, size in sizes)

    @property
    def has_terms(self) -> bool:
        """Whether what ranks hold are terms of a sum."""
        sizes = zip(self.placements, self.mesh.shape, strict=True)
        return any(size > 1 and placement.is_partial() for placement, size in sizes)

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
        """``parameters``: by name; on every rank the same ones.

        Raises:
            ConfigurationError: they are not.
        """
        self.ranks = ranks or Ranks()
        self.shardings: dict[str, Sharding] = {}
        for name, parameter in (parameters or {}).items():
            if is_sharded(parameter):
                self.shardings[name] = Sharding.of(parameter, self.ranks.size)
        if self.ranks.size > 1:
            self._refuse_different(parameters or {})

    def norms(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """L2 norm of each whole tensor, ``(n,)``, float32 or float64, on one device, the same on every rank.

        Args:
            tensors: by the name of the parameter, this rank's parts of what lies as the parameters do.
        """
        if not self.shardings.keys() & tensors.keys():
            return together([torch.linalg.vector_norm(tensor) for tensor in tensors.values()])
        return self.ranks.total(together([self._square(name, tensor) for name, tensor in tensors.items()])).sqrt()

    def norm(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """L2 norm of all of them together, 0-d."""
        if self.shardings.keys() & tensors.keys():
            return torch.linalg.vector_norm(self.norms(tensors))
        return torch.nn.utils.get_total_norm(list(tensors.values()))

    def cut(self, name: str, number: float | Tensor) -> float | Tensor:
        """What of a number a parameter, or one a matrix of a stack, ``(..., 1, 1)``, is this rank's part's."""
        sharding = self.shardings.get(name)
        if sharding is None or not isinstance(number, Tensor) or number.dim() == 0:
            return number
        for dimension, (first, count) in enumerate(sharding.places):
            if number.shape[dimension] > 1:
                number = number.narrow(dimension, first if count else 0, count)
        return number

    def _square(self, name: str, part: Tensor) -> Tensor:
        """What this rank adds to the square of a norm, 0-d, float64."""
        sharding = self.shardings.get(name)
        share = 1 / self.ranks.size if sharding is None else sharding.share
        part = part if sharding is None else sharding.summed(part)
        return share * torch.linalg.vector_norm(part).double().square()

    def _refuse_different(self, parameters: Mapping[str, Tensor]) -> None:
        said = ";".join(f"{name}:{tuple(parameter.shape)}" for name, parameter in parameters.items())
        like = next(iter(parameters.values()), torch.zeros(0))
        mine = torch.tensor([zlib.crc32(said.encode())], dtype=torch.int64, device=local_part(like).device)
        told = self.ranks.rows(mine).flatten().tolist()
        if len(set(told)) > 1:
            other = next(rank for rank, one in enumerate(told) if one != told[0])
            raise ConfigurationError(
                f"got other parameters on rank {other} than on rank 0; expected the same names and shapes on all: "
                "stages of a pipeline, or models that take turns, cannot be measured as one."
            )


def together(numbers: Iterable[Tensor]) -> Tensor:
    """0-d tensors as ``(n,)``, on the device of the first."""
    numbers = list(numbers)
    return torch.stack([moved_to(one, numbers[0]) for one in numbers]) if numbers else torch.zeros(0)
