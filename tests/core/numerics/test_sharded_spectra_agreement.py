"""Simulated ranks agree: on when to stop, and on every bit of what comes of it."""

from __future__ import annotations

import pytest
import torch
from simulated_ranks import Ranks, even, in_rows, the_same
from spectral_matrices import ACCURACY, gaussian, relative_error, watched_and_unwatched, with_spectrum
from torch import Tensor

from redline.numerics import sharded_spectra, spectra, top_singular_values


def test_it_stops_when_all_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding may tell ranks otherwise; were they not to agree, one would wait for another without end."""
    real, asked = sharded_spectra._has_settled, [0] * 3

    def has_settled(*given: object) -> bool:
        asked[ranks.rank] += 1
        settled = real(*given)  # type: ignore[arg-type]
        return settled and (ranks.rank != 1 or asked[1] >= 9)

    ranks = Ranks(3)
    monkeypatch.setattr(sharded_spectra, "_has_settled", has_settled)
    matrix = with_spectrum(300, 200, torch.arange(1, 201) ** -1.0).float()
    assert int(top_singular_values([matrix]).passes[0]) < 2 * 10
    estimate = the_same(ranks.measure([in_rows(matrix, even(300, 3))]))
    assert estimate.passes.tolist() == [2 * 10], "9 times asked, from the second round on"
    assert asked == [9, 9, 9]


@watched_and_unwatched
@pytest.mark.parametrize("shape", [(300, 200), (60, 40)])
def test_results_are_the_same_to_the_bit_where_rounding_is_not(
    shape: tuple[int, int], watched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, ranks, matrix = spectra._eigenpairs, Ranks(3), gaussian(*shape)

    def eigenpairs(*given: object) -> tuple[Tensor, Tensor]:
        theta, vectors = real(*given)  # type: ignore[arg-type]
        return theta * (1 + 1e-6 * ranks.rank), vectors

    monkeypatch.setattr(spectra, "_eigenpairs", eigenpairs)
    first, *others = ranks.measure([in_rows(matrix, even(shape[0], 3))], watched=watched)
    for other in others:
        assert torch.equal(first.sigma, other.sigma)
        assert torch.equal(first.residual, other.residual)
    assert relative_error(first.sigma[0], matrix) < ACCURACY
