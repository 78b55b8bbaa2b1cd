"""Top singular values over simulated ranks, threads that sum up, against a full decomposition in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_ranks import Ranks, even, every_way, in_blocks, in_columns, in_rows, parts_of, the_same
from spectral_matrices import (
    ACCURACY,
    LargestConversion,
    gaussian,
    relative_error,
    true_sigma,
    watched_and_unwatched,
    with_spectrum,
)

from redline.numerics import SpectralEstimate, spectra, top_singular_values
from redline.numerics.sharded_spectra import sharded_top_singular_values

MATRICES = {
    "tall": lambda: gaussian(500, 150),
    "wide": lambda: gaussian(150, 500),
    "square": lambda: gaussian(200, 200),
    "small": lambda: gaussian(60, 40),
    "few columns": lambda: gaussian(400, 3),
    "few rows": lambda: gaussian(3, 400),
    "eight columns": lambda: gaussian(300, 8),
    "one row": lambda: gaussian(1, 300),
    "one column": lambda: gaussian(300, 1),
    "one entry": lambda: torch.tensor([[-3.0]]),
    "rank 1": lambda: gaussian(200, 1) @ gaussian(1, 150, 1),
    "rank 5": lambda: gaussian(200, 5) @ gaussian(5, 150, 1),
    "identity": lambda: torch.eye(150),
    "one entry not zero": lambda: torch.zeros(220, 190).index_put_(
        (torch.tensor(3), torch.tensor(7)), torch.tensor(2.0)
    ),
    "clustered tops": lambda: with_spectrum(200, 150, torch.linspace(1, 0.9, 150)).float(),
    "flat power law": lambda: with_spectrum(300, 200, torch.arange(1, 201) ** -0.1).float(),
    "scale 1e-12": lambda: gaussian(200, 150) * 1e-12,
    "scale 1e12": lambda: gaussian(200, 150) * 1e12,
    "float64": lambda: gaussian(200, 150).double(),
    "bfloat16": lambda: gaussian(200, 150).bfloat16(),
}


UNWATCHED = ("wide", "few rows", "eight columns", "rank 5", "flat power law", "bfloat16", "float64")  # they take long


@watched_and_unwatched
@every_way
def test_every_matrix_has_its_own_on_all_ranks(how: str, watched: bool) -> None:
    matrices = {
        name: build()
        for name, build in MATRICES.items()
        if (watched or name in UNWATCHED)
        and (how != "terms" or name not in ("scale 1e-12", "scale 1e12", "bfloat16"))  # lost in the noise of the terms
    }
    shards = [parts_of(matrix, how) for matrix in matrices.values()]
    estimates = Ranks(4).measure(shards, watched=watched)
    estimate = the_same(estimates)
    assert estimate.sigma.dtype == estimate.residual.dtype == torch.float64, "one of them is"
    for sigma, (name, matrix) in zip(estimate.sigma, matrices.items(), strict=True):
        whole = matrix if how != "terms" else torch.stack([one.block.double() for one in parts_of(matrix, how)]).sum(0)
        assert relative_error(sigma, whole) < ACCURACY, name
        rounding = 1e-5 if how == "terms" else 2e-6
        assert float(sigma) <= true_sigma(whole) * (1 + rounding), f"{name}: an estimate from below"
    warm = the_same(Ranks(4).measure(shards, [one.state for one in estimates], watched=watched))
    for sigma, (name, matrix) in zip(warm.sigma, matrices.items(), strict=True):
        assert relative_error(sigma, matrix) < ACCURACY, name


@settings(deadline=None, derandomize=True, max_examples=50)
@given(data=st.data())
def test_any_matrix_in_any_parts(data: st.DataObject) -> None:
    rows, columns = (data.draw(st.integers(1, 260), label=side) for side in ("rows", "columns"))
    rank = data.draw(st.integers(0, min(rows, columns)), label="rank")
    decay = data.draw(st.sampled_from([0.0, 0.1, 0.5, 2.0]), label="decay")
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]), label="dtype")
    watched, seed = data.draw(st.booleans(), label="watched"), data.draw(st.integers(0, 1000), label="seed")
    size = data.draw(st.integers(1, 3), label="size")
    matrix = with_spectrum(rows, columns, torch.arange(1, rank + 1, dtype=torch.float64) ** -decay, seed).to(dtype)

    def cut(length: int, parts: int) -> list[int]:
        at = sorted(data.draw(st.lists(st.integers(0, length), min_size=parts - 1, max_size=parts - 1)))
        return [b - a for a, b in zip([0, *at], [*at, length], strict=True)]

    how = data.draw(st.sampled_from(["rows", "columns", "blocks"]), label="how")
    if how == "rows":
        shards = in_rows(matrix, cut(rows, size))
    elif how == "columns":
        shards = in_columns(matrix, cut(columns, size))
    else:
        shards = in_blocks(matrix, cut(rows, size), cut(columns, 2))
    states = None
    for _ in range(2):  # cold, then warm
        estimates = Ranks(len(shards)).measure([shards], states, watched=watched)
        states = [one.state for one in estimates]
        estimate = the_same(estimates)
        if rank == 0:
            assert estimate.sigma.tolist() == estimate.residual.tolist() == [0.0]
        else:
            assert relative_error(estimate.sigma[0], matrix) < ACCURACY
            assert float(estimate.sigma[0]) <= true_sigma(matrix) * (1 + 2e-6)


@every_way
def test_as_many_passes_as_one_device_takes_and_the_same_residual(how: str) -> None:
    matrix = gaussian(300, 200)
    (alone, estimate) = top_singular_values([matrix]), the_same(Ranks(4).measure([parts_of(matrix, how)]))
    assert abs(int(alone.passes[0]) - int(estimate.passes[0])) <= 6  # columns iterate over the longer side
    v, s = estimate.state.vectors[0][:, 0].double(), float(estimate.sigma[0])
    a = matrix.double() if len(v) == 200 else matrix.double().mT
    assert v.norm().item() == pytest.approx(1, rel=1e-5)
    assert float((a.mT @ (a @ v) - s**2 * v).norm()) / s**2 == pytest.approx(float(estimate.residual[0]), abs=1e-5)


def test_warm_it_costs_fewer_passes_and_follows() -> None:
    matrix, states = gaussian(300, 200), None
    passes = []
    for step in range(8):
        matrix = matrix + 0.02 * gaussian(300, 200, 1 + step)
        estimates = Ranks(4).measure([parts_of(matrix, "rows")], states)
        states = [one.state for one in estimates]
        assert relative_error(the_same(estimates).sigma[0], matrix) < ACCURACY
        passes.append(int(estimates[0].passes[0]))
    assert max(passes[1:]) < passes[0]


@pytest.mark.parametrize("other", [(190, 300), (40, 40)])
def test_a_state_of_other_shapes_is_not_used(other: tuple[int, int]) -> None:
    states = [one.state for one in Ranks(2).measure([in_columns(gaussian(*other), even(other[1], 2))])]
    matrix = gaussian(300, 200)
    cold, estimate = (Ranks(2).measure([in_rows(matrix, [150, 150])], given) for given in (None, states))
    assert int(estimate[0].passes[0]) >= int(cold[0].passes[0]) - 2
    assert relative_error(the_same(estimate).sigma[0], matrix) < ACCURACY


def test_no_matrix_gives_an_empty_estimate_and_sends_nothing() -> None:
    ranks = Ranks(2)
    assert the_same(ranks.measure([])).sigma.shape == (0,)
    assert ranks.messages == []


def test_under_autocast_nothing_is_rounded() -> None:
    matrix = gaussian(300, 200)

    def on(rank: int) -> SpectralEstimate:
        with torch.autocast("cpu", torch.bfloat16):
            return sharded_top_singular_values([in_rows(matrix, [100, 200])[rank]], ranks.total)

    ranks = Ranks(2)
    assert relative_error(the_same(ranks.run(on)).sigma[0], matrix) < ACCURACY


@pytest.mark.parametrize("how", ["rows", "columns", "blocks"])
@pytest.mark.parametrize("shape", [(600, 200), (200, 600), (3000, 70)])
def test_a_half_precision_part_is_converted_a_tile_at_a_time(
    shape: tuple[int, int], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = gaussian(*shape).bfloat16()
    monkeypatch.setattr(spectra, "_TILE", 5_000)
    ranks, shards = Ranks(4), parts_of(matrix, how)

    def on(rank: int) -> SpectralEstimate:
        with LargestConversion() as conversions:
            estimate = sharded_top_singular_values([shards[rank]], ranks.total)
        assert 0 < conversions.elements <= 5_000
        return estimate

    assert relative_error(the_same(ranks.run(on)).sigma[0], matrix) < ACCURACY
