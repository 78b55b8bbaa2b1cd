"""Models for ``redline doctor`` to look at: what works, and what does not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from redline.integrations.demo.models import ByteLM


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))


INSTANCE = mlp()


def with_inputs() -> tuple[nn.Module, Tensor]:
    return mlp(), torch.ones(8, 12)


def language_model() -> nn.Module:
    return ByteLM(width=16, layers=1, heads=2, context=8)


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Tied(nn.Module):
    """Embedding and head share a parameter; one layer is frozen, one is never used, one is spectrally normalized."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.normed = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.normed(self.frozen(self.embedding(tokens))))


class _Straight(torch.autograd.Function):
    """Differentiable backwards only, as a custom kernel is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class CustomKernel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return _Straight.apply(self.inner(x))


class Quantized(nn.Module):
    """Holds a matrix of integers beside one that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.ones(6, 12, dtype=torch.int8), requires_grad=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x @ self.codes.to(x.dtype).T)


class KeywordsOnly(nn.Module):
    """Takes keywords, gives a pair; the logits are its second."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 4)

    def forward(self, *, x: Tensor, scale: float) -> tuple[str, Tensor]:
        return "logits follow", self.inner(x) * scale


def keyword_inputs() -> dict[str, Any]:
    return {"x": torch.ones(8, 12), "scale": 2.0}


def positional_inputs() -> tuple[Tensor]:
    return (torch.ones(8, 12),)


def second(output: tuple[str, Tensor]) -> Tensor:
    return output[1]


def second_and_mask(output: tuple[str, Tensor]) -> tuple[Tensor, Tensor]:
    return output[1], torch.arange(len(output[1])) % 2 == 0


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LazyLinear(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class OneLogit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class NoGradient(nn.Module):
    """Cuts the graph: nothing can be trained."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).detach()


class Frozen(nn.Linear):
    def __init__(self) -> None:
        super().__init__(12, 4)
        self.requires_grad_(False)


def vectors_only() -> nn.Module:
    return nn.LayerNorm(12)


def integers() -> Tensor:
    return torch.randint(3, (4,))


def broken() -> nn.Module:
    raise RuntimeError("the checkpoint is gone\nand more")


NOT_CALLABLE = 3
