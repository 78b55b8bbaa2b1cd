"""Exact ghost radii against closed forms, and against the zeros of ``F`` counted by the argument principle.

Of ``F(t) = sum_k exp(z_k + a_k t)`` the nearest zero has modulus ``rho`` if and only if none lies within ``(1-e) rho``
and some do within ``(1+e) rho``. Counting needs no search, which could miss one.
"""

import math
from functools import reduce

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from redline.numerics import exact_ghost_radius

ACCURACY = 1e-6  # relative, of float64 inputs taken as exact
LOG_2 = math.log(2)


def radii(z, a) -> np.ndarray:
    return exact_ghost_radius(torch.as_tensor(np.asarray(z)), torch.as_tensor(np.asarray(a))).numpy()


def zeros_within(z: np.ndarray, a: np.ndarray, radius: float) -> int:
    """How many zeros ``F`` has in ``|t| < radius``: the turns its argument makes along the circle.

    Along its upper half, that is: ``F`` is conjugate below. Where ``log F`` moves by more than 0.5 between two points,
    more are put there and beside: close to a zero the circle is followed as closely as it takes.
    """
    (tangents, which), z = np.unique(a, return_inverse=True), z - z.max()
    logits = np.full(len(tangents), -np.inf)
    np.logaddexp.at(logits, which, z)  # classes of one tangent are one class
    rate = (tangents - (tangents.max() + tangents.min()) / 2) * radius

    def values(angles):
        real, imaginary = np.outer(np.cos(angles), rate) + logits, np.outer(np.sin(angles), rate)
        weights = np.exp(real - real.max(1, keepdims=True))
        return (weights * np.cos(imaginary)).sum(1) + 1j * (weights * np.sin(imaginary)).sum(1)

    angles = np.linspace(0, math.pi, 65 + int(8 * rate.max()))
    f = values(angles)
    while len(f) < 200_000:
        moves = np.log(f[1:] / f[:-1])
        wild = np.pad(abs(moves) > 0.5, 1)
        wild = wild[:-2] | wild[1:-1] | wild[2:]
        if not wild.any():
            return round(moves.imag.sum() / math.pi)
        between, places = ((angles[:-1] + angles[1:]) / 2)[wild], np.flatnonzero(wild) + 1
        angles, f = np.insert(angles, places, between), np.insert(f, places, values(between))
    raise AssertionError(f"float64 does not resolve F on the circle {radius=}")


def assert_nearest(z: np.ndarray, a: np.ndarray, radius: float, rel: float = ACCURACY) -> None:
    assert (1 - rel) * math.pi / np.ptp(a) <= radius < math.inf
    assert zeros_within(z, a, (1 - rel) * radius) == 0, f"{radius} is beyond the nearest zero of {z=}, {a=}"
    assert zeros_within(z, a, (1 + rel) * radius) >= 2, f"{radius} is short of the nearest zero of {z=}, {a=}"


def of_polynomial(z: np.ndarray) -> float:
    """For the tangents ``0, 1, 2, ...``: the zeros are the logarithms of the roots of ``sum_k exp(z_k) w^k``."""
    with mpmath.workdps(40):
        descending = [mpmath.exp(float(zk)) for zk in z[::-1]]
        return float(min(abs(mpmath.log(root)) for root in mpmath.polyroots(descending, maxsteps=500, extraprec=400)))


def of_factors(deltas: np.ndarray, gaps: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """``F = prod_j (1 + exp(delta_j + g_j t))`` multiplied out, ``2^j`` classes, and its nearest zero."""
    z, a = np.zeros(1), np.zeros(1)
    for delta, gap in zip(deltas, gaps, strict=True):
        z, a = np.concatenate([z, z + delta]), np.concatenate([a, a + gap])
    return z, a, float(np.min(np.hypot(deltas, math.pi) / abs(gaps)))


def with_zeros(*zeros: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Logits and tangents whose ``F`` is 0 at the ``x +- iy`` given; ``y`` over pi/2 leaves all terms positive."""
    squares = [np.array([math.exp(2 * x), -2 * math.exp(x) * math.cos(y), 1.0]) for x, y in zeros]
    product = reduce(np.convolve, squares)
    return np.log(product), np.arange(float(len(product)))


TANGENTS = {
    "gaussian": lambda rng, k: rng.normal(size=k),
    "heavy-tailed": lambda rng, k: rng.standard_t(1.5, size=k),
    "ties": lambda rng, k: rng.choice(rng.normal(size=3), k),
    "almost ties": lambda rng, k: rng.choice(rng.normal(size=3), k) + 1e-9 * rng.normal(size=k),
    "integer": lambda rng, k: rng.integers(0, 9, k).astype(float),
    "sparse": lambda rng, k: rng.normal(size=k) * (rng.random(k) < 2 / k),
}


def cases(kind: str, scale: float, classes: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([classes, int(100 * scale), list(TANGENTS).index(kind)])
    a = np.stack([TANGENTS[kind](rng, classes) for _ in range(count)])
    a[np.ptp(a, axis=1) == 0, 0] += 1
    return scale * rng.normal(size=(count, classes)), a


@pytest.mark.parametrize("factors", [1, 2, 3, 4, 6, 8])
def test_the_reference_counts_the_zeros_of_a_product(factors):
    rng = np.random.default_rng(factors)
    for _ in range(5):
        assert_nearest(*of_factors(3 * rng.normal(size=factors), rng.normal(size=factors)), 1e-8)
    assert [zeros_within(*with_zeros((0.0, math.pi)), r) for r in (3.0, 3.1415, 3.1416, 9.0)] == [0, 0, 4, 4]


class TestAnyLogits:
    @pytest.mark.parametrize("classes", [2, 3, 10, 100, 1000])
    @pytest.mark.parametrize("scale", [0.01, 1, 5, 30])
    @pytest.mark.parametrize("kind", TANGENTS)
    def test_no_zero_is_nearer_and_one_is_as_near(self, kind, scale, classes):
        z, a = cases(kind, scale, classes, {100: 6, 1000: 3}.get(classes, 15))
        for row in zip(z, a, radii(z, a), strict=True):
            assert_nearest(*row)

    @settings(deadline=None, derandomize=True, max_examples=150)
    @given(st.lists(st.tuples(st.floats(-40, 40), st.floats(-5, 5)), min_size=2, max_size=9))
    def test_whatever_they_are(self, rows):
        z, a = np.array(rows).T
        a = a.round(3)  # a spread of 1e-300 is no matter of this test
        if np.ptp(a) == 0:
            assert radii(z, a) == math.inf
        else:
            assert_nearest(z, a, float(radii(z, a)), 1e-5)  # some have zeros that all but coincide


class TestClosedForms:
    @pytest.mark.parametrize("delta", [0.0, 1e-9, -0.3, 5.0, 60.0, -1e3, 1e4])
    @pytest.mark.parametrize("gap", [1.0, -0.7, 40.0])
    def test_two_classes(self, delta, gap):
        expected = pytest.approx(math.hypot(delta, math.pi) / abs(gap), rel=ACCURACY)
        assert radii([1.5, 1.5 + delta], [0.0, gap]) == expected
        assert radii([delta], [gap]) == expected  # one class: the pair (z, 0)

    @pytest.mark.parametrize("factors", [2, 3, 5, 8, 10])
    @pytest.mark.parametrize("scale", [0.5, 3, 20])
    def test_a_product_of_two_class_factors(self, factors, scale):
        rng = np.random.default_rng([factors, int(2 * scale)])
        products = (of_factors(scale * rng.normal(size=factors), rng.normal(size=factors)) for _ in range(12))
        z, a, expected = zip(*products, strict=True)
        assert radii(z, a).tolist() == pytest.approx(expected, rel=ACCURACY)

    @pytest.mark.parametrize("degree", [2, 3, 5, 9, 20])
    @pytest.mark.parametrize("scale", [0.01, 1, 5, 30])
    def test_a_polynomial(self, degree, scale):
        z = scale * np.random.default_rng([degree, int(100 * scale)]).normal(size=(4, degree + 1))
        found = radii(z, np.tile(np.arange(degree + 1.0), (4, 1)))
        assert found.tolist() == pytest.approx([of_polynomial(row) for row in z], rel=ACCURACY)

    @pytest.mark.parametrize("classes", [2, 3, 4, 10, 101, 1000])
    def test_equal_logits_evenly_spread(self, classes):
        """``F = (w^K - 1) / (w - 1)`` at ``w = e^t``: the roots of unity but 1."""
        found = radii(np.full(classes, 0.4), np.arange(classes) - 7.0)
        assert found == pytest.approx(2 * math.pi / classes, rel=ACCURACY)

    @pytest.mark.parametrize("classes", [3, 100, 50_000])
    @pytest.mark.parametrize("gap", [1.0, -3.0])
    def test_one_class_alone_moves(self, classes, gap):
        z, a = np.random.default_rng(classes).normal(size=classes), np.full(classes, 0.25)
        a[-1] += gap
        expected = math.hypot(np.logaddexp.reduce(z[:-1]) - z[-1], math.pi) / abs(gap)
        assert radii(z, a) == pytest.approx(expected, rel=ACCURACY)

    @pytest.mark.parametrize("scale", [1, 5])
    def test_a_vocabulary(self, scale):
        rng = np.random.default_rng(scale)
        z, a = scale * rng.normal(size=50_000), rng.integers(0, 21, 50_000)
        expected = of_polynomial(np.array([np.logaddexp.reduce(z[a == power]) for power in range(21)]))
        assert radii(z, a.astype(float)) == pytest.approx(expected, rel=ACCURACY)


class TestCloseZeros:
    @pytest.mark.parametrize("excess", [0, 1e-12, 1e-8, 1e-5, 1e-3, 3e-2])
    @pytest.mark.parametrize(("x", "further"), [(0.0, 1.5), (0.8, -0.8), (0.8, 0.79), (-1.2, 0.1), (2.0, -2.1)])
    def test_two_in_different_directions_nearly_as_far(self, x, further, excess):
        nearest = math.hypot(x, 2.6)
        z, a = with_zeros((x, 2.6), (further, math.sqrt((nearest * (1 + excess)) ** 2 - further**2)))
        assert radii(z, a) == pytest.approx(nearest, rel=ACCURACY)

    @pytest.mark.parametrize(
        ("zeros", "accuracy"),  # the logits' own rounding moves zeros of multiplicity m by eps^(1/m)
        [
            ([(0.5, 2.5), (0.5, 2.5001)], ACCURACY),
            ([(0.5, 2.5), (0.5, 2.500001)], 1e-5),
            ([(0.0, math.pi)], 1e-5),  # (w + 1)^2
            ([(1.3, 2.2)] * 2, 1e-5),
            ([(-0.4, 1.9)] * 2 + [(0.3, 3.0)], 1e-5),
            ([(1.3, 2.2)] * 3, 2e-4),
            ([(0.0, math.pi)] * 2, 2e-3),
            ([(-0.4, 1.9)] * 5, 1e-2),
        ],
    )
    def test_two_or_more_side_by_side_or_in_one_place(self, zeros, accuracy):
        assert radii(*with_zeros(*zeros)) == pytest.approx(math.hypot(*zeros[0]), rel=accuracy)


CHANGES = {
    "shifted logits": (lambda z, a: (z - 3e4 * np.arange(len(z))[:, None], a), 1),
    "shifted tangent": (lambda z, a: (z, a + 1e5), 1),
    "opposite tangent": (lambda z, a: (z, -a), 1),
    "tangent times 3": (lambda z, a: (z, 3 * a), 1 / 3),
    "tangent times 1e-12": (lambda z, a: (z, 1e-12 * a), 1e12),
    "tangent times -1e12": (lambda z, a: (z, -1e12 * a), 1e-12),
    "permuted classes": (lambda z, a: (np.roll(z, 5, 1)[:, ::-1].copy(), np.roll(a, 5, 1)[:, ::-1].copy()), 1),
    "no weight": (lambda z, a: (np.c_[z, np.full(len(z), -1e4)], np.c_[a, a[:, 0]]), 1),
    "no weight, but steep": (lambda z, a: (np.c_[np.full(len(z), -1e4), z], np.c_[30 * a.max(1), a]), 1),
    "a class in halves": (lambda z, a: (np.c_[z[:, 0] - LOG_2, z[:, 0] - LOG_2, z[:, 1:]], np.c_[a[:, 0], a]), 1),
}


class TestInvariance:
    @pytest.mark.parametrize("change", CHANGES)
    @pytest.mark.parametrize("rows", [("gaussian", 2, 12, 20), ("heavy-tailed", 5, 200, 5), ("integer", 0.01, 40, 5)])
    def test_it_changes_by_the_factor_it_ought_to(self, change, rows):
        z, a = cases(*rows)
        changed, factor = CHANGES[change]
        assert radii(*changed(z, a)).tolist() == pytest.approx(factor * radii(z, a), rel=ACCURACY)

    def test_no_row_minds_the_others(self):
        z, a = cases("heavy-tailed", 5, 20, 30)
        a *= 10.0 ** np.arange(-15, 15)[:, None]
        alone = [float(radii(*row)) for row in zip(z, a, strict=True)]
        assert radii(z, a).tolist() == pytest.approx(alone, rel=ACCURACY)


class TestEdges:
    @pytest.mark.parametrize("tangent", [[0.0, 0.0, 0.0], [2.5, 2.5], [-1e12] * 5, [0.0]])
    def test_infinite_where_no_class_gains_on_another(self, tangent):
        logits = np.random.default_rng(0).normal(size=(3, len(tangent)))
        one_moves = np.array([tangent, tangent, tangent])
        one_moves[1, 0] += 1
        assert np.isinf(radii(logits, one_moves)).tolist() == [True, False, True]

    @pytest.mark.parametrize("bad", ["nan logit", "inf logit", "nan tangent", "inf tangent", "-inf tangent"])
    @pytest.mark.parametrize("classes", [1, 2, 5])
    @pytest.mark.parametrize("at", [0, 1])
    def test_an_entry_that_is_not_finite_makes_its_row_nan_and_no_other(self, bad, classes, at):
        z, a = np.random.default_rng(0).normal(size=(2, 3, classes))
        a[0] = 0  # a row without a spread
        value, of = bad.split()
        (z if of == "logit" else a)[at, -1] = float(value)
        assert np.isnan(radii(z, a)).tolist() == [row == at for row in range(3)]

    def test_a_logit_of_minus_infinity_is_a_class_that_is_not_there(self):
        z, a = cases("gaussian", 1, 6, 5)
        a[0] = 1.0  # those that are there do not gain on one another
        z[:, 2], a[:, 2] = -math.inf, 9.0
        assert radii(z, a).tolist() == pytest.approx(radii(np.delete(z, 2, 1), np.delete(a, 2, 1)), rel=ACCURACY)

    @pytest.mark.parametrize("classes", [1, 2, 4])
    def test_batches_keep_their_shape_and_are_read_as_they_stand(self, classes):
        z, a = torch.randn(2, 2, 3, classes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        found = exact_ghost_radius(z.mT.contiguous().mT, a.mT.contiguous().mT)
        assert found.shape == (2, 3)
        assert found.flatten().tolist() == pytest.approx(radii(z.flatten(0, 1), a.flatten(0, 1)), rel=ACCURACY)
        for shape in [(0,), (2, 0, 3), ()]:
            assert exact_ghost_radius(*torch.ones(2, *shape, classes)).shape == shape

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("classes", [1, 2, 9, 300])
    def test_narrow_inputs_are_widened_and_left_as_they_were(self, classes, dtype):
        z, a = (3 * torch.randn(2, 12, classes, generator=torch.Generator().manual_seed(0))).to(dtype)
        copies = z.clone(), a.clone()
        found = exact_ghost_radius(z, a)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert found.tolist() == pytest.approx(exact_ghost_radius(z.double(), a.double()).tolist(), rel=1e-5)
        assert torch.equal(z, copies[0])
        assert torch.equal(a, copies[1])


def test_tangents_that_differ_by_their_last_bits_only():
    """Of 50,000 classes half move by 2 on top of 1e16, where the next number is 2 away."""
    a = torch.zeros(50_000, dtype=torch.float64)
    a[::2] = 2.0
    assert float(exact_ghost_radius(torch.zeros_like(a), 1e16 + a)) == pytest.approx(math.pi / 2, rel=ACCURACY)
