"""Top singular values against a full singular value decomposition in float64."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spectral_matrices import (
    ACCURACY,
    gaussian,
    orthonormal,
    relative_error,
    true_sigma,
    watched_and_unwatched,
    with_spectrum,
)

from redline.numerics import SpectralState, spectra, top_singular_values


def true_residual(matrix: torch.Tensor, vector: torch.Tensor, sigma: torch.Tensor) -> float:
    """``||A^T A v - sigma^2 v|| / sigma^2`` in float64, with ``A`` the tall one of the matrix and its transpose."""
    scale = float(matrix.abs().max()) or 1.0  # squares of small entries would vanish
    a, v, s = matrix.double() / scale, vector.double(), float(sigma) / scale
    a = a.mT if a.shape[0] < a.shape[1] else a
    return float((a.mT @ (a @ v) - s**2 * v).norm()) / s**2


MATRICES = {
    "tall": lambda: gaussian(500, 150),
    "very tall": lambda: gaussian(3000, 20),
    "wide": lambda: gaussian(150, 500),
    "very wide": lambda: gaussian(3, 2000),
    "square": lambda: gaussian(256, 256),
    "just small": lambda: gaussian(128, 140),
    "small square": lambda: gaussian(24, 24),
    "just too large to be small": lambda: gaussian(129, 129),
    "large": lambda: gaussian(1200, 400),
    "one column": lambda: gaussian(300, 1),
    "one row": lambda: gaussian(1, 300),
    "one entry": lambda: torch.tensor([[-3.0]]),
    "rank 1": lambda: gaussian(200, 1) @ gaussian(1, 150, 1),
    "rank 1, small": lambda: gaussian(20, 1) @ gaussian(1, 15, 1),
    "rank 5": lambda: gaussian(200, 5) @ gaussian(5, 150, 1),
    "one entry not zero": lambda: torch.zeros(220, 190).index_put_(
        (torch.tensor(3), torch.tensor(7)), torch.tensor(2.0)
    ),
    "identity": lambda: torch.eye(150),
    "small identity": lambda: torch.eye(20),
    "orthonormal columns": lambda: orthonormal(300, 150).float(),
    "diagonal": lambda: torch.diag(torch.linspace(-5.0, 3.0, 150)),
    "equal tops": lambda: with_spectrum(200, 150, torch.cat([torch.ones(10), torch.full((140,), 0.5)])).float(),
    "clustered tops": lambda: with_spectrum(200, 150, torch.linspace(1, 0.9, 150)).float(),
    "tightly clustered tops": lambda: with_spectrum(300, 200, 1 - 1e-3 * torch.linspace(0, 1, 200)).float(),
    "runner-up at 0.9999": lambda: with_spectrum(
        200, 150, torch.cat([torch.tensor([1, 0.9999]), torch.linspace(0.7, 0, 148)])
    ).float(),
    "spike": lambda: 30 * with_spectrum(300, 200, torch.ones(1)).float() + 0.5 * gaussian(300, 200),
    "spike at the edge": lambda: 33 * with_spectrum(300, 200, torch.ones(1)).float() + gaussian(300, 200),
    "power law": lambda: with_spectrum(300, 200, torch.arange(1, 201) ** -0.5).float(),
    "flat power law": lambda: with_spectrum(300, 200, torch.arange(1, 201) ** -0.1).float(),
    "all ones": lambda: torch.ones(190, 170),
    "transposed view": lambda: gaussian(150, 190).mT,
    "strided view": lambda: gaussian(300, 380)[::2, ::2],
    "scale 1e-12": lambda: gaussian(200, 150) * 1e-12,
    "scale 1e-18": lambda: gaussian(200, 150) * 1e-18,
    "scale 1e12": lambda: gaussian(200, 150) * 1e12,
    "float64, scale 1e-90": lambda: gaussian(200, 150).double() * 1e-90,
    "float64, scale 1e80": lambda: gaussian(200, 150).double() * 1e80,
    "small, scale 1e-12": lambda: gaussian(30, 20) * 1e-12,
    "small, scale 1e12": lambda: gaussian(30, 20) * 1e12,
    "bfloat16": lambda: gaussian(200, 130).bfloat16(),
    "float16": lambda: gaussian(200, 130).half(),
    "float64": lambda: gaussian(200, 130).double(),
    "small bfloat16": lambda: gaussian(20, 30).bfloat16(),
}


@watched_and_unwatched
@pytest.mark.parametrize("name", MATRICES)
def test_sigma_equals_that_of_a_full_decomposition_cold_and_warm(name, watched):
    matrix = MATRICES[name]()
    cold = top_singular_values([matrix], watched=watched)
    warm = top_singular_values([matrix], cold.state, watched=watched)
    for estimate in (cold, warm):
        assert relative_error(estimate.sigma[0], matrix) < ACCURACY
        assert estimate.sigma.dtype == (torch.float64 if matrix.dtype == torch.float64 else torch.float32)
        assert estimate.sigma.shape == estimate.residual.shape == estimate.passes.shape == (1,)


@pytest.mark.parametrize("shape", [(200, 150), (90, 70)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_as_exact_under_the_callers_autocast(shape, dtype):
    matrix = gaussian(*shape).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cold = top_singular_values([matrix])
        warm = top_singular_values([matrix], cold.state)
    for estimate in (cold, warm):
        assert relative_error(estimate.sigma[0], matrix) < ACCURACY


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("iterations", [None, 2])
@watched_and_unwatched
def test_the_residual_is_that_of_the_vector_returned(name, watched, iterations):
    matrix = MATRICES[name]()
    estimate = top_singular_values([matrix], iterations=iterations, watched=watched)
    if min(matrix.shape) <= 128:  # decomposed, not iterated on
        assert estimate.state.vectors == (None,)
        assert 0 <= float(estimate.residual[0]) < 1e-5
        return
    vector = estimate.state.vectors[0][:, 0]
    assert float(vector.norm()) == pytest.approx(1, abs=1e-5)
    # The products are float32: a residual below 1e-5 is rounding.
    assert float(estimate.residual[0]) == pytest.approx(
        true_residual(matrix, vector, estimate.sigma[0]), rel=1e-2, abs=1e-5
    )


def test_two_iterations_on_a_flat_spectrum_say_that_they_have_not_arrived():
    matrix = gaussian(400, 300)
    estimate = top_singular_values([matrix], iterations=2)
    assert relative_error(estimate.sigma[0], matrix) > 1e-2
    assert float(estimate.residual[0]) > 1e-2


@watched_and_unwatched
@pytest.mark.parametrize("shape", [(190, 180), (90, 80), (20, 10), (1, 5), (5, 1), (1, 1)])
def test_a_zero_matrix_has_sigma_0_and_residual_0(shape, watched):
    cold = top_singular_values([torch.zeros(shape)], watched=watched)
    for estimate in (cold, top_singular_values([torch.zeros(shape)], cold.state, watched=watched)):
        assert estimate.sigma.tolist() == [0.0]
        assert estimate.residual.tolist() == [0.0]


@watched_and_unwatched
def test_one_whose_squares_are_lost_is_still_told_as_finite(watched):
    estimate = top_singular_values([gaussian(190, 180) * 1e-21, gaussian(190, 180)], watched=watched)
    assert torch.isfinite(estimate.sigma).all()
    assert torch.isfinite(estimate.residual).all()
    assert estimate.sigma[0] < 1e-19


@watched_and_unwatched
def test_a_matrix_that_is_no_longer_zero_is_measured_from_the_state_of_when_it_was(watched):
    state = top_singular_values([torch.zeros(300, 200)], watched=watched).state
    matrix = gaussian(300, 200)
    assert relative_error(after_becoming_warm(matrix, state, watched), matrix) < ACCURACY


def after_becoming_warm(matrix, state, watched):
    """Watched, one call is enough; unwatched it is documented to take a few, the iterations of each being fixed."""
    for _ in range(1 if watched else 4):
        estimate = top_singular_values([matrix], state, watched=watched)
        state = estimate.state
    return estimate.sigma[0]


def test_many_matrices_are_measured_independently_and_in_order():
    matrices = [build() for build in MATRICES.values() if build().dtype == torch.float32]
    together = top_singular_values(matrices)
    errors = [relative_error(sigma, matrix) for sigma, matrix in zip(together.sigma, matrices, strict=True)]
    assert max(errors) < ACCURACY
    assert together.sigma.shape == together.residual.shape == together.passes.shape == (len(matrices),)


@watched_and_unwatched
@pytest.mark.parametrize("at_once", [1, 3 * 6 * 150, None], ids=["one", "three", "all"])
def test_matrices_that_go_together_are_each_measured(monkeypatch, watched, at_once):
    if at_once is not None:
        monkeypatch.setattr(spectra, "_AT_ONCE", at_once)
    flat = [gaussian(150 + 10 * seed, 150, seed) for seed in range(4)]
    quick = [with_spectrum(170, 150, torch.arange(1, 151) ** -2.0, seed).float() for seed in range(4)]
    broken, zero = torch.full((160, 150), math.nan), torch.zeros(150, 180)
    small, small_broken = gaussian(20, 150), torch.full((30, 20), math.nan)
    matrices = [
        flat[0], quick[0], broken, flat[1], quick[1], zero, quick[2].mT, flat[2], small, quick[3], small_broken, flat[3]
    ]  # fmt: skip
    cold = top_singular_values(matrices, watched=watched)
    for estimate in (cold, top_singular_values(matrices, cold.state, watched=watched)):
        assert torch.isnan(estimate.sigma).tolist() == [
            matrix is broken or matrix is small_broken for matrix in matrices
        ]
        assert estimate.sigma[5] == 0
        errors = [
            relative_error(sigma, matrix)
            for sigma, matrix in zip(estimate.sigma, matrices, strict=True)
            if not any(matrix is other for other in (broken, zero, small_broken))
        ]
        assert max(errors) < ACCURACY
    if watched:  # each goes on for as long as it needs
        assert cold.passes[[0, 3, 7, 11]].min() > cold.passes[[1, 4, 6, 9]].max()


@watched_and_unwatched
def test_a_matrix_that_is_new_starts_cold_beside_those_that_are_warm(watched):
    matrices = [gaussian(400, 200, seed) for seed in range(4)]
    vectors = top_singular_values(matrices, watched=watched).state.vectors
    estimate = top_singular_values(matrices, SpectralState((*vectors[:2], None, vectors[3]), 7), watched=watched)
    assert estimate.passes[2] > estimate.passes[[0, 1, 3]].max()
    for sigma, matrix in zip(estimate.sigma, matrices, strict=True):
        assert relative_error(sigma, matrix) < ACCURACY


def test_no_matrix_gives_an_empty_estimate():
    estimate = top_singular_values([])
    assert estimate.sigma.shape == estimate.residual.shape == (0,)


def test_parameters_are_measured_without_a_graph_and_left_alone():
    parameter = torch.nn.Parameter(gaussian(180, 150))
    kept = parameter.detach().clone()
    estimate = top_singular_values([parameter])
    assert not estimate.sigma.requires_grad
    assert not any(vectors.requires_grad for vectors in estimate.state.vectors)
    assert torch.equal(parameter.detach(), kept)
    assert parameter.grad is None


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    rows=st.integers(1, 320),
    columns=st.integers(1, 320),
    rank=st.integers(0, 320),
    decay=st.sampled_from([0.0, 0.1, 0.5, 2.0]),
    exponent=st.integers(-12, 12),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    watched=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_any_matrix(rows, columns, rank, decay, exponent, dtype, watched, seed):
    k = min(rows, columns, rank)
    spectrum = torch.arange(1, k + 1, dtype=torch.float64) ** -decay * 10.0**exponent
    matrix = with_spectrum(rows, columns, spectrum, seed).to(dtype)
    state = SpectralState(seed=seed)
    for _ in range(2):  # cold, then warm
        estimate = top_singular_values([matrix], state, watched=watched)
        state = estimate.state
        if k == 0:
            assert estimate.sigma.tolist() == [0.0]
        else:
            assert relative_error(estimate.sigma[0], matrix) < ACCURACY
            assert float(estimate.sigma[0]) <= true_sigma(matrix) * (1 + 2e-6)  # an estimate from below


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    side=st.sampled_from([(40, 30), (180, 150), (150, 250)]),
    factor=st.floats(1e-3, 1e3),
    seed=st.integers(0, 2**20),
)
def test_sigma_scales_with_the_matrix_and_is_that_of_the_transpose(side, factor, seed):
    matrix = gaussian(*side, seed=seed)
    sigma = float(top_singular_values([matrix]).sigma[0])
    assert float(top_singular_values([matrix * factor]).sigma[0]) == pytest.approx(sigma * factor, rel=ACCURACY)
    assert float(top_singular_values([matrix.mT]).sigma[0]) == pytest.approx(sigma, rel=ACCURACY)


class TestNonFinite:
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("where", ["one entry", "everywhere"])
    @pytest.mark.parametrize("shape", [(190, 150), (150, 190), (20, 10), (30, 1), (1, 1)])
    @watched_and_unwatched
    def test_it_gives_nan_and_does_not_poison_the_next_call(self, watched, value, where, shape):
        matrix = gaussian(*shape)
        broken = matrix.clone() if where == "one entry" else torch.full(shape, value)
        broken[-1, -1] = value
        before = top_singular_values([matrix], watched=watched)
        during = top_singular_values([broken], before.state, watched=watched)
        assert math.isnan(during.sigma[0])
        after = top_singular_values([matrix], during.state, watched=watched)
        undisturbed = top_singular_values([matrix], before.state, watched=watched)
        assert relative_error(after.sigma[0], matrix) < ACCURACY
        assert int(after.passes[0]) <= int(undisturbed.passes[0])  # still warm

    @watched_and_unwatched
    def test_it_does_not_poison_a_cold_start(self, watched):
        matrix = gaussian(300, 200)
        during = top_singular_values([torch.full((300, 200), math.nan)], watched=watched)
        assert math.isnan(during.sigma[0])
        assert relative_error(after_becoming_warm(matrix, during.state, watched), matrix) < ACCURACY

    def test_its_neighbours_are_measured(self):
        matrices = [gaussian(200, 160), torch.full((90, 80), math.nan), gaussian(30, 40)]
        sigma = top_singular_values(matrices).sigma
        assert torch.isnan(sigma).tolist() == [False, True, False]
        assert relative_error(sigma[0], matrices[0]) < ACCURACY
        assert relative_error(sigma[2], matrices[2]) < ACCURACY


class TestRandomStreams:
    def test_no_global_stream_is_drawn_from_or_moved(self):
        before = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
        top_singular_values([gaussian(200, 150), gaussian(10, 10)])
        torch_state, numpy_state, python_state = before
        assert torch.equal(torch.get_rng_state(), torch_state)
        assert np.array_equal(np.random.get_state()[1], numpy_state[1])  # noqa: NPY002
        assert np.random.get_state()[2:] == numpy_state[2:]  # noqa: NPY002
        assert random.getstate() == python_state

    def test_the_result_does_not_depend_on_a_global_stream(self):
        matrix, results = gaussian(200, 150), []
        for seed in (0, 1):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                results.append(top_singular_values([matrix], iterations=3).sigma.item())
        assert results[0] == results[1]


@pytest.mark.parametrize("shape", [(201, 149), (130, 138), (130, 142), (219, 221), (190, 170), (200, 66)])
def test_rank_1_never_exceeds_its_singular_value_however_often_it_is_measured(shape):
    """Beyond the rank a Krylov block is rounding; kept for signal, it would lead the Ritz value above sigma_1."""
    matrix, state = torch.ones(shape), None
    for _ in range(6):
        estimate = top_singular_values([matrix], state, watched=False)
        assert relative_error(estimate.sigma[0], matrix) < 1e-5
        state = estimate.state
