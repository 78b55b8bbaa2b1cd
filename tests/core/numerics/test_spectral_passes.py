"""What a measurement of spectra passes over and copies, and when it may stop."""

import pytest
import torch
from spectral_matrices import LargestConversion
from torch import Tensor

from redline.numerics import spectra, top_singular_values


@pytest.mark.parametrize("shape", [(600, 200), (200, 600), (70, 3000), (3000, 70)])
def test_a_half_precision_matrix_is_converted_a_tile_at_a_time(shape, monkeypatch):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    monkeypatch.setattr(spectra, "_TILE", 10_000)
    with LargestConversion() as conversions:
        sigma = top_singular_values([matrix]).sigma[0]
    assert 0 < conversions.elements <= 10_000
    assert sigma.item() == pytest.approx(torch.linalg.svdvals(matrix.double())[0].item(), rel=1e-4)


def moved(seed: int, rows: int, columns: int, by: float) -> tuple[Tensor, Tensor]:
    """A matrix with a decaying spectrum, and what a low-rank change of relative size ``by`` made of it."""
    generator = torch.Generator().manual_seed(seed)
    decay = 1 / torch.arange(1, columns + 1) ** 0.5
    before = torch.randn(rows, columns, generator=generator) @ decay.diag() / rows**0.5
    change = torch.randn(rows, 3, generator=generator) @ torch.randn(3, columns, generator=generator)
    return before, before + by * change / torch.linalg.matrix_norm(change, 2)


@pytest.mark.parametrize("by", [0.01, 0.1, 0.5, 2.0])
def test_it_stops_within_the_tolerance_and_sooner_for_a_larger_one(by):
    passes = []
    for tolerance in (1e-2, 1e-3, 1e-4, 1e-5):
        errors, total = [], 0
        for seed in range(6):
            before, after = moved(seed, 300, 160, by)
            estimate = top_singular_values([after], top_singular_values([before]).state, tolerance=tolerance)
            true = torch.linalg.svdvals(after.double())[0]
            errors.append(float(1 - estimate.sigma[0].double() / true))
            total += int(estimate.passes[0])
        assert max(errors) <= tolerance
        assert min(errors) > -1e-6, "a Ritz value is an estimate from below"
        passes.append(total)
    assert passes == sorted(passes)
    assert passes[0] < passes[-1] or by < 0.5  # of what hardly moved the fewest will do


def test_a_matrix_that_did_not_move_takes_the_fewest_passes():
    matrix = moved(0, 300, 160, 0.5)[1]
    state = top_singular_values([matrix], tolerance=1e-6).state
    assert int(top_singular_values([matrix], state, tolerance=1e-4).passes[0]) == 4
