"""The least exact radius of many positions: the minimum over them of each one's own, and for the price of a few."""

from __future__ import annotations

import math
import signal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from redline.numerics import exact_ghost_radius, exact_radius, ghost_radius
from redline.numerics.exact_radius import LeastRadius, least_ghost_radius

CLOSE = {torch.float32: 1e-5, torch.float64: 2e-6}
EVERY_BATCH = pytest.mark.parametrize(
    ("shape", "scale"),
    [
        *[((40, 1), 1.0), ((60, 2), 5.0), ((6, 9, 2), 20.0), ((80, 10), 0.1), ((80, 10), 5.0), ((7, 8, 10), 20.0)],
        *[((3, 5, 500), 0.1), ((20, 500), 5.0), ((20, 500), 20.0)],
    ],
    ids=str,
)


def positions(
    shape: tuple[int, ...], scale: float, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Logits of the scale given, and tangents whose spreads differ from position to position."""
    generator = torch.Generator().manual_seed(seed)
    z, a = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    length = torch.randn((*shape[:-1], 1), generator=generator, dtype=torch.float64).mul(0.5).exp()
    return (scale * z).to(dtype), (a * length).to(dtype)


def each(z: Tensor, a: Tensor) -> Tensor:
    return exact_ghost_radius(z.double(), a.double())


def assert_least(found: LeastRadius, least: float, rel: float) -> None:
    assert (found.lower.dtype, found.upper.dtype, found.lower.shape) == (torch.float64, torch.float64, ())
    assert float(found.lower) == pytest.approx(least, rel=rel)
    assert float(found.upper) == pytest.approx(least, rel=rel)


@EVERY_BATCH
@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("seed", [0, 1])
def test_it_is_the_minimum_over_all_positions(
    shape: tuple[int, ...], scale: float, dtype: torch.dtype, seed: int
) -> None:
    z, a = positions(shape, scale, seed, dtype)
    radii = each(z, a)
    found = least_ghost_radius(z, a)
    assert_least(found, float(radii.min()), CLOSE[dtype])
    assert found.radii.shape == shape[:-1]
    searched = ~found.radii.isnan()
    assert bool(searched.any())
    assert torch.allclose(found.radii[searched], radii[searched], rtol=CLOSE[dtype], atol=0)


def test_the_position_of_the_least_bound_need_not_be_that_of_the_least_radius() -> None:
    """Positions that are sure have their zeros far beyond the bound."""
    z = torch.tensor([[40.0, 0.0, -3.0], [0.1, 0.0, -0.2], [12.0, 0.0, 0.0]])
    a = torch.tensor([[3.0, -3.0, 1.0], [1.0, -1.0, 0.2], [-4.0, 2.0, 1.9]])
    radii = each(z, a)
    assert (int(ghost_radius(a).argmin()), int(radii.argmin())) == (0, 1)
    found = least_ghost_radius(z, a)
    assert_least(found, float(radii[1]), 1e-5)
    assert float(found.radii[1]) == pytest.approx(float(radii[1]), rel=1e-5)


@EVERY_BATCH
def test_positions_that_do_not_count_have_no_say(shape: tuple[int, ...], scale: float) -> None:
    z, a = positions(shape, scale, 2)
    radii = each(z, a)
    mask = torch.rand(shape[:-1], generator=torch.Generator().manual_seed(3)) < 0.4
    mask.view(-1)[radii.argmin()] = False
    found = least_ghost_radius(z, a, mask)
    assert_least(found, float(radii[mask].min()), 2e-6)
    assert float(found.lower) > float(radii.min())
    assert bool(found.radii[~mask].isnan().all())


@pytest.mark.parametrize("within", [math.inf, 0.5])
def test_none_that_counts(within: float) -> None:
    z, a = positions((4, 5, 3), 1.0)
    found = least_ghost_radius(z, a, torch.zeros(4, 5, dtype=torch.bool), within=within)
    assert (float(found.lower), float(found.upper)) == (within, math.inf)
    assert bool(found.radii.isnan().all())


@EVERY_BATCH
@pytest.mark.parametrize("share", [0.01, 0.5, 0.9999])
def test_a_lesser_radius_is_cleared(shape: tuple[int, ...], scale: float, share: float) -> None:
    z, a = positions(shape, scale, 4)
    within = share * float(each(z, a).min())
    found = least_ghost_radius(z, a, within=within)
    assert (float(found.lower), float(found.upper)) == (within, math.inf)


@EVERY_BATCH
@pytest.mark.parametrize("share", [1.0001, 1.5, 100.0])
def test_a_greater_radius_is_not(shape: tuple[int, ...], scale: float, share: float) -> None:
    z, a = positions(shape, scale, 5)
    least = float(each(z, a).min())
    assert_least(least_ghost_radius(z, a, within=share * least), least, 2e-6)


@pytest.mark.parametrize("gap", [5.0, 40.0, 300.0])
def test_a_position_is_cleared_by_no_more_than_is_proven_however_sure_it_is(gap: float) -> None:
    least = math.hypot(gap, math.pi)  # theorem 4.3
    z, a = torch.tensor([[gap, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert_least(least_ghost_radius(z, a, within=1.0001 * least), least, 1e-5)
    assert float(least_ghost_radius(z, a, within=0.9999 * least).upper) == math.inf


@pytest.mark.parametrize("which", ["logits", "tangent", "both"])
def test_a_position_that_is_nan(which: str) -> None:
    z, a = positions((9, 4), 1.0)
    counts = torch.arange(9) != 3
    expected = least_ghost_radius(z, a, counts)
    for tensor in {"logits": [z], "tangent": [a], "both": [z, a]}[which]:
        tensor[3, 1] = math.nan
    a[3] *= 100  # the first to be looked at
    assert math.isnan(least_ghost_radius(z, a).lower)
    assert math.isnan(least_ghost_radius(z, a, within=1e-3).lower) or which == "logits"
    masked = least_ghost_radius(z, a, counts)
    assert (float(masked.lower), float(masked.upper)) == (float(expected.lower), float(expected.upper))


def test_tangents_of_0() -> None:
    z, a = positions((6, 5), 1.0)
    least = float(each(z[2:], a[2:]).min())
    a[0], a[1] = 0, 7.5  # neither changes any probability
    assert_least(least_ghost_radius(z, a), least, 2e-6)
    found = least_ghost_radius(z, torch.zeros_like(a))
    assert (float(found.lower), float(found.upper)) == (math.inf, math.inf)


@EVERY_BATCH
@pytest.mark.parametrize("seed", [6, 7])
def test_out_of_budget_the_interval_still_holds_the_least(shape: tuple[int, ...], scale: float, seed: int) -> None:
    z, a = positions(shape, scale, seed)
    least = float(each(z, a).min())
    found = least_ghost_radius(z, a, budget=1)
    assert float(ghost_radius(a).min()) <= float(found.lower) * (1 + 1e-9) <= least * (1 + 1e-6)
    assert float(found.upper) >= least * (1 - 1e-6)
    assert int((~found.radii.isnan()).sum()) == 1


def test_no_more_are_searched_than_the_budget_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    z, a = positions((300, 5), 3.0)
    a *= each(z, a)[:, None]  # all have the same radius, and none can be cleared by another's
    searched = []
    search = exact_radius._intervals
    monkeypatch.setattr(exact_radius, "_intervals", lambda z, *rest: (searched.append(len(z)), search(z, *rest))[1])
    least_ghost_radius(z, a, budget=2)
    assert 0 < sum(searched) <= 2


@pytest.mark.parametrize(("scale", "seed"), [(1.0, 0), (5.0, 1), (15.0, 2)])
def test_of_4096_positions_few_are_searched(scale: float, seed: int) -> None:
    z, a = positions((4096, 256), scale, seed, torch.float32)
    found = least_ghost_radius(z, a)
    assert 0 < int((~found.radii.isnan()).sum()) < 50
    likely = ghost_radius(a).argsort()[:50]
    least = float(each(z[likely], a[likely]).min())
    assert float(found.lower) <= float(found.upper) <= least * (1 + 1e-5), "the least of all 4096, and of these"


@pytest.mark.parametrize("within", [math.inf, 1.0])
def test_a_tangent_that_is_infinite_ends(within: float) -> None:
    def stop(*_: object) -> None:
        raise TimeoutError

    z, a = positions((6, 5), 1.0)
    a[2, 1] = math.inf
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 2)
    try:
        found = least_ghost_radius(z, a, within=within)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    assert not float(found.lower) > 0


ROWS = st.lists(
    st.tuples(*(st.floats(-8, 8) for _ in range(2)), *(st.floats(0.05, 3) for _ in range(2)), st.booleans()),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.sampled_from([1, 2, 1024]), st.sampled_from([math.inf, 0.7, 2.0, 20.0]))
def test_the_interval_holds_the_truth(
    rows: list[tuple[float, float, float, float, bool]], budget: int, within: float
) -> None:
    """Of products of two two-class sums, whose zeros are known: theorem 4.3's."""
    first, second, gap, other = torch.tensor([row[:-1] for row in rows], dtype=torch.float64).unbind(1)
    counts = torch.tensor([row[-1] for row in rows])
    z = torch.stack([torch.zeros_like(first), first, second, first + second], dim=1)
    a = torch.stack([torch.zeros_like(gap), gap, other, gap + other], dim=1)
    pi = torch.full_like(first, math.pi)
    truth = torch.minimum(torch.hypot(first, pi) / gap, torch.hypot(second, pi) / other)
    least = float(torch.where(counts, truth, math.inf).min())
    found = least_ghost_radius(z, a, counts, within=within, budget=budget)
    assert float(found.lower) <= min(least, within) * (1 + 1e-7)
    assert float(found.upper) >= least * (1 - 1e-6)
    if budget > len(rows):
        assert float(found.lower) >= min(least, within) * (1 - 1e-3), "a double zero is told less well"


def test_a_class_that_is_not_there_does_not_hide_a_zero_however_steep_it_is() -> None:
    z, a = torch.tensor([[0.0, 0.0, -math.inf]]), torch.tensor([[0.0, 1.0, 1e10]])
    assert float(least_ghost_radius(z, a, within=10.0).upper) == pytest.approx(math.pi, rel=1e-5)


@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_an_offset_that_all_tangents_share_clears_nothing(offset: float) -> None:
    """One class of 50,000 moves: the zero of ``1 + p (exp(t) - 1)``, in float32."""
    z, a = torch.zeros(1, 50_000), torch.full((1, 50_000), offset)
    z[0, 0] -= 60.0
    a[0, 0] += 1.0
    rest = math.log(49_999) + 60.0
    expected = math.hypot(rest, math.pi)
    least = least_ghost_radius(z, a, within=1.0005 * expected)
    assert float(least.upper) == pytest.approx(expected, rel=1e-5)


def test_no_graph_is_built_and_arguments_broadcast() -> None:
    z, a = torch.zeros(3, 1, 4, requires_grad=True), torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    least = least_ghost_radius(z, a)
    assert not least.upper.requires_grad
    assert least.radii.shape == (3, 5)
