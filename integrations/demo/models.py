"""Small models of the kinds people train: a transformer on images, a decoder on text."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """A pre-norm transformer block: attention and a 4x GELU feed-forward, each added to what came in."""

    def __init__(self, width: int, heads: int, *, causal: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.causal, self.dropout = heads, causal, dropout
        self.norm_attention, self.norm_feedforward = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, time, width)`` to the same."""
        batch, time, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, time, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, time, width))
        return x + self.down(F.gelu(self.up(self.norm_feedforward(x))))


class DigitsTransformer(nn.Module):
    """Reads a digit's 8 rows as tokens behind a class token: ``(batch, 64)`` to ``(batch, 10)`` logits."""

    def __init__(self, width: int = 32, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.rows = nn.Linear(8, width)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, 9, width))
        self.blocks = nn.ModuleList(Block(width, heads, causal=False) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the ten digits."""
        rows = self.rows(x.view(-1, 8, 8))
        x = torch.cat([self.token.expand(len(rows), -1, -1), rows], dim=1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


class ByteLM(nn.Module):
    """A decoder over bytes: ``(batch, time)`` int64 to ``(batch, time, 256)`` logits of the next byte."""

    def __init__(
        self, width: int = 96, layers: int = 3, heads: int = 4, context: int = 64, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, context, width))
        self.blocks = nn.ModuleList(Block(width, heads, causal=True, dropout=dropout) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next byte at every position."""
        x = self.embedding(tokens) + self.position[:, : tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class LlamaBlock(nn.Module):
    """A pre-norm LLaMA block: rotary causal attention with heads of a fixed width, and a SwiGLU feed-forward."""

    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        hidden = 8 * width // 3
        self.head_width = head_width
        self.norm_attention, self.norm_feedforward = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """``(batch, time, width)`` to the same; ``rotation``: ``(2, time, head_width / 2)``, cosines and sines."""

        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (-1, self.head_width)).transpose(1, 2)

        normed = self.norm_attention(x)
        q, k = _rotated(heads(self.query(normed)), rotation), _rotated(heads(self.key(normed)), rotation)
        mixed = F.scaled_dot_product_attention(q, k, heads(self.value(normed)), is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        normed = self.norm_feedforward(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


def _rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotary position embedding (arXiv 2104.09864): each pair of channels turned by its angle."""
    (cosine, sine), (even, odd) = rotation, (x[..., ::2], x[..., 1::2])
    return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1).flatten(-2)


class LlamaLM(nn.Module):
    """A small LLaMA over bytes, ``(batch, time)`` int64 to ``(batch, time, 256)`` logits, initialized as muP asks.

    Hidden matrices start at variance ``1 / fan_in``, embeddings at 1 and the readout at 0, so that widths differ in
    nothing else.
    """

    def __init__(self, width: int = 64, layers: int = 2, head_width: int = 16, context: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.blocks = nn.ModuleList(LlamaBlock(width, head_width) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, 256, bias=False)
        angles = torch.outer(
            torch.arange(context), 10_000 ** (-torch.arange(0, head_width, 2, dtype=torch.float32) / head_width)
        )
        self.rotation: Tensor
        self.register_buffer("rotation", torch.stack([angles.cos(), angles.sin()]), persistent=False)
        for matrix in (parameter for parameter in self.blocks.parameters() if parameter.dim() == 2):
            nn.init.normal_(matrix, std=matrix.shape[1] ** -0.5)
        nn.init.zeros_(self.head.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next byte at every position."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.rotation[:, : tokens.shape[1]])
        return self.head(self.norm(x))
