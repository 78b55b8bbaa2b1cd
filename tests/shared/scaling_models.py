"""What the tests of scaling share: models whose parameters are to be told apart, and what they were given."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from redline.integrations.demo.models import ByteLM, DigitsTransformer, LlamaLM
from redline.scaling import classify, transfer

NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def matrix_like(model: nn.Module, width: int, **overrides: Any) -> set[str]:
    """Names of the parameters that are taken for matrix-like."""
    return {name for name, one in classify(model, width, **overrides).items() if one.kind == "matrix-like"}


def quiet(model: nn.Module, **arguments: Any) -> list[dict[str, Any]]:
    """``transfer`` without the table, from width 16 to 64 where nothing else is said."""
    given = {"base_width": 16, "width": 64, "lr": 0.02, "weight_decay": 0.1, "show": False}
    return transfer(model, **{**given, **arguments})


def rates(model: nn.Module, groups: Iterable[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Rate and decay of every parameter, by name; none may occur twice."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [
        (names[id(parameter)], (group["lr"], group["weight_decay"]))
        for group in groups
        for parameter in group["params"]
    ]
    assert len(dict(found)) == len(found), "a parameter is in two groups"
    return dict(found)


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def convolutional(width: int) -> nn.Module:
    """As in a ResNet: a stem on three colours, a body, a depthwise layer, a pointwise one, a head."""
    return nn.Sequential(
        OrderedDict(
            stem=nn.Conv2d(3, width, 3, bias=False),
            norm=nn.BatchNorm2d(width),
            body=nn.Conv2d(width, width, 3),
            depthwise=nn.Conv2d(width, width, 3, groups=width),
            pointwise=nn.Conv2d(width, 2 * width, 1),
            head=nn.Linear(2 * width, 10),
        )
    )


def grouped_query_attention(width: int) -> nn.Module:
    """Keys and values of a quarter of the heads: their projections are narrower than the model."""
    return nn.ModuleDict(
        {
            "query": nn.Linear(width, width, bias=False),
            "key": nn.Linear(width, width // 4, bias=False),
            "value": nn.Linear(width, width // 4, bias=False),
            "out": nn.Linear(width, width, bias=False),
        }
    )


class Experts(nn.Module):
    """A router and stacked experts, ``(expert, out, in)``."""

    def __init__(self, width: int, experts: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, 2 * width, width) * width**-0.5)
        self.down = nn.Parameter(torch.randn(experts, width, 2 * width) * (2 * width) ** -0.5)
        self.bias = nn.Parameter(torch.zeros(experts, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, width)`` to the same."""
        weights = self.router(x).softmax(-1)
        hidden = torch.einsum("bi,eoi->beo", x, self.up).relu()
        out = torch.einsum("beo,eio->bei", hidden, self.down) + self.bias.transpose(0, 1)
        return (weights[..., None] * out).sum(1)


class Tied(nn.Module):
    """A language model whose readout is its embedding."""

    def __init__(self, width: int, *, readout_first: bool = False) -> None:
        super().__init__()
        if readout_first:
            self.head = nn.Linear(width, 100, bias=False)
        self.embedding, self.body = nn.Embedding(100, width), nn.Linear(width, width)
        if not readout_first:
            self.head = nn.Linear(width, 100, bias=False)
        self.head.weight = self.embedding.weight


LLAMA_BLOCK = {f"blocks.0.{name}.weight" for name in ("query", "key", "value", "out", "gate", "up", "down")}


BLOCK = {f"blocks.0.{name}.weight" for name in ("qkv", "out", "up", "down")}


CASES: dict[str, tuple[Callable[[int], nn.Module], set[str]]] = {
    "llama": (lambda width: LlamaLM(width, layers=1), LLAMA_BLOCK | {"head.weight"}),
    "bytes": (lambda width: ByteLM(width, layers=1), BLOCK | {"head.weight"}),
    "digits": (lambda width: DigitsTransformer(width, layers=1), BLOCK | {"head.weight"}),
    "convolutions": (convolutional, {"body.weight", "pointwise.weight", "head.weight"}),
    "encoder layer": (
        lambda width: nn.TransformerEncoderLayer(width, 4, 4 * width),
        {"self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"},
    ),
    "attention": (
        lambda width: nn.MultiheadAttention(width, 4, add_bias_kv=True),
        {"in_proj_weight", "out_proj.weight"},
    ),
    "attention of other keys": (
        lambda width: nn.MultiheadAttention(width, 4, kdim=3, vdim=5),
        {"q_proj_weight", "out_proj.weight"},
    ),
    "grouped queries": (
        grouped_query_attention,
        {f"{name}.weight" for name in ("query", "key", "value", "out")},
    ),
    "experts": (Experts, {"router.weight", "up", "down"}),
    "tied": (Tied, {"body.weight"}),
    "recurrent": (lambda width: nn.LSTM(3, width), {"weight_hh_l0"}),
    "weight norm": (
        lambda width: parametrizations.weight_norm(nn.Linear(width, width)),
        {"parametrizations.weight.original1"},
    ),
    "weight norm of a convolution": (
        lambda width: parametrizations.weight_norm(nn.Conv2d(width, width, 3)),
        {"parametrizations.weight.original1"},
    ),
    "spectral norm": (
        lambda width: parametrizations.spectral_norm(nn.Linear(width, width)),
        {"parametrizations.weight.original"},
    ),
}


cases = pytest.mark.parametrize(("build", "expected"), CASES.values(), ids=CASES)


def split(model: LlamaLM) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The blocks' parameters, and all others."""
    inner = list(model.blocks.parameters())
    return inner, [p for p in model.parameters() if all(p is not one for one in inner)]


def show(model: nn.Module, **arguments: Any) -> list[dict[str, Any]]:
    return quiet(model, **{"show": True, **arguments})


LONG = "model.vision_tower.vision_model.encoder.layers.23.self_attn.out_proj"
