"""What the tests of spectra share: matrices, their top singular value by a full decomposition, what was converted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ACCURACY = 1e-4  # relative error of sigma_1 that Redline promises

# Watched, the iteration stops once it has converged; unwatched, as on an accelerator, after a fixed count.
watched_and_unwatched = pytest.mark.parametrize("watched", [True, False], ids=["watched", "unwatched"])


def gaussian(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def orthonormal(rows: int, columns: int, seed: int = 0) -> Tensor:
    noise = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(noise).Q


def with_spectrum(rows: int, columns: int, spectrum: Tensor, seed: int = 0) -> Tensor:
    """A float64 matrix with the singular values given (as many as ``spectrum`` has, the rest are 0)."""
    k = len(spectrum)
    left, right = orthonormal(rows, k, 2 * seed), orthonormal(columns, k, 2 * seed + 1)
    return (left * spectrum.double()) @ right.mT


def true_sigma(matrix: Tensor) -> float:
    return float(torch.linalg.svdvals(matrix.double())[0])


def relative_error(estimate: Tensor, matrix: Tensor) -> float:
    sigma = true_sigma(matrix)
    return abs(float(estimate) - sigma) / sigma


class LargestConversion(TorchDispatchMode):
    """Elements of the largest tensor that was converted from half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() == "aten::_to_copy" and isinstance(args[0], Tensor) and args[0].dtype == torch.bfloat16:
            self.elements = max(self.elements, args[0].numel())
        return func(*args, **(kwargs or {}))
