"""Tensors of which each rank holds a part (DTensors): the part, how it lies, and the models that have them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DeviceMesh, DTensor, Placement


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor: one tensor over several ranks, however it is placed on them."""
    return hasattr(tensor, "placements")


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: of a DTensor its part, of another all of it; in the same memory, detached."""
    if not is_sharded(tensor):
        return tensor.detach()
    with torch.no_grad():
        return cast("DTensor", tensor).to_local().detach()  # in this order: of a DTensor each operation is dear


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

    @property
    def without_terms(self) -> Sharding:
        """How it lies once terms of a sum have been exchanged for parts of it."""
        from torch.distributed.tensor import Shard

        placements = tuple(Shard(0) if placement.is_partial() else placement for placement in self.placements)
        return replace(self, placements=placements)

    def summed(self, part: Tensor) -> Tensor:
        """A part of it that is no term of a sum: where it is placed as ``Partial`` the ranks exchange their terms."""
        if not self.has_terms:
            return part
        return self.whole(part).redistribute(placements=self.without_terms.placements).to_local()


def device_type(tensor: Tensor) -> str:
    """The kind of device that computes with it: of a DTensor that of its mesh, of which its parts may be kept off."""
    mesh = getattr(tensor, "device_mesh", None)
    return tensor.device.type if mesh is None else str(mesh.device_type)


def device_of(tensor: Tensor) -> torch.device:
    """The device that computes with it."""
    kind = device_type(tensor)
    if tensor.device.type == kind:
        return tensor.device
    return torch.device(kind, torch.get_device_module(kind).current_device())


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    """The modules of a model that ``fully_shard`` was applied to."""
    return [cast("FSDPModule", module) for module in model.modules() if hasattr(module, "_get_fsdp_state")]


def class_name(module: nn.Module) -> str:
    """The name of the class that the user wrote: ``fully_shard`` puts one of its own in front of it."""
    if not hasattr(module, "_get_fsdp_state"):
        return type(module).__name__
    return next(base.__name__ for base in type(module).__mro__ if not hasattr(base, "_get_fsdp_state"))
