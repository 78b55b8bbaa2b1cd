"""Six small architectures on scikit-learn's digits, and how they are trained: what the studies probe."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redline.integrations.demo.models import Block, DigitsTransformer


class Residual(nn.Module):
    """Adds what its layers make of the input to the input."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class TokenTransformer(nn.Module):
    """The digit as one token: a linear map, a pre-norm block with one head, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Linear(64, 32), Block(32, 1, causal=False), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embed(x).unsqueeze(1)).squeeze(1))


def linear() -> nn.Module:
    return nn.Linear(64, 10)


def mlp() -> nn.Module:
    """One hidden layer of width 128, ReLU."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def residual_mlp() -> nn.Module:
    """Three residual layers of width 64, without normalization."""
    blocks = [Residual(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)) for _ in range(3)]
    return nn.Sequential(nn.Linear(64, 64), *blocks, nn.Linear(64, 10))


def cnn_batchnorm() -> nn.Module:
    """Two convolutions with BatchNorm and ReLU on the 8 x 8 pixels, and a linear head."""
    layers = [
        layer
        for channels, stride in ((1, 1), (8, 2))
        for layer in (nn.Conv2d(channels, 8, 3, stride, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    ]
    return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *layers, nn.Flatten(), nn.Linear(128, 10))


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "linear": linear,
    "MLP": mlp,
    "residual MLP": residual_mlp,
    "CNN+BN": cnn_batchnorm,
    "one-token transformer": TokenTransformer,
    "row transformer": DigitsTransformer,
}


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int, *, lr: float = 0.01, temperature: float = 1.0) -> None:
    """Adam, full batch, on the cross-entropy of ``logits / temperature``; in train mode throughout."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x) / temperature, y).backward()
        optimizer.step()
    optimizer.zero_grad()
