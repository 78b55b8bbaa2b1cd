"""Logit tangents in half precision: of parameters, and under autocast."""

import pytest
import torch
from tangent_cases import CASES, CLASSES, build, jacobian_times, random_direction, relative_error, relative_error_of_r
from torch import nn

from redline.numerics import logit_tangent, tangent_spread
from redline.numerics.tangents import LADDER


class TestHalfPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("name", CASES)
    def test_half_precision_parameters(self, name, dtype):
        model, x = build(name)
        model, x = model.to(dtype), x.to(dtype) if x.is_floating_point() else x
        direction = random_direction(model)
        taken = logit_tangent(model, (x,), {}, direction)
        # A processor without the fused kernel in half precision runs one that forward mode can follow.
        assert LADDER.index(taken.method) <= LADDER.index(CASES[name].method)
        assert relative_error_of_r(taken.tangent, jacobian_times(model, (x,), direction)[1]) < 1e-2

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("name", CASES)
    def test_under_autocast(self, name, dtype):
        model, x = build(name)
        direction = random_direction(model)
        with torch.autocast("cpu", dtype=dtype):
            taken = logit_tangent(model, (x,), {}, direction)
            assert torch.is_autocast_enabled("cpu")
        assert taken.method == CASES[name].method
        assert relative_error_of_r(taken.tangent, jacobian_times(model, (x,), direction)[1]) < 1e-2

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("name", CASES)
    def test_a_finite_difference_is_taken_in_float32(self, name, dtype):
        model, x = build(name)
        model, x = model.to(dtype), x.to(dtype) if x.is_floating_point() else x
        direction = random_direction(model)
        taken = logit_tangent(model, (x,), {}, direction, method="finite_difference")
        assert taken.tangent.dtype == taken.logits.dtype == torch.float32
        assert relative_error(taken.tangent, jacobian_times(model, (x,), direction)[1]) < 2e-2

    @pytest.mark.parametrize("norm", [1e-3, 1.0, 1e3])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("how", ["parameters", "autocast"])
    def test_short_and_long_steps(self, how, dtype, norm):
        model, x = build("mlp")
        if how == "parameters":
            model, x = model.to(dtype), x.to(dtype)
        direction = random_direction(model, norm)
        with torch.autocast("cpu", dtype=dtype, enabled=how == "autocast"):
            taken = logit_tangent(model, (x,), {}, direction)
        assert relative_error_of_r(taken.tangent, jacobian_times(model, (x,), direction)[1]) < 1e-2

    # ||theta|| = 360 and a step of 1e-3: their ratio is no float16 number, the tangent is.
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("how", ["parameters", "autocast"])
    def test_a_short_step_of_a_large_model(self, how, dtype):
        torch.manual_seed(0)
        model, tokens = nn.Sequential(nn.Embedding(2000, 64), nn.Linear(64, CLASSES)), torch.randint(0, 2000, (8,))
        if how == "parameters":
            model = model.to(dtype)
        direction = random_direction(model, 0.5)
        direction = {"0.weight": torch.zeros(2000, 64), "1.weight": direction["1.weight"] / 20}
        with torch.autocast("cpu", dtype=dtype, enabled=how == "autocast"):
            taken = logit_tangent(model, (tokens,), {}, direction)
        expected = jacobian_times(model, (tokens,), direction)[1]
        assert float(tangent_spread(expected).amax()) > 2e-3
        assert relative_error_of_r(taken.tangent, expected) < 1e-2
