"""Top singular values over simulated ranks, threads that sum up, against a full decomposition in float64."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from redline.numerics import SpectralEstimate, SpectralState, sharded_spectra, spectra, top_singular_values
from redline.numerics.sharded_spectra import MatrixShard, sharded_top_singular_values

ACCURACY = 1e-4  # relative error of sigma_1 that Redline promises
BLOCK = 6  # rank + 2

watched_and_unwatched = pytest.mark.parametrize("watched", [True, False], ids=["watched", "unwatched"])


class Ranks:
    """Threads in place of ranks, and what they sent one another."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.messages: list[Tensor] = []  # as rank 0 sent them
        self._barrier = threading.Barrier(size, timeout=20)
        self._sent: list[Tensor | None] = [None] * size
        self._here = threading.local()

    @property
    def rank(self) -> int:
        return self._here.rank

    def total(self, tensor: Tensor) -> Tensor:
        self._sent[self.rank] = tensor
        if self.rank == 0:
            self.messages.append(tensor)
        self._barrier.wait()
        sent = [one for one in self._sent if one is not None]
        assert len({(one.shape, one.dtype) for one in sent}) == 1
        total = torch.stack(sent).sum(0)
        self._barrier.wait()
        return total

    def run(self, function: Callable[[int], SpectralEstimate]) -> list[SpectralEstimate]:
        def on(rank: int) -> SpectralEstimate:
            self._here.rank = rank
            try:
                return function(rank)
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self.size) as pool:
            running = [pool.submit(on, rank) for rank in range(self.size)]
        errors = [one.exception() for one in running if one.exception() is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error
        return [one.result() for one in running]

    def measure(
        self, matrices: Sequence[list[MatrixShard]], states: Sequence[SpectralState | None] | None = None, **how: object
    ) -> list[SpectralEstimate]:
        """The estimates of all ranks, of the ranks' parts of each matrix."""
        states = states or [None] * self.size
        return self.run(
            lambda rank: sharded_top_singular_values(
                [parts[rank] for parts in matrices], self.total, states[rank], **how
            )
        )


def in_rows(matrix: Tensor, counts: Sequence[int]) -> list[MatrixShard]:
    return [MatrixShard(part, tuple(matrix.shape), "rows") for part in matrix.split(list(counts))]


def in_columns(matrix: Tensor, counts: Sequence[int]) -> list[MatrixShard]:
    return [MatrixShard(part, tuple(matrix.shape), "columns") for part in matrix.split(list(counts), dim=1)]


def in_blocks(matrix: Tensor, rows: Sequence[int], columns: Sequence[int]) -> list[MatrixShard]:
    parts, first_row = [], 0
    for band in matrix.split(list(rows)):
        first_column = 0
        for part in band.split(list(columns), dim=1):
            parts.append(MatrixShard(part, tuple(matrix.shape), "both", first_row, first_column))
            first_column += part.shape[1]
        first_row += len(band)
    return parts


def in_terms(matrix: Tensor, size: int) -> list[MatrixShard]:
    noise = [gaussian(*matrix.shape, seed=50 + k).to(matrix.dtype) for k in range(size - 1)]
    terms = [*noise, matrix - sum(noise, torch.zeros_like(matrix))]
    return [MatrixShard(term, tuple(matrix.shape), "both") for term in terms]


def even(length: int, parts: int) -> list[int]:
    """As ``torch.chunk`` would: the last may be short, or empty."""
    step = -(-length // parts)
    return [max(0, min(step, length - k * step)) for k in range(parts)]


def parts_of(matrix: Tensor, how: str) -> list[MatrixShard]:
    """A matrix on four ranks."""
    rows, columns = matrix.shape
    if how == "rows":
        return in_rows(matrix, even(rows, 4))
    if how == "uneven rows":
        return in_rows(matrix, [rows - rows // 3, 0, rows // 3, 0])
    if how == "columns":
        return in_columns(matrix, even(columns, 4))
    if how == "uneven columns":
        return in_columns(matrix, [0, columns // 5, 0, columns - columns // 5])
    if how == "blocks":
        return in_blocks(matrix, even(rows, 2), even(columns, 2))
    if how == "uneven blocks":
        return in_blocks(matrix, [rows, 0], [columns - columns // 4, columns // 4])
    if how == "terms":
        return in_terms(matrix, 4)
    assert how == "replicas", how
    half = in_rows(matrix, even(rows, 2))
    return [MatrixShard(one.block, one.shape, "rows", share=0.5) for one in half for _ in range(2)]


EVERY_WAY = [
    "rows", "uneven rows", "columns", "uneven columns", "blocks", "uneven blocks", "terms", "replicas"
]  # fmt: skip
every_way = pytest.mark.parametrize("how", EVERY_WAY)


def gaussian(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def with_spectrum(rows: int, columns: int, spectrum: Tensor, seed: int = 0) -> Tensor:
    """A float64 matrix with the singular values given (as many as ``spectrum`` has, the rest are 0)."""
    k = len(spectrum)
    left, right = (
        torch.linalg.qr(gaussian(side, k, 2 * seed + at).double()).Q for at, side in enumerate((rows, columns))
    )
    return (left * spectrum.double()) @ right.mT


def true_sigma(matrix: Tensor) -> float:
    return float(torch.linalg.svdvals(matrix.double())[0])


def relative_error(estimate: Tensor, matrix: Tensor) -> float:
    sigma = true_sigma(matrix)
    return abs(float(estimate) - sigma) / sigma


def the_same(estimates: Sequence[SpectralEstimate]) -> SpectralEstimate:
    """The estimate of all ranks, which must be one to the last bit."""
    first, *others = estimates
    for other in others:
        assert torch.equal(first.sigma.nan_to_num(-1), other.sigma.nan_to_num(-1))
        assert torch.equal(first.residual.nan_to_num(-1), other.residual.nan_to_num(-1))
        assert torch.equal(first.passes, other.passes)
        assert first.state.seed == other.state.seed
        for a, b in zip(first.state.vectors, other.state.vectors, strict=True):
            assert a is b is None or torch.equal(a, b)
    return first


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


@pytest.fixture(autouse=True)
def _one_thread_a_rank() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# Accuracy ---------------------------------------------------------------------------------------------


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


class LargestConversion(TorchDispatchMode):
    """Elements of the largest tensor that was converted from half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() == "aten::_to_copy" and isinstance(args[0], Tensor) and args[0].dtype == torch.bfloat16:
            self.elements = max(self.elements, args[0].numel())
        return func(*args, **(kwargs or {}))


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


# Zero, and not finite ---------------------------------------------------------------------------------


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


# Agreement --------------------------------------------------------------------------------------------


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
    real, ranks, matrix = sharded_spectra._eigenpairs, Ranks(3), gaussian(*shape)

    def eigenpairs(*given: object) -> tuple[Tensor, Tensor]:
        theta, vectors = real(*given)  # type: ignore[arg-type]
        return theta * (1 + 1e-6 * ranks.rank), vectors

    monkeypatch.setattr(sharded_spectra, "_eigenpairs", eigenpairs)
    first, *others = ranks.measure([in_rows(matrix, even(shape[0], 3))], watched=watched)
    for other in others:
        assert torch.equal(first.sigma, other.sigma)
        assert torch.equal(first.residual, other.residual)
    assert relative_error(first.sigma[0], matrix) < ACCURACY


# Messages ---------------------------------------------------------------------------------------------


def formula(shards: Sequence[MatrixShard], rounds: Sequence[int], watched: bool) -> tuple[int, int]:
    """Messages and numbers sent, as the module's docstring says."""
    messages, numbers = 0, 0
    for one, r in zip(shards, rounds, strict=True):
        (m, n), both = one.shape, one.split == "both"
        told = max(1, r - 1) if watched else 1
        if not both and one.side <= 128:
            messages, numbers = max(messages, 2), numbers + one.side * (one.side + 1) // 2 + 4
            continue
        messages = max(messages, r * (1 + both) + told)
        numbers += min(r * BLOCK, one.side) * (m + n if both else one.side) + 4 * told
    return messages, numbers


@watched_and_unwatched
@pytest.mark.parametrize(
    ("ways", "dtype"),
    [
        (["rows"], torch.float32),
        (["rows", "blocks", "columns"], torch.float32),
        (["terms"], torch.float32),
        (["columns"], torch.float64),
        (["rows"], torch.bfloat16),
    ],
)
def test_what_is_sent_is_what_the_docstring_says(ways: list[str], dtype: torch.dtype, watched: bool) -> None:
    shapes = [(200, 150), (140, 300), (500, 40), (20, 160)]
    shards = [parts_of(gaussian(*shape, seed=k).to(dtype), how) for how in ways for k, shape in enumerate(shapes)]
    ranks = Ranks(4)
    estimates = ranks.measure(shards, watched=watched)
    rounds = [int(passes) // 2 for passes in the_same(estimates).passes]
    messages, numbers = formula([one[0] for one in shards], rounds, watched)
    assert len(ranks.messages) == messages
    assert sum(one.numel() for one in ranks.messages) == numbers
    assert {one.dtype for one in ranks.messages} == {torch.float64 if dtype == torch.float64 else torch.float32}
    if not watched:
        assert max(rounds) == 16
    warm = Ranks(4)
    warm.measure(shards, [one.state for one in estimates], watched=watched)
    assert len(warm.messages) < len(ranks.messages)


def test_small_matrices_alone_take_two_messages() -> None:
    ranks = Ranks(4)
    ranks.measure([parts_of(gaussian(500, 100), "rows"), parts_of(gaussian(20, 300), "columns")])
    assert [one.numel() for one in ranks.messages] == [100 * 101 // 2 + 20 * 21 // 2, 2 * 4]


def test_what_would_hold_too_much_at_once_takes_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    shards = [parts_of(gaussian(200, 140, k), "rows") for k in range(4)]
    at_once, in_turns = Ranks(4), Ranks(4)
    together = at_once.measure(shards, watched=False)
    monkeypatch.setattr(sharded_spectra, "_AT_ONCE", 2 * 2 * 140 * 16 * BLOCK)  # two of them
    apart = in_turns.measure(shards, watched=False)
    assert torch.equal(the_same(together).sigma, the_same(apart).sigma)
    assert len(in_turns.messages) == 2 * len(at_once.messages)
    assert max(one.numel() for one in in_turns.messages) == max(one.numel() for one in at_once.messages) / 2
