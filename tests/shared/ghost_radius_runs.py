"""What the tests of GhostRadius share: models and their inputs, watched steps, and spreads by a Jacobian in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import redline

R, RHO, TAU = "redline_normalized_step_size", "redline_ghost_radius", "redline_update_norm"
SAMPLES, BATCH = "redline_tangent_samples", "redline_batch_samples"
FALLBACKS = "redline_tangent_fallbacks_total"
CLASSES = 7


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.head, self.dropout = nn.Linear(12, 36), nn.Linear(12, CLASSES), 0.3

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 6)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.head(mixed.transpose(1, 2).flatten(2).mean(1))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, 2, 24, dropout=0.2, batch_first=True, activation="gelu")
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(12, CLASSES)

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))


class LanguageModel(nn.Module):
    """Tied embeddings, logits ``(batch, time, vocabulary)``; token 0 is padding."""

    def __init__(self):
        super().__init__()
        self.embedding, self.inner, self.norm = nn.Embedding(10, 12), nn.Linear(12, 12), nn.LayerNorm(12)
        self.head = nn.Linear(12, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.norm(torch.tanh(self.inner(self.embedding(tokens)))))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cells, self.head = nn.LSTM(12, 10, 2, dropout=0.4, batch_first=True), nn.Linear(10, CLASSES)

    def forward(self, x):
        return self.head(self.cells(x)[0][:, -1])


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 32), nn.LayerNorm(32), nn.GELU(), nn.Dropout(0.3), nn.Linear(32, CLASSES))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout2d(0.2), nn.Conv2d(6, 8, 3, stride=2),
        nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, CLASSES),
    )  # fmt: skip


def vectors(batch: int = 12) -> Tensor:
    return torch.randn(batch, 12)


def images(batch: int = 12) -> Tensor:
    return torch.randn(batch, 1, 8, 8)


def sequences(batch: int = 12) -> Tensor:
    return torch.randn(batch, 6, 12)


def sentences(batch: int = 12) -> Tensor:
    return torch.randint(0, 10, (batch, 3))


# model, its inputs, and the method that works for it on the CPU
CASES = {
    "mlp": (mlp, vectors, "forward_mode"),
    "cnn": (cnn, images, "forward_mode"),
    "attention": (Attention, sequences, "math_attention"),
    "transformer": (Transformer, sequences, "math_attention"),
    "language model": (LanguageModel, sentences, "forward_mode"),
    "lstm": (Recurrent, sequences, "math_attention"),
}


def loss_of(z: Tensor) -> Tensor:
    z = z.flatten(0, -2)
    return F.cross_entropy(z.float(), torch.arange(len(z)) % z.shape[-1])


def spreads(
    model: nn.Module, x: Tensor, update: dict[str, Tensor], read: Callable[[Any], Tensor] = lambda z: z
) -> Tensor:
    """The spread of ``J_z(x) p`` of every sample, in float64: one backward pass a logit, dropout off."""
    reference = copy.deepcopy(model).double()
    for module in reference.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    z = read(reference(x.double() if x.is_floating_point() else x))
    moved = [(parameter, update[name]) for name, parameter in reference.named_parameters() if name in update]
    rows = []
    for logit in z.flatten():
        gradients = torch.autograd.grad(logit, [p for p, _ in moved], retain_graph=True, allow_unused=True)
        rows.append(sum((g * p).sum() for g, (_, p) in zip(gradients, moved, strict=True) if g is not None))
    tangent = torch.stack(rows).reshape(z.shape)
    return (tangent.unsqueeze(-1) - tangent.unsqueeze(-2)).flatten(-2).amax(-1)


def moved(before: nn.Module, after: nn.Module) -> dict[str, Tensor]:
    values = dict(before.named_parameters())
    return {name: p.detach().double() - values[name].detach().double() for name, p in after.named_parameters()}


def watched_step(
    session: redline.Session,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    loss: Callable[[Any], Tensor] = loss_of,
) -> tuple[nn.Module, dict[str, Tensor]]:
    """One training step; the model as it was before, and the update, recorded around ``optimizer.step()``."""
    optimizer.zero_grad()
    loss(model(x)).backward()
    before = copy.deepcopy(model)
    optimizer.step()
    return before, moved(before, model)
