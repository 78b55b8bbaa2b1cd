"""Logit tangents against a Jacobian taken row by row, in reverse mode and float64, of the model without dropout."""

from __future__ import annotations

import copy

import pytest
import torch
from tangent_cases import CASES, CLASSES, build, jacobian_times, random_direction, relative_error, relative_error_of_r
from torch import Tensor, nn

from redline.numerics import logit_tangent
from redline.numerics.tangents import LADDER


class TestAgainstTheJacobian:
    @pytest.mark.parametrize("name", [name for name in CASES if CASES[name].method != "finite_difference"])
    def test_by_the_best_method_that_works(self, name):
        model, x = build(name)
        direction = random_direction(model)
        taken = logit_tangent(model, (x,), {}, direction)
        z, expected = jacobian_times(model, (x,), direction)
        assert taken.method == CASES[name].method
        assert relative_error(taken.tangent, expected) < 1e-4
        assert relative_error_of_r(taken.tangent, expected) < 1e-4
        assert relative_error(taken.logits, z) < 1e-4
        assert taken.mask is None
        assert not taken.tangent.requires_grad
        assert not taken.logits.requires_grad

    @pytest.mark.parametrize("name", CASES)
    @pytest.mark.parametrize("norm", [1e-8, 0.1, 1e4])
    def test_by_finite_difference(self, name, norm):
        model, x = build(name)
        direction = random_direction(model, norm)
        taken = logit_tangent(model, (x,), {}, direction, method="finite_difference")
        z, expected = jacobian_times(model, (x,), direction)
        assert taken.method == "finite_difference"
        assert relative_error(taken.tangent, expected) < CASES[name].difference
        assert relative_error_of_r(taken.tangent, expected) < CASES[name].difference
        assert relative_error(taken.logits, z) < 1e-3

    @pytest.mark.parametrize("name", [name for name in CASES if CASES[name].method != "finite_difference"])
    def test_by_the_math_kernels_where_they_are_asked_for(self, name):
        model, x = build(name)
        direction = random_direction(model)
        taken = logit_tangent(model, (x,), {}, direction, method="math_attention")
        assert taken.method == "math_attention"
        assert relative_error(taken.tangent, jacobian_times(model, (x,), direction)[1]) < 1e-4

    @pytest.mark.parametrize("name", CASES)
    def test_in_float64(self, name):
        model, x = build(name)
        model, x = model.double(), x.double() if x.is_floating_point() else x
        direction = random_direction(model)
        taken = logit_tangent(model, (x,), {}, direction)
        accuracy = 1e-12 if CASES[name].method != "finite_difference" else 1e-4
        assert taken.tangent.dtype == torch.float64
        assert relative_error(taken.tangent, jacobian_times(model, (x,), direction)[1]) < accuracy

    @pytest.mark.parametrize("norm", [1e-15, 1e-8, 1e4, 1e12])
    @pytest.mark.parametrize("name", CASES)
    def test_the_length_of_the_step_changes_only_the_length_of_the_tangent(self, name, norm):
        model, x = build(name)
        unit = logit_tangent(model, (x,), {}, random_direction(model, 1.0))
        scaled = logit_tangent(model, (x,), {}, random_direction(model, norm))
        assert scaled.method == unit.method
        assert relative_error(scaled.tangent.double() / norm, unit.tangent.double()) < 1e-4

    def test_a_zero_step_moves_no_logit(self):
        model, x = build("mlp")
        zero = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
        for method in ("forward_mode", "finite_difference"):
            assert not logit_tangent(model, (x,), {}, zero, method=method).tangent.any()

    def test_no_direction_at_all_moves_no_logit(self):
        model, x = build("mlp")
        taken = logit_tangent(model, (x,), {}, {})
        assert taken.tangent.shape == taken.logits.shape
        assert not taken.tangent.any()

    @pytest.mark.parametrize("name", ["mlp", "transformer", "tied language model", "lstm"])
    def test_parameters_left_out_stay_where_they_are(self, name):
        model, x = build(name)
        every = random_direction(model)
        some = {name: tensor for i, (name, tensor) in enumerate(every.items()) if i % 2}
        taken = logit_tangent(model, (x,), {}, some)
        assert relative_error(taken.tangent, jacobian_times(model, (x,), some)[1]) < 1e-4

    def test_a_tied_parameter_is_moved_under_either_name(self):
        model, x = build("tied language model")
        moved = torch.randn(20, 12, generator=torch.Generator().manual_seed(2))
        first = logit_tangent(model, (x,), {}, {"embedding.weight": moved})
        second = logit_tangent(model, (x,), {}, {"head.weight": moved})
        assert torch.equal(first.tangent, second.tangent)
        expected = jacobian_times(model, (x,), {"embedding.weight": moved})[1]
        assert relative_error(first.tangent, expected) < 1e-4

    @pytest.mark.parametrize("method", ["auto", "finite_difference"])
    def test_the_point_may_be_another_than_the_models_own(self, method):
        model, x = build("mlp")
        elsewhere = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in elsewhere.parameters():
                parameter.mul_(1.3)
        direction = random_direction(model)
        point = {name: parameter.detach() for name, parameter in elsewhere.named_parameters()}
        taken = logit_tangent(model, (x,), {}, direction, parameters=point, method=method)
        z, expected = jacobian_times(elsewhere, (x,), direction)
        assert relative_error(taken.tangent, expected) < 1e-3
        assert relative_error(taken.logits, z) < 1e-3

    def test_keyword_inputs_reach_the_model(self):
        model, x = build("multihead attention")
        direction = random_direction(model)
        taken = logit_tangent(model, (), {"x": x, "need_weights": True}, direction)
        assert taken.method == "forward_mode"  # attention that returns its weights takes no fused kernel
        assert relative_error(taken.tangent, jacobian_times(model, (x,), direction)[1]) < 1e-4

    def test_a_frozen_submodule_in_eval_mode_keeps_its_mode(self):
        model, x = build("cnn with BatchNorm")
        model[1].running_mean.fill_(0.3)
        model[1].running_var.fill_(2.0)
        model[1].eval()
        direction = random_direction(model)
        taken = logit_tangent(model, (x,), {}, direction)
        expected = jacobian_times(model, (x,), direction)[1]
        all_in_train_mode = jacobian_times(model.train(), (x,), direction)[1]
        assert relative_error(taken.tangent, expected) < 1e-4
        assert relative_error(taken.tangent, all_in_train_mode) > 0.1

    @pytest.mark.parametrize("name", ["multihead attention", "transformer"])
    def test_attention_in_eval_mode(self, name):
        model, x = build(name)
        model.eval()
        direction = random_direction(model)
        taken = logit_tangent(model, (x,), {}, direction)
        assert taken.method == "math_attention"
        assert relative_error(taken.tangent, jacobian_times(model, (x,), direction)[1]) < 1e-4

    def test_batch_statistics_are_differentiated_too(self):
        model, x = build("cnn with BatchNorm")
        direction = random_direction(model)
        alone = jacobian_times(model, (x[:4],), direction)[1]
        together = logit_tangent(model, (x,), {}, direction).tangent[:4]
        assert relative_error(together, alone) > 0.05

    @pytest.mark.parametrize("parametrization", ["spectral_norm", "weight_norm", "orthogonal"])
    def test_parametrized_weights(self, parametrization):
        torch.manual_seed(0)
        layer = getattr(nn.utils.parametrizations, parametrization)(nn.Linear(12, 16))
        model = nn.Sequential(layer, nn.Tanh(), nn.Linear(16, CLASSES))
        x = torch.randn(8, 12)
        direction = random_direction(model)
        expected = jacobian_times(model, (x,), direction)[1]
        assert relative_error(logit_tangent(model, (x,), {}, direction).tangent, expected) < 2e-2

    # The whole step may lie in one parameter, small or zero beside the others: the difference must still measure it.
    @pytest.mark.parametrize("others", ["given as zeros", "left out"])
    @pytest.mark.parametrize("parameter", ["embedding.weight", "inner.bias", "head.weight", "head.bias", "log_scale"])
    @pytest.mark.parametrize("method", ["auto", "finite_difference"])
    def test_a_step_in_one_parameter_alone(self, method, parameter, others):
        class Scaled(nn.Module):
            def __init__(self):
                super().__init__()
                self.embedding, self.inner = nn.Embedding(2000, 64), nn.Linear(64, 64)
                self.head = nn.Linear(64, CLASSES)
                self.log_scale = nn.Parameter(torch.zeros(()))

            def forward(self, tokens):
                return self.head(torch.tanh(self.inner(self.embedding(tokens)))) * self.log_scale.exp()

        torch.manual_seed(0)
        model, tokens = Scaled(), torch.randint(0, 2000, (8,))
        nn.init.zeros_(model.head.bias)
        moved = random_direction(model, 1e-2)[parameter]
        zeros = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
        direction = {**(zeros if others == "given as zeros" else {}), parameter: moved}
        taken = logit_tangent(model, (tokens,), {}, direction, method=method)
        expected = jacobian_times(model, (tokens,), direction)[1]
        assert relative_error(taken.tangent, expected) < (1e-4 if method == "auto" else 2e-2)


class BesideIntegers(nn.Module):
    """A frozen matrix of integer codes, dequantized by a scale that is trained, as quantized models have them."""

    def __init__(self):
        super().__init__()
        self.codes = nn.Parameter(torch.arange(-30, 30).view(5, 12).to(torch.int8), requires_grad=False)
        self.scale, self.head = nn.Parameter(torch.full((5, 1), 0.01)), nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.head(torch.tanh(x @ (self.codes.to(x.dtype) * self.scale).T))


@pytest.mark.parametrize("method", LADDER)
def test_integer_parameters_stand_beside_those_that_move(method: str):
    torch.manual_seed(0)
    model, x = BesideIntegers(), torch.randn(6, 12)
    direction = {name: 0.1 * torch.randn_like(p) for name, p in model.named_parameters() if p.is_floating_point()}
    taken = logit_tangent(model, (x,), {}, direction, method=method)

    def logits(*moved: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(direction, moved, strict=True)), (x,))

    point = tuple(dict(model.named_parameters())[name] for name in direction)
    _, expected = torch.func.jvp(logits, point, tuple(direction.values()))
    assert torch.allclose(taken.tangent, expected, atol=2e-3)
