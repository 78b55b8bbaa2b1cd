"""Matrices over simulated ranks that are zero, or not finite on one of them."""

from __future__ import annotations

import math

import pytest
import torch
from simulated_ranks import Ranks, parts_of, the_same
from spectral_matrices import ACCURACY, gaussian, relative_error, watched_and_unwatched
from torch import Tensor

from redline.numerics import SpectralEstimate
from redline.numerics.sharded_spectra import MatrixShard


@watched_and_unwatched
@pytest.mark.parametrize("how", ["uneven rows", "columns", "blocks"])
@pytest.mark.parametrize("shape", [(190, 140), (20, 10), (1, 5)])
def test_a_zero_matrix_has_sigma_0_and_residual_0(shape: tuple[int, int], how: str, watched: bool) -> None:
    shards = [MatrixShard(torch.zeros_like(one.block), one.shape, one.split, one.first_row, one.first_column)
              for one in parts_of(torch.ones(shape), how)]  # fmt: skip
    estimates = Ranks(4).measure([shards], watched=watched)
    for one in (estimates, Ranks(4).measure([shards], [one.state for one in estimates], watched=watched)):
        estimate = the_same(one)
        assert estimate.sigma.tolist() == estimate.residual.tolist() == [0.0]


@watched_and_unwatched
@pytest.mark.parametrize(("how", "value"), [("rows", math.nan), ("columns", math.inf), ("blocks", math.nan)])
@pytest.mark.parametrize("shape", [(190, 140), (20, 10)])
def test_what_is_not_finite_on_one_rank_gives_nan_on_all_and_poisons_nothing(
    shape: tuple[int, int], value: float, how: str, watched: bool
) -> None:
    matrix, neighbour = gaussian(*shape), gaussian(140, 160, 7)
    broken = matrix.clone()
    broken[-1, -1] = value

    def measure(given: Tensor, before: list[SpectralEstimate] | None) -> list[SpectralEstimate]:
        states = None if before is None else [one.state for one in before]
        return Ranks(4).measure([parts_of(given, how), parts_of(neighbour, how)], states, watched=watched)

    before = measure(matrix, None)
    during = measure(broken, before)
    assert math.isnan(the_same(during).sigma[0])
    assert relative_error(during[0].sigma[1], neighbour) < ACCURACY
    after, undisturbed = measure(matrix, during), measure(matrix, before)
    assert relative_error(the_same(after).sigma[0], matrix) < ACCURACY
    assert int(after[0].passes[0]) <= int(undisturbed[0].passes[0]), "still warm"
