"""Radii of layers against their definitions: Taylor coefficients, distances to kinks, loops over queries and keys."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from redline.numerics.layer_radii import (
    MOST_INPUTS,
    SINGULARITIES,
    activation_radius,
    activation_step_size,
    attention_scores,
    attention_step_size,
    thinned,
)


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def radius_at(h: float, function: Any, *args: Any, **kwargs: Any) -> float:
    inputs = torch.tensor([h], dtype=torch.float64)
    singularities = SINGULARITIES[function](inputs, *args, **kwargs)
    return activation_radius(inputs, torch.ones_like(inputs), singularities).item()


# Activations -----------------------------------------------------------------------------------------------


def gelu_tanh(x: Any) -> Any:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


SMOOTH: dict[str, tuple[Any, dict[str, Any], Callable[[Any], Any]]] = {
    "sigmoid": (torch.sigmoid, {}, lambda x: 1 / (1 + np.exp(-x))),
    "silu": (F.silu, {}, lambda x: x / (1 + np.exp(-x))),
    "softplus": (F.softplus, {}, lambda x: 1 / (1 + np.exp(-x))),
    "softplus, beta 3": (F.softplus, {"beta": 3.0}, lambda x: 1 / (1 + np.exp(-3 * x))),
    "logsigmoid": (F.logsigmoid, {}, lambda x: 1 / (1 + np.exp(x))),
    "tanh": (torch.tanh, {}, np.tanh),
    "tanhshrink": (F.tanhshrink, {}, lambda x: x - np.tanh(x)),
    "gelu, tanh": (F.gelu, {"approximate": "tanh"}, gelu_tanh),
    "mish": (F.mish, {}, lambda x: x * ((1 + np.exp(x)) ** 2 - 1) / ((1 + np.exp(x)) ** 2 + 1)),
}


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("h", [-1.7, -0.4, 0.3, 2.1])
def test_radius_of_a_smooth_activation_is_that_of_its_taylor_series(name: str, h: float):
    """Coefficients by Cauchy's integral on a circle, the radius by the root test; of a logarithm, its derivative's."""
    function, options, formula = SMOOTH[name]
    radius = radius_at(h, function, **options)
    points = 0.6 * radius * np.exp(2j * np.pi * np.arange(512) / 512)
    coefficients = np.abs(np.fft.fft(formula(h + points)))[:51] / 512  # times the circle's radius to the n-th
    orders = np.arange(30, 51)
    by_series = 0.6 * radius / (coefficients[orders] ** (1 / orders)).max()
    assert radius == pytest.approx(by_series, rel=0.06)


@pytest.mark.parametrize("h", [-9.0, -4.0, 6.5, 8.9])
def test_tanh_gelu_has_no_nearer_singularity_far_out(h: float):
    """Against a hundred multiples of i pi / 2 instead of eight."""
    root = math.sqrt(2 / math.pi)
    every = np.concatenate([np.roots([0.044715 * root, 0, root, 1j * math.pi / 2 * odd]) for odd in range(-99, 100, 2)])
    assert radius_at(h, F.gelu, approximate="tanh") == pytest.approx(np.abs(every - h).min(), rel=1e-9)


KINKS: list[tuple[Any, tuple[Any, ...], tuple[float, ...]]] = [
    (F.relu, (), (0,)), (torch.relu_, (), (0,)), (Tensor.relu, (), (0,)), (F.leaky_relu, (0.2,), (0,)),
    (F.prelu, (torch.ones(1),), (0,)), (F.rrelu, (), (0,)), (F.elu, (), (0,)), (F.selu, (), (0,)), (F.celu, (), (0,)),
    (F.relu6, (), (0, 6)), (F.hardtanh, (), (-1, 1)), (F.hardtanh, (-2.0, 0.5), (-2, 0.5)), (F.hardswish, (), (-3, 3)),
    (F.hardsigmoid, (), (-3, 3)), (F.threshold, (0.7, 9.0), (0.7,)), (F.softshrink, (0.4,), (-0.4, 0.4)),
    (F.hardshrink, (), (-0.5, 0.5)), (F.softsign, (), (0,)),
]  # fmt: skip


@pytest.mark.parametrize(("function", "args", "kinks"), KINKS)
@pytest.mark.parametrize("h", [-3.2, -0.1, 0.6, 4.0])
def test_radius_of_a_kinked_activation_is_the_distance_to_its_nearest_kink(function, args, kinks, h: float):
    assert radius_at(h, function, *args) == pytest.approx(min(abs(h - kink) for kink in kinks))


def test_exact_gelu_has_no_singularity():
    assert SINGULARITIES[F.gelu](torch.zeros(1)) == ()
    assert SINGULARITIES[F.gelu](torch.zeros(1), approximate="none") == ()


def test_an_input_that_does_not_move_has_no_radius_and_is_no_minimum():
    h, dh = torch.tensor([0.0, 1.0, -2.0, 3.0]), torch.tensor([0.0, 0.0, 4.0, -1.0])
    radii = activation_radius(h, dh, (0,))
    assert radii.tolist() == [math.inf, math.inf, 0.5, 3.0]
    assert activation_step_size(radii, 0.01).item() == 2.0
    assert activation_step_size(radii[:2], 0.5).item() == 0.0


@pytest.mark.parametrize(("quantile", "rank"), [(0.01, 3), (0.001, 1), (0.005, 2), (1.0, 300)])
def test_the_quantile_is_the_smallest_radius_that_a_share_of_the_inputs_do_not_exceed(quantile: float, rank: int):
    radii = torch.rand(300)
    assert activation_step_size(radii, quantile).item() == pytest.approx(1 / sorted(radii.tolist())[rank - 1])


def test_a_nan_is_not_lost_among_the_larger_radii():
    assert activation_step_size(torch.tensor([1.0, math.nan, 2.0]), 0.01).isnan()


def test_of_many_inputs_every_column_is_visited():
    columns = 1536
    inputs = torch.arange(columns).repeat(300)  # a stride of 4 would see a quarter of them
    kept = thinned(inputs.view(300, columns))
    assert MOST_INPUTS / 2 < kept.numel() <= MOST_INPUTS
    assert kept.unique().numel() == columns
    assert torch.equal(thinned(inputs[: columns * 2]), inputs[: columns * 2])


# Attention -------------------------------------------------------------------------------------------------

L, S, E = 5, 6, 4


def scores_by_hand(q, k, mask, is_causal, scale):
    """One query, one key at a time."""
    result = q.new_full((*q.shape[:-1], k.shape[-2]), -math.inf)
    for b in range(q.shape[0]):
        for head in range(q.shape[1]):
            for i in range(q.shape[2]):
                for j in range(k.shape[2]):
                    if (is_causal and j > i) or (mask is not None and mask.dtype == torch.bool and not mask[i, j]):
                        continue
                    value = scale * (q[b, head, i] * k[b, head * k.shape[1] // q.shape[1], j]).sum()
                    result[b, head, i, j] = value + (mask[i, j] if mask is not None and mask.dtype != torch.bool else 0)
    return result


@pytest.mark.parametrize("mask", ["none", "bool", "float", "float that moves"])
@pytest.mark.parametrize(("is_causal", "scale", "groups"), [(False, None, 1), (True, None, 1), (False, 0.3, 2)])
def test_scores_and_their_tangent(mask: str, is_causal: bool, scale: float | None, groups: int):
    q, dq = torch.randn(2, 4, L, E).double(), torch.randn(2, 4, L, E).double()
    k, dk = torch.randn(2, 4 // groups, S, E).double(), torch.randn(2, 4 // groups, S, E).double()
    bias, moved = torch.randn(L, S).double(), torch.zeros(L, S).double()
    if mask == "bool":
        bias = bias > -0.5
    elif mask != "none":
        bias[bias < -0.5] = -math.inf
        moved = torch.randn(L, S).double() if mask == "float that moves" else moved
    given = {"none": None, "bool": (bias, None), "float": (bias, None), "float that moves": (bias, moved)}[mask]
    scores, tangent = attention_scores((q, dq), (k, dk), given, is_causal=is_causal, scale=scale, enable_gqa=groups > 1)

    def at(t: float) -> Tensor:
        there = None if given is None else bias if mask == "bool" else bias + t * moved
        return scores_by_hand(q + t * dq, k + t * dk, there, is_causal, scale or E**-0.5)

    expected, slope = at(0.0), (at(1e-4) - at(-1e-4)) / 2e-4
    assert torch.allclose(scores, expected)
    kept = expected.isfinite()
    assert torch.allclose(tangent[kept], slope[kept], atol=1e-7)

    spreads = [row[ok].max() - row[ok].min() for row, ok in zip(slope.view(-1, S), kept.view(-1, S)) if ok.any()]  # noqa: B905
    assert attention_step_size(scores, tangent).item() == pytest.approx(max(spreads).item() / math.pi, rel=1e-6)


@pytest.mark.parametrize("low", [-math.inf, -65504.0, torch.finfo(torch.float32).min])
def test_masked_keys_do_not_count(low: float):
    scores = torch.tensor([[1.0, 2.0, low], [low, low, 3.0], [low, low, -math.inf]])
    tangent = torch.tensor([[0.5, 2.0, 1e9], [7e9, -1e9, 0.25], [math.inf, math.nan, 1.0]])
    assert attention_step_size(scores[:2], tangent[:2]).item() == pytest.approx(1.5 / math.pi)
    assert attention_step_size(torch.full((1, 3), -math.inf), tangent[2:]).item() == 0.0
    assert attention_step_size(scores[:1], torch.tensor([[math.nan, 1.0, 2.0]])).isnan()


def test_weights_serve_in_place_of_scores():
    scores, tangent = torch.randn(3, L, S).double(), torch.randn(3, L, S).double()
    weights = scores.softmax(-1)
    moved = weights * (tangent - (weights * tangent).sum(-1, keepdim=True))
    assert attention_step_size(weights.log(), moved / weights).item() == pytest.approx(
        attention_step_size(scores, tangent).item(), rel=1e-9
    )
