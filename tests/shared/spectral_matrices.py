"""What the tests of spectra share: random matrices, their top singular value by a full decomposition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

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
