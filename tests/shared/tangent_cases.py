"""What the tests of logit tangents share: models, directions, and a Jacobian taken row by row in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redline.numerics import tangent_spread

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
