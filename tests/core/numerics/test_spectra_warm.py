"""Top singular values from warm vectors: quicker, and no less exact, whatever they were."""

import io

import pytest
import torch
from spectral_matrices import (
    ACCURACY,
    gaussian,
    relative_error,
    watched_and_unwatched,
    with_spectrum,
)

from redline.numerics import SpectralState, top_singular_values


class TestWarmStart:
    def test_it_costs_fewer_passes(self):
        matrices = [gaussian(400, 200, seed) for seed in range(4)]
        cold = top_singular_values(matrices)
        moved = [matrix + 1e-3 * gaussian(400, 200, 100 + seed) for seed, matrix in enumerate(matrices)]
        warm = top_singular_values(moved, cold.state)
        afresh = top_singular_values(moved)
        for w, c, sigma, matrix in zip(warm.passes, afresh.passes, warm.sigma, moved, strict=True):
            assert int(w) <= int(c) / 2
            assert relative_error(sigma, matrix) < ACCURACY

    def test_it_follows_a_matrix_that_drifts(self):
        matrix, state = gaussian(200, 150), None
        for step in range(25):
            matrix = 0.98 * matrix + 0.2 * gaussian(200, 150, 1 + step)
            estimate = top_singular_values([matrix], state)
            state = estimate.state
            assert relative_error(estimate.sigma[0], matrix) < ACCURACY

    def test_one_that_has_nothing_to_do_with_the_matrix_costs_no_accuracy(self):
        state = None
        for seed in range(6):
            matrix = gaussian(300, 200, seed)
            estimate = top_singular_values([matrix], state)
            state = estimate.state
            assert relative_error(estimate.sigma[0], matrix) < ACCURACY

    def test_a_looser_tolerance_costs_fewer_passes_and_still_holds(self):
        matrix = gaussian(600, 400)
        tight, loose = top_singular_values([matrix]), top_singular_values([matrix], tolerance=1e-2)
        assert int(loose.passes[0]) < int(tight.passes[0])
        assert relative_error(loose.sigma[0], matrix) < 1e-2

    def test_unwatched_as_many_passes_are_made_as_are_asked_for(self):
        estimate = top_singular_values([gaussian(400, 300), torch.zeros(400, 300)], iterations=7, watched=False)
        assert estimate.passes.tolist() == [14, 14]

    @pytest.mark.parametrize("iterations", [1, 3, 7])
    def test_iterations_bound_the_passes(self, iterations):
        estimate = top_singular_values([gaussian(400, 300)], iterations=iterations)
        assert int(estimate.passes[0]) <= 2 * iterations

    @pytest.mark.parametrize("rank", [1, 2, 5])
    def test_rank_is_how_many_orthonormal_vectors_are_kept(self, rank):
        matrix = gaussian(200, 160)
        estimate = top_singular_values([matrix], rank=rank)
        (vectors,) = estimate.state.vectors
        assert vectors.shape == (160, rank)
        assert torch.allclose(vectors.mT @ vectors, torch.eye(rank), atol=1e-3)
        warm = top_singular_values([matrix], estimate.state, rank=rank)
        assert relative_error(warm.sigma[0], matrix) < ACCURACY

    @watched_and_unwatched
    def test_as_many_may_be_kept_as_leave_room_for_the_random_ones(self, watched):
        matrix = gaussian(140, 129)
        assert relative_error(top_singular_values([matrix], rank=127, watched=watched).sigma[0], matrix) < ACCURACY

    @pytest.mark.parametrize("rank", [-1, 0, 128])
    def test_a_rank_that_leaves_none_is_refused(self, rank):
        with pytest.raises(ValueError, match=f"rank must be from 1 to 127, got {rank}"):
            top_singular_values([gaussian(200, 160)], rank=rank)

    @pytest.mark.parametrize("factor", [3.0, 10.0, 100.0])
    @pytest.mark.parametrize("bulk", ["gap", "linear", "power law"])
    @pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
    @watched_and_unwatched
    def test_a_new_top_orthogonal_to_the_warm_vectors_is_found_at_once(self, watched, shape, bulk, factor):
        for seed in range(4):
            state, matrix = locked_on(shape, bulk, factor, seed)
            estimate = top_singular_values([matrix], state, watched=watched)
            assert relative_error(estimate.sigma[0], matrix) < ACCURACY

    @pytest.mark.parametrize("factor", [1.05, 1.5])
    @pytest.mark.parametrize("bulk", ["gap", "linear", "power law"])
    @watched_and_unwatched
    def test_a_new_top_closer_to_the_old_one_is_found_within_ten_calls(self, watched, bulk, factor):
        for seed in range(4):
            state, matrix = locked_on((300, 200), bulk, factor, seed)
            for _ in range(10):
                estimate = top_singular_values([matrix], state, watched=watched)
                state = estimate.state
            assert relative_error(estimate.sigma[0], matrix) < ACCURACY

    def test_a_runner_up_that_overtakes_is_found_at_once(self):
        spectrum = torch.cat([torch.tensor([1.0, 0.99]), torch.linspace(0.6, 0.0, 148)])
        old = with_spectrum(200, 150, spectrum).float()
        spectrum[1] = 1.01
        new = with_spectrum(200, 150, spectrum).float()
        estimate = top_singular_values([new], top_singular_values([old]).state)
        assert relative_error(estimate.sigma[0], new) < ACCURACY

    @pytest.mark.parametrize("other", [(300, 190), (190, 300), (140, 140), (80, 80), (1, 1)])
    def test_a_state_of_other_shapes_is_not_used(self, other):
        state = top_singular_values([gaussian(*other)]).state
        matrix = gaussian(200, 150)
        assert relative_error(top_singular_values([matrix], state).sigma[0], matrix) < ACCURACY

    def test_a_state_of_another_number_of_matrices_is_not_used(self):
        state = top_singular_values([gaussian(200, 150), gaussian(190, 170)]).state
        matrix = gaussian(200, 150, 3)
        assert relative_error(top_singular_values([matrix], state).sigma[0], matrix) < ACCURACY

    def test_a_state_of_another_precision_is_used(self):
        matrix = gaussian(300, 200).double()
        cold = top_singular_values([matrix.float()])
        warm = top_singular_values([matrix], cold.state)
        assert int(warm.passes[0]) < int(cold.passes[0])
        assert relative_error(warm.sigma[0], matrix) < ACCURACY

    def test_a_state_that_was_saved_goes_on_as_the_one_that_was_not(self):
        matrices = [gaussian(200, 150), gaussian(40, 30), gaussian(190, 170).double()]
        state = top_singular_values(matrices).state
        file = io.BytesIO()
        torch.save({"vectors": list(state.vectors), "seed": state.seed}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        restored = SpectralState(tuple(saved["vectors"]), saved["seed"])
        moved = [matrix + 0.01 for matrix in matrices]
        went_on, resumed = top_singular_values(moved, state), top_singular_values(moved, restored)
        assert torch.equal(went_on.sigma, resumed.sigma)
        assert torch.equal(went_on.passes, resumed.passes)
        assert went_on.state.seed == resumed.state.seed
        for a, b in zip(went_on.state.vectors, resumed.state.vectors, strict=True):
            assert a is b is None or torch.equal(a, b)

    def test_each_call_draws_other_columns(self):
        matrix = gaussian(300, 200)
        one, two = (top_singular_values([matrix], SpectralState(seed=seed), iterations=1) for seed in (0, 1))
        assert one.sigma.item() != two.sigma.item()
        assert top_singular_values([matrix]).state.seed != SpectralState().seed


def locked_on(shape: tuple[int, int], bulk: str, factor: float, seed: int) -> tuple[SpectralState, torch.Tensor]:
    """A matrix, and warm vectors that no product with it can lead to its top singular value.

    The matrix is block diagonal: the warm vectors are those of the first block, as an earlier call found them, and
    exactly 0 on the second, whose one singular value is ``factor`` times the top of the first.
    """
    rows, columns = shape[0] - 20, shape[1] - 20
    k = min(rows, columns)
    spectrum = {
        "gap": torch.cat([torch.tensor([1.0, 0.9]), torch.linspace(0.5, 0.1, k - 2)]),
        "linear": torch.linspace(1, 0, k),
        "power law": torch.arange(1, k + 1) ** -0.5,
    }[bulk]
    old = with_spectrum(rows, columns, spectrum, seed).float()
    state = top_singular_values([old]).state
    vectors = torch.nn.functional.pad(state.vectors[0], (0, 0, 0, 20))
    new = with_spectrum(20, 20, torch.tensor([factor]), seed).float()
    return SpectralState((vectors,), state.seed + seed), torch.block_diag(old, new)
