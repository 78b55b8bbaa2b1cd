"""Ghost radii against complex zeros of ``F(t) = sum_k exp(z_k + a_k t)`` that are searched for numerically."""

import cmath
import itertools
import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from redline.numerics import binary_ghost_radius, ghost_radius, tangent_spread
from redline.numerics.radii import normalized_step_size


def nearest_zero(z: list[float], a: list[float], reach: float) -> float:
    """Modulus of the zero of ``F`` nearest to 0, by Newton's iteration from a grid over ``|t| <= reach``.

    On ``F(t) / exp(z_0 + a_0 t)``, which has the same zeros and is better to walk on.
    """
    terms = [(zk - z[0], ak - a[0]) for zk, ak in zip(z, a, strict=True)]

    def f(t):
        return sum(mpmath.exp(zk + ak * t) for zk, ak in terms)

    def slope(t):
        return sum(ak * mpmath.exp(zk + ak * t) for zk, ak in terms)

    found = []
    side = [reach * (i / 4 - 1) for i in range(9)]
    with mpmath.workdps(30):
        for start in (complex(x, y) for x in side for y in side if y >= 0):
            t = mpmath.mpc(start)
            for _ in range(40):
                value, gradient = f(t), slope(t)
                if gradient == 0 or abs(t) > 4 * reach:
                    break
                t -= value / gradient
                if abs(value / gradient) < 1e-20 * reach:
                    found.append(float(abs(t)))
                    break
    nearest = min(found)
    assert zeros_within(z, a, 0.999 * nearest) == 0  # the grid has missed none
    return nearest


def zeros_within(z: list[float], a: list[float], radius: float, points: int = 4096) -> int:
    """How many zeros ``F`` has in ``|t| < radius``: the turns its argument makes along the circle."""
    values = []
    for i in range(points + 1):
        t = radius * cmath.exp(2j * math.pi * i / points)
        values.append(sum(cmath.exp(zk + ak * t) for zk, ak in zip(z, a, strict=True)))
    return round(sum(cmath.phase(after / before) for before, after in itertools.pairwise(values)) / math.tau)


@pytest.mark.parametrize("quantile", [1.0, 0.9])
@pytest.mark.parametrize("mask", [None, torch.ones(0, dtype=torch.bool)])
def test_of_no_positions_r_is_0(quantile, mask):
    r = normalized_step_size(torch.zeros(0, 3), mask, quantile)
    assert r.shape == ()
    assert r == 0


class TestSpread:
    def test_it_is_the_widest_gap_between_two_classes(self):
        tangent = torch.randn(4, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        gaps = (tangent.unsqueeze(-1) - tangent.unsqueeze(-2)).abs()
        assert torch.allclose(tangent_spread(tangent), gaps.flatten(-2).amax(-1), rtol=1e-15)
        assert tangent_spread(tangent).shape == (4, 5)

    def test_one_class_is_the_logit_of_a_binary_classifier(self):
        tangent = torch.tensor([[-2.0], [0.0], [0.5]])
        beside_zero = torch.cat([tangent, torch.zeros(3, 1)], dim=-1)
        assert torch.equal(tangent_spread(tangent), tangent_spread(beside_zero))
        assert torch.equal(ghost_radius(tangent), ghost_radius(beside_zero))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_it_keeps_the_dtype(self, dtype):
        assert tangent_spread(torch.ones(3, 2, dtype=dtype)).dtype == dtype
        assert ghost_radius(torch.ones(3, 2, dtype=dtype)).dtype == dtype

    @pytest.mark.parametrize("classes", [1, 2, 5])
    def test_nan_stays_nan_and_touches_no_other_sample(self, classes):
        tangent = torch.ones(3, classes)
        tangent[1, -1] = math.nan
        assert torch.isnan(tangent_spread(tangent)).tolist() == [False, True, False]
        assert torch.isnan(ghost_radius(tangent)).tolist() == [False, True, False]


class TestGhostRadius:
    def test_it_is_pi_over_the_spread(self):
        tangent = torch.tensor([[1.0, 3.0, -1.0], [0.0, 0.5, 0.25]], dtype=torch.float64)
        assert ghost_radius(tangent).tolist() == pytest.approx([math.pi / 4, math.pi / 0.5], rel=1e-15)

    @pytest.mark.parametrize("tangent", [[0.0, 0.0], [2.5, 2.5, 2.5], [0.0]])
    def test_it_is_infinite_where_no_class_gains_on_another(self, tangent):
        assert ghost_radius(torch.tensor([tangent])).tolist() == [math.inf]

    def test_an_infinite_tangent_leaves_no_radius(self):
        assert ghost_radius(torch.tensor([[math.inf, 0.0]])).tolist() == [0.0]

    def test_a_tangent_twice_as_long_halves_it(self):
        tangent = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        assert torch.allclose(ghost_radius(2 * tangent), ghost_radius(tangent) / 2, rtol=1e-15)

    @settings(deadline=None, derandomize=True, max_examples=40)
    @given(st.integers(2, 6), st.floats(0.05, 20), st.floats(0, 4), st.integers(0, 2**20))
    def test_no_zero_lies_within_it(self, classes, length, gaps, seed):
        generator = torch.Generator().manual_seed(seed)
        z = (gaps * torch.randn(classes, generator=generator, dtype=torch.float64)).tolist()
        a = length * torch.randn(classes, generator=generator, dtype=torch.float64)
        radius = float(ghost_radius(a.unsqueeze(0)))
        assert zeros_within(z, a.tolist(), 0.999 * radius) == 0

    def test_two_equal_logits_have_their_zero_on_it(self):
        z, a = [0.3, 0.3], torch.tensor([1.5, -0.7], dtype=torch.float64)
        radius = float(ghost_radius(a.unsqueeze(0)))
        assert zeros_within(z, a.tolist(), 0.999 * radius) == 0
        assert zeros_within(z, a.tolist(), 1.001 * radius) == 2  # a conjugate pair
        assert nearest_zero(z, a.tolist(), 2 * radius) == pytest.approx(radius, rel=1e-12)


class TestBinaryGhostRadius:
    @pytest.mark.parametrize(
        ("z", "a"),
        [
            ([0.0, 0.0], [0.0, 1.0]),
            ([0.0, 2.0], [0.0, 1.0]),
            ([1.0, -4.0], [0.3, -0.8]),
            ([-0.2, 0.1], [-5.0, 7.0]),
            ([0.0, 9.0], [0.0, 0.01]),
            ([3.0, 3.5], [2.0, 1.9]),
        ],
    )
    def test_it_is_the_modulus_of_the_nearest_zero(self, z, a):
        margin = torch.tensor(z[1] - z[0], dtype=torch.float64)
        gap = torch.tensor(a[1] - a[0], dtype=torch.float64)
        reach = (abs(float(margin)) + 4) / abs(float(gap))
        assert float(binary_ghost_radius(margin, gap)) == pytest.approx(nearest_zero(z, a, reach), rel=1e-12)

    def test_the_sign_of_margin_and_gap_does_not_matter(self):
        margin, gap = torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.tensor([2.0, 2.0, -2.0, -2.0])
        assert len(set(binary_ghost_radius(margin, gap).tolist())) == 1

    def test_it_is_infinite_where_neither_class_gains(self):
        assert binary_ghost_radius(torch.tensor([0.0, 3.0]), torch.zeros(2)).tolist() == [math.inf, math.inf]

    def test_nan_stays_nan(self):
        margin, gap = torch.tensor([math.nan, 1.0, 1.0]), torch.tensor([1.0, math.nan, 1.0])
        assert torch.isnan(binary_ghost_radius(margin, gap)).tolist() == [True, True, False]

    def test_margin_and_gap_broadcast_and_keep_the_dtype(self):
        radius = binary_ghost_radius(torch.zeros(3, 1, dtype=torch.float64), torch.ones(4, dtype=torch.float64))
        assert radius.shape == (3, 4)
        assert radius.dtype == torch.float64

    @settings(deadline=None, derandomize=True, max_examples=300)
    @given(
        margin=st.floats(-1e6, 1e6, allow_nan=False),
        gap=st.floats(-1e6, 1e6, allow_nan=False),
        shift=st.floats(-10, 10),
    )
    def test_the_bound_is_never_above_it(self, margin, gap, shift):
        tangent = torch.tensor([[shift, shift + gap]], dtype=torch.float64)
        applied = tangent[:, 1] - tangent[:, 0]  # what is left of the gap after rounding
        exact = binary_ghost_radius(torch.tensor([margin], dtype=torch.float64), applied)
        bound = ghost_radius(tangent)
        assert float(bound) <= float(exact) * (1 + 1e-15)
        if margin == 0:
            assert float(bound) == pytest.approx(float(exact), rel=1e-15)
