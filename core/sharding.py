"""Where a model's parameters lie: whole on each rank, or a part on each (DTensors)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from redline.host_copy import moved_to
from redline.numerics.sharded import Sharding, is_sharded, local_part
from redline.ranks import Ranks

__all__ = ["Layout", "Sharding", "is_sharded", "local_part", "together"]


class Layout:
    """How the parameters of a run lie over its ranks.

    Attributes:
        ranks: of the run.
        shardings: by name, of the parameters that are DTensors.
        device: of the first parameter.
    """

    def __init__(self, ranks: Ranks | None = None, parameters: Mapping[str, Tensor] | None = None) -> None:
        """``parameters``: by name; on every rank the same ones."""
        self.ranks = ranks or Ranks()
        self.shardings = {
            name: Sharding.of(parameter, self.ranks.size)
            for name, parameter in (parameters or {}).items()
            if is_sharded(parameter)
        }
        first = next(iter((parameters or {}).values()), None)
        self.device = torch.device("cpu") if first is None else local_part(first).device

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


def together(numbers: Iterable[Tensor]) -> Tensor:
    """0-d tensors as ``(n,)``, on the device of the first."""
    numbers = list(numbers)
    return torch.stack([moved_to(one, numbers[0]) for one in numbers]) if numbers else torch.zeros(0)
