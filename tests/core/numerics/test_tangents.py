"""Logit tangents against a Jacobian taken row by row, in reverse mode and float64, of the model without dropout."""

import copy
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redline import ConfigurationError
from redline.numerics import logit_tangent, tangent_spread
from redline.numerics.tangents import LADDER

CLASSES = 7


class Attention(nn.Module):
    """Calls scaled_dot_product_attention itself, dropout and all."""

    def __init__(self):
        super().__init__()
        self.qkv, self.head, self.dropout = nn.Linear(12, 36), nn.Linear(12, CLASSES), 0.3

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 6).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, None, self.dropout if self.training else 0.0, is_causal=True)
        return self.head(mixed.transpose(1, 2).reshape(x.shape).mean(1))


class MultiheadAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 2, dropout=0.3, batch_first=True)
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, CLASSES)

    def forward(self, x, *, need_weights=False):
        mixed, _ = self.attention(x, x, x, need_weights=need_weights)
        return self.head(self.norm(x + mixed).mean(1))


class Transformer(nn.Module):
    def __init__(self, **options):
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, 2, 24, dropout=0.2, batch_first=True, **options)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(12, CLASSES)

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))


class LanguageModel(nn.Module):
    """Tied embeddings; logits ``(batch, time, vocabulary)``."""

    def __init__(self):
        super().__init__()
        self.embedding, self.inner, self.norm = nn.Embedding(20, 12), nn.Linear(12, 12), nn.LayerNorm(12)
        self.head = nn.Linear(12, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.norm(torch.tanh(self.inner(F.dropout(self.embedding(tokens), 0.0, self.training)))))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cells, self.head = kind(12, 10, 2, dropout=0.4, batch_first=True), nn.Linear(10, CLASSES)

    def forward(self, x):
        return self.head(self.cells(x)[0][:, -1])


class NoForwardMode(torch.autograd.Function):
    """A custom kernel that has a backward and no forward-mode rule: ``x^2``."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


class CustomKernel(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(12, 16), nn.Linear(16, CLASSES)

    def forward(self, x):
        return self.head(NoForwardMode.apply(self.body(x)))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 32), nn.Tanh(), nn.Dropout(0.3), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, CLASSES)
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout2d(0.2), nn.Conv2d(6, 8, 3, 2, groups=2),
        nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, CLASSES),
    )  # fmt: skip


def group_norm() -> nn.Module:
    return nn.Sequential(
        nn.ConvTranspose2d(1, 6, 2), nn.GroupNorm(3, 6), nn.GELU(), nn.Flatten(), nn.Linear(486, CLASSES)
    )


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    method: str  # the rung that "auto" is to take on the CPU
    difference: float = 1e-3  # what the finite difference may be off by: more where it crosses kinks of ReLU


def vectors() -> Tensor:
    return torch.randn(8, 12)


def images() -> Tensor:
    return torch.randn(8, 1, 8, 8)


def sequences() -> Tensor:
    return torch.randn(8, 6, 12)


CASES = {
    "mlp": Case(mlp, vectors, "forward_mode"),
    "cnn with BatchNorm": Case(cnn, images, "forward_mode", 2e-2),
    "cnn with GroupNorm": Case(group_norm, images, "forward_mode"),
    "attention": Case(Attention, sequences, "math_attention"),
    "multihead attention": Case(MultiheadAttention, sequences, "math_attention"),
    "transformer": Case(Transformer, sequences, "math_attention", 2e-2),
    "pre-norm transformer": Case(
        lambda: Transformer(norm_first=True, activation="gelu"), sequences, "math_attention", 2e-2
    ),
    "tied language model": Case(LanguageModel, lambda: torch.randint(0, 20, (4, 5)), "forward_mode"),
    "lstm": Case(lambda: Recurrent(nn.LSTM), sequences, "math_attention"),
    "gru": Case(lambda: Recurrent(nn.GRU), sequences, "forward_mode"),
    "custom kernel": Case(CustomKernel, vectors, "finite_difference"),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CASES[name].build().train(), CASES[name].inputs()


def random_direction(model: nn.Module, norm: float = 0.1, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    direction = {
        name: torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        for name, parameter in model.named_parameters()
    }
    length = torch.stack([tensor.norm() for tensor in direction.values()]).norm()
    wide = any(parameter.dtype == torch.float64 for parameter in model.parameters())
    dtype = torch.float64 if wide else torch.float32
    return {name: (tensor * norm / length).to(dtype) for name, tensor in direction.items()}


def in_float64_without_dropout(model: nn.Module) -> nn.Module:
    reference = copy.deepcopy(model).double()
    for module in reference.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return reference


def jacobian_times(
    model: nn.Module, inputs: tuple[Any, ...], direction: dict[str, Tensor], read: Callable[[Any], Tensor] = lambda z: z
) -> tuple[Tensor, Tensor]:
    """Logits and ``J_z d``: one backward pass a logit, in float64."""
    reference = in_float64_without_dropout(model)
    parameters = {name: parameter.requires_grad_() for name, parameter in reference.named_parameters()}
    wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    z = read(reference(*wide))
    rows = []
    for logit in z.flatten():
        gradients = torch.autograd.grad(logit, list(parameters.values()), retain_graph=True, allow_unused=True)
        rows.append(
            sum(
                (gradient * direction[name].double()).sum()
                for name, gradient in zip(parameters, gradients, strict=True)
                if gradient is not None and name in direction
            )
        )
    return z.detach(), torch.stack(rows).reshape(z.shape)


def relative_error(tangent: Tensor, expected: Tensor) -> float:
    return float((tangent.double() - expected).norm() / expected.norm())


def relative_error_of_r(tangent: Tensor, expected: Tensor) -> float:
    r = tangent_spread(expected).amax()
    return float((tangent_spread(tangent.double()).amax() - r).abs() / r)


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


class TestReadingLogits:
    @pytest.mark.parametrize("method", ["forward_mode", "finite_difference"])
    def test_a_callable_finds_them_in_the_output(self, method):
        class TwoHeads(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(12, 3), nn.Linear(12, 5)

            def forward(self, x):
                return {"a": self.a(x), "b": self.b(x)}

        torch.manual_seed(0)
        model, x = TwoHeads(), torch.randn(4, 12)
        direction = random_direction(model)
        taken = logit_tangent(model, (x,), {}, direction, logits=lambda output: output["b"], method=method)
        expected = jacobian_times(model, (x,), direction, lambda output: output["b"])[1]
        assert relative_error(taken.tangent, expected) < 1e-3

    @pytest.mark.parametrize("method", ["forward_mode", "finite_difference"])
    @pytest.mark.parametrize("kind", ["attribute", "key", "output"])
    def test_without_one_they_are_the_output_or_its_logits(self, kind, method):
        class Output:
            def __init__(self, logits):
                self.logits = logits

        class Wrapped(nn.Module):
            def __init__(self):
                super().__init__()
                self.head = nn.Linear(12, 5)

            def forward(self, x):
                z = self.head(x)
                return {"attribute": Output(z), "key": {"logits": z, "other": x}, "output": z}[kind]

        torch.manual_seed(0)
        model, x = Wrapped(), torch.randn(4, 12)
        direction = random_direction(model)
        expected = jacobian_times(model.head, (x,), {n.removeprefix("head."): t for n, t in direction.items()})[1]
        assert relative_error(logit_tangent(model, (x,), {}, direction, method=method).tangent, expected) < 1e-3

    @pytest.mark.parametrize("method", ["forward_mode", "finite_difference"])
    def test_a_mask_beside_them_is_handed_on(self, method):
        model, x = build("tied language model")
        mask = x > 4
        taken = logit_tangent(model, (x,), {}, random_direction(model), logits=lambda z: (z, mask), method=method)
        assert taken.tangent.shape == (4, 5, 20)
        assert torch.equal(taken.mask, mask)

    def test_no_mask_beside_them_means_that_all_count(self):
        model, x = build("mlp")
        assert logit_tangent(model, (x,), {}, random_direction(model), logits=lambda z: (z, None)).mask is None

    @pytest.mark.parametrize("method", ["forward_mode", "finite_difference"])
    def test_a_flat_output_is_one_logit_a_sample(self, method):
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(12, 1), nn.Flatten(0)), torch.randn(4, 12)
        direction = random_direction(model)
        taken = logit_tangent(model, (x,), {}, direction, method=method)
        assert taken.logits.shape == taken.tangent.shape == (4, 1)
        assert relative_error(taken.tangent.squeeze(-1), jacobian_times(model, (x,), direction)[1]) < 1e-3


class TestErrors:
    def test_a_name_that_is_no_parameter(self):
        model, x = build("mlp")
        with pytest.raises(
            ConfigurationError, match=r"direction for 'body\.weight', which is no parameter .*'0\.weight'"
        ):
            logit_tangent(model, (x,), {}, {"body.weight": torch.ones(3)})
        with pytest.raises(ConfigurationError, match=r"value for 'body\.weight', which is no parameter"):
            logit_tangent(model, (x,), {}, random_direction(model), parameters={"body.weight": torch.ones(3)})

    def test_an_unknown_method(self):
        model, x = build("mlp")
        with pytest.raises(
            ConfigurationError, match=r"got method='reverse_mode'; expected 'auto' or one of forward_mode"
        ):
            logit_tangent(model, (x,), {}, random_direction(model), method="reverse_mode")

    @pytest.mark.parametrize("method", ["auto", "forward_mode", "finite_difference"])
    @pytest.mark.parametrize(
        ("read", "got"),
        [
            (lambda z: z.argmax(-1), r"got a torch\.int64 tensor of shape \(8,\) as logits"),
            (lambda z: z.sum(), r"got a torch\.float32 tensor of shape \(\) as logits"),
            (lambda z: [z], "got a list as logits"),
            (lambda z: None, "got a NoneType as logits"),
        ],
    )
    def test_logits_that_are_none(self, read, got, method):
        model, x = build("mlp")
        with pytest.raises(ConfigurationError, match=got + r"; expected a floating tensor .* Pass `logits=`"):
            logit_tangent(model, (x,), {}, random_direction(model), logits=read, method=method)

    @pytest.mark.parametrize("method", ["auto", "forward_mode", "finite_difference"])
    @pytest.mark.parametrize(
        "mask",
        [
            torch.ones(8),  # not bool
            torch.ones(7, dtype=torch.bool),
            torch.ones(8, CLASSES, dtype=torch.bool),
        ],
    )
    def test_a_mask_of_another_kind_or_shape(self, mask, method):
        model, x = build("mlp")
        with pytest.raises(ConfigurationError, match=r"got a mask of shape .*expected a bool tensor of shape \(8,\)"):
            logit_tangent(model, (x,), {}, random_direction(model), logits=lambda z: (z, mask), method=method)

    def test_a_second_output_that_is_no_mask(self):
        class WithState(nn.Module):
            def __init__(self):
                super().__init__()
                self.cells = nn.RNN(12, CLASSES, batch_first=True)

            def forward(self, x):
                return self.cells(x, None)[0], [x]

        torch.manual_seed(0)
        model, x = WithState(), torch.randn(4, 3, 12)
        with pytest.raises(ConfigurationError, match="got a"):
            logit_tangent(model, (x,), {}, random_direction(model))

    def test_a_direction_of_another_shape(self):
        model, x = build("mlp")
        with pytest.raises((ConfigurationError, RuntimeError)):
            logit_tangent(model, (x,), {}, {"5.bias": torch.ones(1)})

    def test_what_the_model_itself_raises(self):
        model, x = build("mlp")
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            logit_tangent(model, (x[:, :5],), {}, random_direction(model))

    @pytest.mark.parametrize("method", ["forward_mode", "math_attention"])
    def test_a_method_asked_for_by_name_is_not_replaced(self, method):
        model, x = build("custom kernel")
        with pytest.raises((RuntimeError, NotImplementedError)):
            logit_tangent(model, (x,), {}, random_direction(model), method=method)


def footprint(model: nn.Module) -> dict[str, Any]:
    """Everything that taking a tangent could disturb."""
    backends = torch.backends
    return {
        **{f"parameter {n}": p.detach().clone() for n, p in model.named_parameters()},
        **{f"gradient {n}": None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        **{f"identity {n}": (id(p), p.data_ptr(), p.requires_grad) for n, p in model.named_parameters()},
        **{f"buffer {n}": b.clone() for n, b in model.named_buffers()},
        **{f"mode {n}": m.training for n, m in model.named_modules()},
        **{f"attributes {n}": sorted(vars(m)) for n, m in model.named_modules()},
        "torch stream": torch.get_rng_state(),
        "numpy stream": [torch.as_tensor(np.random.get_state()[1].astype(np.int64)), *np.random.get_state()[2:]],  # noqa: NPY002
        "python stream": random.getstate(),
        "gradients enabled": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "attention fast path": backends.mha.get_fastpath_enabled(),
        "oneDNN": (backends.mkldnn.enabled, backends.mkldnn.deterministic, backends.mkldnn.allow_tf32),
        "attention kernels": (
            backends.cuda.flash_sdp_enabled(),
            backends.cuda.mem_efficient_sdp_enabled(),
            backends.cuda.math_sdp_enabled(),
            backends.cuda.cudnn_sdp_enabled(),
        ),
        "cuDNN": (backends.cudnn.enabled, backends.cudnn.benchmark, backends.cudnn.deterministic),
        "precision of matrix products": torch.get_float32_matmul_precision(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_untouched(before: dict[str, Any], model: nn.Module) -> None:
    after = footprint(model)
    assert before.keys() == after.keys()
    assert [key for key in before if not same(before[key], after[key])] == []


class TestNothingIsChanged:
    @pytest.mark.parametrize("method", ["auto", "math_attention", "finite_difference"])
    @pytest.mark.parametrize("name", [name for name in CASES if CASES[name].method != "finite_difference"])
    def test_of_the_model_the_streams_or_the_flags(self, name, method):
        model, x = build(name)
        for i, module in enumerate(
            model.modules()
        ):  # modes, gradients and requires_grad as a bare train() would lose them
            module.training = i % 3 != 2
        for i, parameter in enumerate(model.parameters()):
            parameter.requires_grad_(i % 2 == 0)
            parameter.grad = torch.ones_like(parameter) if i % 4 == 0 else None
        before, kept = footprint(model), x.clone()
        logit_tangent(model, (x,), {}, random_direction(model), method=method)
        assert_untouched(before, model)
        assert torch.equal(x, kept)

    @pytest.mark.parametrize("method", ["auto", "finite_difference"])
    def test_of_running_statistics(self, method):
        model, x = build("cnn with BatchNorm")
        logit_tangent(model, (x,), {}, random_direction(model), method=method)
        assert int(model[1].num_batches_tracked) == 0
        assert not model[1].running_mean.any()

    @pytest.mark.parametrize("method", ["auto", "finite_difference"])
    def test_of_flags_that_the_user_has_set(self, method):
        model, x = build("lstm")
        fast_path, flash = torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        torch.backends.cuda.enable_flash_sdp(False)
        try:
            with torch.no_grad():
                before = footprint(model)
                logit_tangent(model, (x,), {}, random_direction(model), method=method)
                assert_untouched(before, model)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            torch.backends.cuda.enable_flash_sdp(flash)

    @pytest.mark.parametrize("method", ["auto", "math_attention", "finite_difference"])
    def test_when_it_fails(self, method):
        model, x = build("transformer")
        before = footprint(model)

        def failing(output):
            random.random()
            np.random.rand()  # noqa: NPY002
            torch.rand(3)
            raise ZeroDivisionError("in the callable")

        with pytest.raises(ZeroDivisionError, match="in the callable"):
            logit_tangent(model, (x,), {}, random_direction(model), logits=failing, method=method)
        assert_untouched(before, model)

    def test_and_training_goes_on_as_if_it_had_not_been_taken(self):
        losses = []
        for watched in (False, True):
            model, x = build("transformer")
            torch.manual_seed(5)
            optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
            course = []
            for _ in range(4):
                loss = F.cross_entropy(model(x), torch.arange(8) % CLASSES)
                loss.backward()
                if watched:
                    logit_tangent(model, (x,), {}, random_direction(model))
                optimizer.step()
                optimizer.zero_grad()
                course.append(loss.item())
            losses.append(course)
        assert losses[0] == losses[1]
        assert not math.isnan(losses[0][-1])


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
