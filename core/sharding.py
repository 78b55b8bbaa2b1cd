"""Where a model's parameters lie: whole on each rank, or a part on each (DTensors)."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from redline.errors import ConfigurationError
from redline.host_copy import moved_to
from redline.numerics.sharded import Sharding, is_sharded, local_part
from redline.ranks import Ranks

__all__ = ["Layout", "Sharding", "is_sharded", "local_part", "together"]


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
