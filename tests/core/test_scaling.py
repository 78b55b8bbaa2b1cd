"""Width transfer: what is matrix-like, the numbers and the groups they make, what is printed, whether spectra match."""

from __future__ import annotations

import copy
import io
import itertools
import json
import math
import statistics
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pytest
import rich
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import redline
from redline import ConfigurationError
from redline.integrations.demo.models import ByteLM, DigitsTransformer, LlamaLM
from redline.readings import RunInfo, Series, Snapshot
from redline.scaling import ScaledParameter, classify, compare_spectra, transfer

NAN, INF = math.nan, math.inf
SIGMA = "redline_weight_spectral_norm"


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


class With(nn.Module):
    """A module with one parameter, ``p``, of a shape."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.randn(shape))


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


# Which parameters are matrix-like ------------------------------------------------------------------------------------

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


@cases
@pytest.mark.parametrize("width", [32, 64])
def test_what_is_matrix_like(build: Callable[[int], nn.Module], expected: set[str], width: int):
    model = build(width)
    assert matrix_like(model, width) == expected
    assert list(classify(model, width)) == [name for name, _ in model.named_parameters()]


@cases
def test_matrix_like_is_what_grows_in_two_dimensions(build: Callable[[int], nn.Module], expected: set[str]):
    """muP's definition, taken from the shapes at two widths. Of readouts, which count too, only the inputs grow."""
    narrow, wide = (dict(build(width).named_parameters()) for width in (32, 64))
    growing = {
        name: sum(before != after for before, after in zip(narrow[name].shape, parameter.shape, strict=True))
        for name, parameter in wide.items()
    }
    readouts = growing.keys() & {"head.weight", "router.weight"}
    assert {name for name, dimensions in growing.items() if dimensions == 2} | readouts == expected


@cases
def test_other_dtypes_and_devices_make_no_difference(build: Callable[[int], nn.Module], expected: set[str]):
    assert matrix_like(build(32).to(torch.bfloat16), 32) == expected
    if not any("parametrizations" in name for name in expected):  # some of these compute as they are registered
        with torch.device("meta"):
            assert matrix_like(build(32), 32) == expected


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Linear(15, 16, bias=False), set()),
        (nn.Linear(16, 1, bias=False), {"weight"}),
        (nn.Linear(17, 1, bias=False), {"weight"}),
        (nn.Conv2d(2, 16, (2, 4), bias=False), {"weight"}),
        (nn.Conv2d(1, 16, (3, 5), bias=False), set()),
        (nn.Conv2d(32, 16, 1, groups=2, bias=False), {"weight"}),
        (nn.Conv1d(16, 4, 3, bias=False), {"weight"}),
        (nn.ConvTranspose2d(16, 3, 1, bias=False), {"weight"}),
        (nn.ConvTranspose2d(3, 16, 2, bias=False), set()),
        (nn.Embedding(64, 16), set()),
        (nn.EmbeddingBag(64, 16), set()),
        (nn.LayerNorm(16), set()),
        (nn.LayerNorm((16, 16)), {"weight", "bias"}),  # has to be named
        (With(16), set()),
        (With(16, 1), set()),
        (With(1, 1, 16), set()),
        (With(1, 9, 16), set()),
        (With(4, 1, 16), set()),
        (With(4, 8, 16), {"p"}),
        (With(4, 16, 8), set()),
        (With(2, 3, 8, 16), {"p"}),
        (With(1, 16, 7, 7), set()),
    ],
    ids=str,
)
def test_at_a_width_of_16(module: nn.Module, expected: set[str]):
    assert matrix_like(module, 16) == expected


def test_a_pointwise_convolution_in_one_dimension_is_matrix_like():
    """Its kernel is ``(out, in, 1)``, three dimensions with a 1 among them: as a class token's are."""
    assert matrix_like(nn.Conv1d(16, 16, 1, bias=False), 16) == {"weight"}
    assert matrix_like(nn.ConvTranspose1d(16, 16, 1, bias=False), 16) == {"weight"}


def test_a_parametrized_embedding_is_an_embedding():
    assert matrix_like(parametrizations.weight_norm(nn.Embedding(100, 16)), 16) == set()


def test_a_subclass_of_an_embedding_is_an_embedding():
    class Scaled(nn.Embedding):
        pass

    assert matrix_like(Scaled(100, 16), 16) == set()


@pytest.mark.parametrize("readout_first", [True, False])
def test_a_readout_tied_to_the_embedding_is_one_vector_like_parameter(readout_first: bool):
    model = Tied(32, readout_first=readout_first)
    found = classify(model, 32)
    name = "head.weight" if readout_first else "embedding.weight"
    assert (found[name].kind, found[name].why) == ("vector-like", "embedding")
    assert len(found) == 3
    assert len(rates(model, quiet(model))) == 3


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore::redline.errors.RedlineWarning")
def test_sharded_parameters_are_classified_by_their_whole_shape_or_refused():
    """Never taken for vectors: a whole model under FSDP would train with nothing scaled and nothing decayed."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Linear(16, 16)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    try:
        found = matrix_like(model, 16)
    except ConfigurationError:
        return
    assert found == {"weight"}


def test_frozen_parameters_are_not_classified():
    model = LlamaLM(32, layers=1)
    model.embedding.requires_grad_(False)
    model.blocks[0].query.requires_grad_(False)
    assert matrix_like(model, 32) == (LLAMA_BLOCK | {"head.weight"}) - {"blocks.0.query.weight"}
    assert "embedding.weight" not in classify(model, 32)
    assert classify(nn.Linear(4, 4).requires_grad_(False), 4) == {}


def test_what_was_decided_and_why():
    found = classify(DigitsTransformer(32, layers=1), 32, matrix_like=["rows.weight"])
    expected = {
        "head.weight": ScaledParameter("head.weight", (10, 32), "matrix-like", "fan-in 32"),
        "blocks.0.down.weight": ScaledParameter("blocks.0.down.weight", (32, 128), "matrix-like", "fan-in 128"),
        "rows.weight": ScaledParameter("rows.weight", (32, 8), "matrix-like", "as you said"),
        "position": ScaledParameter("position", (1, 9, 32), "vector-like", "vector"),
        "norm.bias": ScaledParameter("norm.bias", (32,), "vector-like", "vector"),
    }
    assert {name: found[name] for name in expected} == expected
    why = classify(convolutional(32), 32)["stem.weight"].why
    assert "27" in why
    assert "width" in why


# Overrides -----------------------------------------------------------------------------------------------------------


def test_a_name_overrides_what_it_looks_like():
    model = LlamaLM(32, layers=1)
    usual = LLAMA_BLOCK | {"head.weight"}
    assert matrix_like(model, 32, vector_like=["head.weight"]) == usual - {"head.weight"}
    assert matrix_like(model, 32, matrix_like=["norm.weight"]) == usual | {"norm.weight"}
    assert matrix_like(model, 32, matrix_like=["embedding.weight"]) == usual | {"embedding.weight"}


def test_an_override_may_say_what_was_so_anyway():
    model = LlamaLM(32, layers=1)
    found = classify(model, 32, matrix_like=["head.weight"], vector_like=["norm.weight"])
    assert (found["head.weight"].kind, found["head.weight"].why) == ("matrix-like", "as you said")
    assert (found["norm.weight"].kind, found["norm.weight"].why) == ("vector-like", "as you said")


def test_a_pattern_overrides_all_that_it_fits():
    model = LlamaLM(32, layers=3)
    usual = matrix_like(model, 32)
    gates = {f"blocks.{k}.gate.weight" for k in range(3)}
    assert matrix_like(model, 32, vector_like=["blocks.*.gate.weight"]) == usual - gates
    assert matrix_like(model, 32, vector_like=["blocks.?.gate.*"]) == usual - gates
    assert matrix_like(model, 32, vector_like=["blocks.[02].gate.weight"]) == usual - (gates - {"blocks.1.gate.weight"})
    assert matrix_like(model, 32, vector_like=["*"]) == set()
    assert matrix_like(model, 32, matrix_like=["*"]) == trainable(model)


def test_patterns_fit_whole_names_and_tell_capitals_apart():
    model = nn.ModuleDict({"gate": nn.Linear(4, 4, bias=False), "Gate": nn.Linear(4, 4, bias=False)})
    assert matrix_like(model, 4, vector_like=["g*"]) == {"Gate.weight"}
    with pytest.raises(ConfigurationError, match="'ate'"):
        classify(model, 4, vector_like=["ate"])


def test_one_pattern_need_not_stand_in_a_list():
    model = LlamaLM(32, layers=1)
    assert matrix_like(model, 32, vector_like="head.weight") == LLAMA_BLOCK
    assert matrix_like(model, 32, matrix_like="*", vector_like=()) == trainable(model)


def test_a_name_with_brackets_is_a_name_before_it_is_a_pattern():
    model = nn.Module()
    model.register_parameter("w[0]", nn.Parameter(torch.randn(16, 16)))
    assert matrix_like(model, 16, vector_like=["w[0]"]) == set()


def test_overrides_of_a_readout_that_is_tied_may_use_either_name():
    assert matrix_like(Tied(32), 32, matrix_like=["embedding.weight"]) == {"body.weight", "embedding.weight"}
    assert matrix_like(Tied(32), 32, matrix_like=["head.weight"]) == {"body.weight", "embedding.weight"}


def test_transfer_passes_overrides_on():
    model = LlamaLM(64, layers=1)
    found = rates(model, quiet(model, vector_like=["head.*"], matrix_like=["norm.weight"]))
    assert found["head.weight"] == (0.02, 0.0)
    assert found["norm.weight"] == (0.005, 0.2)


@pytest.mark.parametrize("kind", ["matrix_like", "vector_like"])
@pytest.mark.parametrize("pattern", ["blocks.*.gates", "haed.weight", "embedding", ""])
def test_an_override_that_fits_nothing_is_refused(kind: str, pattern: str):
    with pytest.raises(ConfigurationError, match=r"got .* as .*; expected the name of a trainable parameter") as caught:
        quiet(LlamaLM(64, layers=1), **{kind: ["head.weight", pattern]})
    assert repr(pattern) in str(caught.value)
    assert kind.replace("_", "-") in str(caught.value)
    assert "'embedding.weight'" in str(caught.value), "one that would do"


def test_an_override_of_a_frozen_parameter_is_refused():
    model = LlamaLM(64, layers=1)
    model.embedding.requires_grad_(False)
    with pytest.raises(ConfigurationError, match=r"'embedding.weight' as vector-like; expected .*trainable"):
        classify(model, 64, vector_like=["embedding.weight"])


def test_an_override_of_a_model_without_parameters_is_refused():
    with pytest.raises(ConfigurationError, match="the model has none"):
        classify(nn.ReLU(), 4, vector_like=["weight"])


@pytest.mark.parametrize(
    ("one", "other"),
    [("head.weight", "head.weight"), ("blocks.*", "blocks.0.gate.weight"), ("*.gate.*", "blocks.0.*")],
)
def test_contradicting_overrides_are_refused(one: str, other: str):
    for overrides in ({"matrix_like": [one], "vector_like": [other]}, {"matrix_like": [other], "vector_like": [one]}):
        with pytest.raises(ConfigurationError, match="as matrix-like and as vector-like; expected one") as caught:
            classify(LlamaLM(32, layers=1), 32, **overrides)
        assert "head.weight" in str(caught.value) or "blocks.0.gate.weight" in str(caught.value)


def test_the_same_override_twice_is_no_contradiction():
    model = LlamaLM(32, layers=1)
    assert matrix_like(model, 32, vector_like=["head.weight", "head.*"]) == LLAMA_BLOCK


# The numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base_width", "width", "lr", "weight_decay", "scaled_lr", "scaled_decay"),
    [
        (16, 64, 0.02, 0.1, 0.005, 0.2),
        (64, 1024, 0.016, 0.25, 0.001, 1.0),
        (32, 64, 0.02, 0.1, 0.01, 0.1 * math.sqrt(2)),
        (64, 96, 0.03, 0.1, 0.02, 0.1 * math.sqrt(1.5)),
        (64, 64, 0.02, 0.1, 0.02, 0.1),
        (64, 16, 0.02, 0.1, 0.08, 0.05),
        (256, 64, 0.02, 0.0, 0.08, 0.0),
        (16, 64, 0.0, 0.1, 0.0, 0.2),
    ],
)
def test_rate_and_decay(
    base_width: int, width: int, lr: float, weight_decay: float, scaled_lr: float, scaled_decay: float
):
    model = LlamaLM(width, layers=1)
    found = rates(model, quiet(model, base_width=base_width, width=width, lr=lr, weight_decay=weight_decay))
    matrices = LLAMA_BLOCK | {"head.weight"}
    assert found.keys() == trainable(model)
    for name, (rate, decay) in found.items():
        if name in matrices:
            assert rate == pytest.approx(scaled_lr, rel=1e-12), name
            assert decay == pytest.approx(scaled_decay, rel=1e-12), name
        else:
            assert (rate, decay) == (lr, 0.0), name


widths = st.integers(1, 16_384)
rate = st.floats(1e-6, 1.0)


def of_a_matrix(base_width: int, width: int, lr: float, weight_decay: float) -> tuple[float, float]:
    (group,) = quiet(
        nn.Linear(1, 1, bias=False),
        base_width=base_width,
        width=width,
        lr=lr,
        weight_decay=weight_decay,
        matrix_like=["weight"],
    )
    return group["lr"], group["weight_decay"]


@settings(deadline=None)
@given(a=widths, b=widths, c=widths, lr=rate, weight_decay=rate)
def test_from_a_to_b_and_on_to_c_is_from_a_to_c(a: int, b: int, c: int, lr: float, weight_decay: float):
    assert of_a_matrix(b, c, *of_a_matrix(a, b, lr, weight_decay)) == pytest.approx(
        of_a_matrix(a, c, lr, weight_decay), rel=1e-9
    )


@settings(deadline=None)
@given(a=widths, b=widths, lr=rate, weight_decay=rate)
def test_there_and_back(a: int, b: int, lr: float, weight_decay: float):
    assert of_a_matrix(b, a, *of_a_matrix(a, b, lr, weight_decay)) == pytest.approx((lr, weight_decay), rel=1e-9)


@settings(deadline=None)
@given(a=widths, b=widths, lr=rate, weight_decay=rate)
def test_what_the_paper_keeps_the_same_is_the_same(a: int, b: int, lr: float, weight_decay: float):
    """``lr ~ 1/d``, and the top singular value, ``sqrt(lr / wd) * d^0.75`` (arXiv 2510.15262)."""
    scaled_lr, scaled_decay = of_a_matrix(a, b, lr, weight_decay)
    assert scaled_lr * b == pytest.approx(lr * a, rel=1e-9)
    assert math.sqrt(scaled_lr / scaled_decay) * b**0.75 == pytest.approx(
        math.sqrt(lr / weight_decay) * a**0.75, rel=1e-9
    )


def after_some_steps(width: int, *, scaled: bool) -> float:
    """Size of a small LLaMA's logits after five steps on one batch: muP's coordinate check."""
    torch.manual_seed(0)
    model = LlamaLM(width, layers=1)
    base = 32 if scaled else width
    groups = quiet(model, base_width=base, width=width, lr=0.02, weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups)
    generator = torch.Generator().manual_seed(0)
    tokens, targets = torch.randint(256, (2, 4, 16), generator=generator)
    for _ in range(5):
        F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return model(tokens).square().mean().sqrt().item()


def test_logits_move_as_far_at_every_width():
    narrow, wide = after_some_steps(32, scaled=True), after_some_steps(256, scaled=True)
    assert wide / narrow == pytest.approx(1, abs=0.3)
    assert after_some_steps(256, scaled=False) / narrow > 2


# Groups in optimizers ------------------------------------------------------------------------------------------------


@cases
def test_every_parameter_is_in_one_group(build: Callable[[int], nn.Module], expected: set[str]):
    model = build(64)
    groups = quiet(model)
    assert rates(model, groups).keys() == trainable(model)
    assert [group["name"] for group in groups] == ["matrix-like", "vector-like"][: len(groups)]
    assert rates(model, groups[:1]).keys() == expected


def test_frozen_parameters_are_in_no_group():
    model = LlamaLM(64, layers=1)
    model.embedding.requires_grad_(False)
    model.blocks.requires_grad_(False)
    assert rates(model, quiet(model)).keys() == {"norm.weight", "head.weight"}


def test_there_is_no_empty_group():
    assert [group["name"] for group in quiet(nn.Linear(64, 3, bias=False))] == ["matrix-like"]
    assert [group["name"] for group in quiet(nn.LayerNorm(64))] == ["vector-like"]
    assert quiet(nn.ReLU()) == []


def loss_of(model: nn.Module, batch: int = 2) -> Tensor:
    tokens, targets = torch.randint(256, (2, batch, 8))
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


def test_adamw_steps_at_the_rates_and_decays_of_the_rule():
    """Its first step moves each entry by the rate, against the gradient's sign, and shrinks it by rate times decay."""
    model = LlamaLM(64, layers=1).double()
    nn.init.normal_(model.head.weight)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(quiet(model), eps=1e-30)
    loss_of(model).backward()
    optimizer.step()
    matrices = matrix_like(model, 64)
    for name, parameter in model.named_parameters():
        lr, decay = (0.005, 0.2) if name in matrices else (0.02, 0.0)
        assert parameter.grad is not None
        expected = (1 - lr * decay) * before[name] - lr * parameter.grad.sign()
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-9, atol=1e-12)


def test_the_optimizers_own_defaults_do_not_get_through():
    model = LlamaLM(64, layers=1)
    optimizer = torch.optim.AdamW(quiet(model), lr=5.0, weight_decay=7.0)
    assert {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups} == {(0.005, 0.2), (0.02, 0.0)}


def test_muon_takes_the_matrices_and_redline_reads_the_groups_by_name():
    model = LlamaLM(64, layers=1)
    groups = {group["name"]: group for group in quiet(model)}
    muon = torch.optim.Muon([groups["matrix-like"]])
    adamw = torch.optim.AdamW([groups["vector-like"]])
    with redline.attach(model, [muon, adamw], monitors=[redline.StepHealth()]) as session:
        loss_of(model).backward()
        muon.step()
        adamw.step()
    assert session.latest.series("redline_learning_rate") == {
        ("Muon", "matrix-like"): pytest.approx(0.005),
        ("AdamW", "vector-like"): pytest.approx(0.02),
    }
    assert session.latest.value("redline_weight_decay", optimizer="Muon", group="matrix-like") == pytest.approx(0.2)
    assert session.latest.value("redline_weight_decay", optimizer="AdamW", group="vector-like") == 0


def read_by_redline(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Rates by the label ``group``, after one step."""
    with redline.attach(model, optimizer, monitors=[redline.StepHealth()]) as session:
        loss_of(model).backward()
        optimizer.step()
    return {group: value for (_, group), value in session.latest.series("redline_learning_rate").items()}


def test_names_of_groups_are_redlines_labels():
    model = LlamaLM(64, layers=1)
    labels = read_by_redline(model, torch.optim.AdamW(quiet(model)))
    assert labels == {"matrix-like": pytest.approx(0.005), "vector-like": pytest.approx(0.02)}


def test_a_schedule_keeps_the_ratio():
    model = LlamaLM(64, layers=1)
    optimizer = torch.optim.AdamW(quiet(model))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    for step in range(4):
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
            [0.005 / (step + 1), 0.02 / (step + 1)]
        )
        optimizer.step()
        schedule.step()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [pytest.approx(0.2), 0]


def test_a_cosine_schedule_ends_at_the_same_share_of_each_rate():
    model = LlamaLM(64, layers=1)
    optimizer = torch.optim.AdamW(quiet(model))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for _ in range(5):
        optimizer.step()
        schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.0025, 0.01])


def test_an_optimizer_of_such_groups_can_be_saved_and_loaded():
    model = LlamaLM(64, layers=1)
    optimizer = torch.optim.AdamW(quiet(model))
    loss_of(model).backward()
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    other = torch.optim.AdamW(quiet(model, lr=1.0))
    other.load_state_dict(state)
    assert [(group["name"], group["lr"]) for group in other.param_groups] == [
        ("matrix-like", pytest.approx(0.005)),
        ("vector-like", pytest.approx(0.02)),
    ]


def test_the_model_is_left_as_it_was():
    model = LlamaLM(64, layers=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    random = torch.get_rng_state()
    quiet(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


# Groups of one's own -------------------------------------------------------------------------------------------------


def split(model: LlamaLM) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The blocks' parameters, and all others."""
    inner = list(model.blocks.parameters())
    return inner, [p for p in model.parameters() if all(p is not one for one in inner)]


def test_own_rates_and_decays_are_scaled_instead():
    model = LlamaLM(64, layers=1)
    inner, outer = split(model)
    groups = [{"params": inner, "lr": 0.1}, {"params": outer, "weight_decay": 0.4}]
    found = rates(model, quiet(model, groups=groups))
    assert found.keys() == trainable(model)
    assert found["blocks.0.gate.weight"] == pytest.approx((0.025, 0.2))
    assert found["blocks.0.norm_attention.weight"] == (0.1, 0.0)
    assert found["head.weight"] == pytest.approx((0.005, 0.8))
    assert found["embedding.weight"] == (0.02, 0.0)


def test_own_names_and_settings_are_kept():
    model = LlamaLM(64, layers=1)
    inner, outer = split(model)
    groups = [{"params": inner, "name": "blocks", "betas": (0.8, 0.9)}, {"params": outer, "name": "rest", "eps": 1e-5}]
    made = quiet(model, groups=groups)
    assert [(group["name"], group.get("betas"), group.get("eps")) for group in made] == [
        ("blocks matrix-like", (0.8, 0.9), None),
        ("blocks vector-like", (0.8, 0.9), None),
        ("rest matrix-like", None, 1e-5),
        ("rest vector-like", None, 1e-5),
    ]
    labels = read_by_redline(model, torch.optim.AdamW(made))
    assert labels.keys() == {group["name"] for group in made}


def test_groups_without_names_have_labels_of_their_own():
    """Or the last of them hides the others' rates from Redline."""
    model = LlamaLM(64, layers=1)
    inner, outer = split(model)
    optimizer = torch.optim.AdamW(quiet(model, groups=[{"params": inner, "lr": 0.1}, {"params": outer}]))
    assert sorted(read_by_redline(model, optimizer).values()) == pytest.approx([0.005, 0.02, 0.025, 0.1])


def test_own_groups_are_not_changed():
    model = LlamaLM(64, layers=1)
    inner, outer = split(model)
    groups = [{"params": inner, "lr": 0.1, "betas": [0.9, 0.95]}, {"params": outer}]
    before = [dict(group) for group in groups]
    quiet(model, groups=groups)
    assert groups == before
    assert all(group["params"] is kept["params"] for group, kept in zip(groups, before, strict=True))


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(lambda model: [{"params": model.parameters()}], id="a generator"),
        pytest.param(lambda model: ({"params": p} for p in model.parameters()), id="single tensors"),
        pytest.param(lambda model: ({"params": list(split(model)[k])} for k in (0, 1)), id="a generator of groups"),
        pytest.param(lambda model: [{"params": tuple(model.parameters())}], id="a tuple"),
        pytest.param(lambda model: [{"params": list(model.named_parameters())}], id="with names, as torch allows"),
        pytest.param(lambda model: torch.optim.AdamW(model.parameters(), lr=9.0).param_groups, id="of an optimizer"),
    ],
)
def test_parameters_may_be_given_as_torch_takes_them(given: Callable[[nn.Module], Any]):
    model = LlamaLM(64, layers=1)
    made = quiet(model, groups=given(model))
    found = rates(model, torch.optim.AdamW(made).param_groups)
    assert found.keys() == trainable(model)
    assert found["head.weight"][0] in (pytest.approx(0.005), pytest.approx(9.0 / 4))


def test_groups_of_an_optimizer_keep_its_settings():
    model = LlamaLM(64, layers=1)
    tuned = torch.optim.AdamW(model.parameters(), lr=0.04, weight_decay=0.3, betas=(0.8, 0.9), amsgrad=True)
    made = torch.optim.AdamW(quiet(model, groups=tuned.param_groups))
    assert [(group["lr"], group["weight_decay"], group["betas"], group["amsgrad"]) for group in made.param_groups] == [
        (0.01, 0.6, (0.8, 0.9), True),
        (0.04, 0.0, (0.8, 0.9), True),
    ]


def test_a_schedule_on_groups_of_a_scheduled_optimizer_starts_from_the_scaled_rates():
    """A scheduler leaves ``initial_lr`` in the groups, and the next one starts from what it finds there."""
    model = LlamaLM(64, layers=1)
    tuned = torch.optim.AdamW(model.parameters(), lr=0.02)
    torch.optim.lr_scheduler.LambdaLR(tuned, lambda step: 1.0)
    optimizer = torch.optim.AdamW(quiet(model, groups=tuned.param_groups))
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.005, 0.02])


def test_groups_of_an_optimizer_that_knows_names_keep_each_its_own():
    model = LlamaLM(64, layers=1)
    tuned = torch.optim.AdamW(model.named_parameters(), lr=0.02)
    optimizer = torch.optim.AdamW(quiet(model, groups=tuned.param_groups))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        if "param_names" in group:
            assert group["param_names"] == [names[id(parameter)] for parameter in group["params"]]


def test_frozen_parameters_of_own_groups_are_left_out():
    model = LlamaLM(64, layers=1)
    model.embedding.requires_grad_(False)
    found = rates(model, quiet(model, groups=[{"params": model.parameters()}]))
    assert found.keys() == trainable(model)


def test_a_part_of_the_model_may_be_in_no_group():
    model = LlamaLM(64, layers=1)
    assert rates(model, quiet(model, groups=[{"params": model.head.parameters()}])).keys() == {"head.weight"}
    assert quiet(model, groups=[]) == []
    assert quiet(model, groups=[{"params": []}]) == []


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_however_the_model_is_split_each_parameter_is_scaled_once_and_by_its_kind(data: st.DataObject):
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Conv1d(1, 2, 3), nn.Linear(8, 2))
    for parameter in model.parameters():
        parameter.requires_grad_(data.draw(st.booleans()))
    owner = [data.draw(st.integers(0, 2)) for _ in model.parameters()]
    parts = [[p for p, mine in zip(model.parameters(), owner, strict=True) if mine == k] for k in range(3)]
    own = [0.1, 0.2, 0.3]
    groups = [{"params": part, "lr": lr} for part, lr in zip(parts, own, strict=True)]
    found = rates(model, quiet(model, base_width=1, width=4, groups=groups))
    expected = {}
    for (name, parameter), mine in zip(model.named_parameters(), owner, strict=True):
        if parameter.requires_grad:
            matrix = name in {"1.weight", "4.weight"}
            expected[name] = (own[mine] / 4, 0.2) if matrix else (own[mine], 0.0)
    assert found == {name: pytest.approx(pair) for name, pair in expected.items()}


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 0}, r"got width=0; expected the model's width, at least 1"),
        ({"width": -64}, r"got width=-64; expected"),
        ({"width": 0.5}, r"got width=0.5; expected"),
        ({"width": NAN}, r"got width=nan; expected"),
        ({"width": INF}, r"got width=inf; expected"),
        ({"base_width": 0}, r"got base_width=0; expected the width it was tuned at, at least 1"),
        ({"base_width": -16}, r"got base_width=-16; expected"),
        ({"base_width": NAN}, r"got base_width=nan; expected"),
        ({"base_width": INF}, r"got base_width=inf; expected"),
        ({"lr": -0.1}, r"got lr=-0.1; expected what was tuned at width 16, 0 or more"),
        ({"lr": NAN}, r"got lr=nan; expected"),
        ({"lr": INF}, r"got lr=inf; expected"),
        ({"weight_decay": -0.1}, r"got weight_decay=-0.1; expected what was tuned at width 16"),
        ({"weight_decay": NAN}, r"got weight_decay=nan; expected"),
        ({"weight_decay": INF}, r"got weight_decay=inf; expected"),
    ],
    ids=str,
)
def test_numbers_that_cannot_work_are_refused(arguments: dict[str, Any], message: str):
    with pytest.raises(ConfigurationError, match=message):
        quiet(LlamaLM(64, layers=1), **arguments)


@pytest.mark.parametrize(
    "setting", [{"lr": NAN}, {"lr": INF}, {"lr": -0.1}, {"weight_decay": NAN}, {"weight_decay": -1.0}]
)
def test_numbers_of_own_groups_that_cannot_work_are_refused(setting: dict[str, float]):
    """AdamW checks its defaults only, not the groups'."""
    model = LlamaLM(64, layers=1)
    with pytest.raises(ConfigurationError, match=rf"got .*{next(iter(setting))}.*expected"):
        quiet(model, groups=[{"params": model.parameters(), **setting}])


@pytest.mark.parametrize("width", [0, -1, NAN])
def test_classify_refuses_such_a_width(width: float):
    with pytest.raises(ConfigurationError, match="got width="):
        classify(nn.Linear(4, 4), width)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "given", [lambda model: model.parameters(), lambda model: [{"params": []}], lambda model: None]
)
def test_what_is_no_model_is_refused(given: Callable[[nn.Module], Any]):
    with pytest.raises(ConfigurationError, match=r"as model; expected a torch.nn.Module.* go into groups="):
        quiet(given(nn.Linear(4, 4)))


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(lambda model: model.parameters(), id="parameters"),
        pytest.param(lambda model: list(model.parameters()), id="a list of parameters"),
        pytest.param(lambda model: {"params": model.parameters()}, id="one group, not in a list"),
        pytest.param(lambda model: [{"lr": 0.1}], id="a group without parameters"),
    ],
)
def test_what_are_no_groups_is_refused(given: Callable[[nn.Module], Any]):
    model = nn.Linear(64, 64)
    with pytest.raises(ConfigurationError, match=r"got .*group.*expected"):
        quiet(model, groups=given(model))


def test_groups_that_are_scaled_already_are_refused():
    model = LlamaLM(64, layers=1)
    groups = quiet(model)
    optimizer = torch.optim.AdamW(groups)
    renamed = [{**group, "name": f"mine {k}"} for k, group in enumerate(groups)]
    for again, name in ((groups, "matrix-like"), (optimizer.param_groups, "matrix-like"), (renamed, "mine 0")):
        with pytest.raises(ConfigurationError, match="scaled already, by a width 4 times the base; expected") as caught:
            quiet(model, groups=again)
        assert f"group 0 ('{name}')" in str(caught.value)
        assert "width 16" in str(caught.value)


def test_one_scaled_group_among_others_is_refused():
    model = LlamaLM(64, layers=1)
    inner, outer = split(model)
    scaled = quiet(model, groups=[{"params": inner, "name": "blocks"}])
    with pytest.raises(ConfigurationError, match=r"group 2 \('blocks vector-like'\), which is scaled already"):
        quiet(model, groups=[{"params": outer}, {"params": [scaled[0]["params"][0]]}, scaled[1]])


def test_scaled_groups_are_refused_at_the_same_width_too():
    model = LlamaLM(64, layers=1)
    with pytest.raises(ConfigurationError, match="scaled already, by a width 1 times the base"):
        quiet(model, groups=quiet(model, base_width=64))


def test_parameters_of_another_model_are_refused():
    model, other = LlamaLM(64, layers=1), LlamaLM(64, layers=2)
    groups = [{"params": model.head.parameters()}, {"params": [model.norm.weight, *other.parameters()]}]
    with pytest.raises(ConfigurationError, match="group 1 with 21 parameters that LlamaLM does not have") as caught:
        quiet(model, groups=groups)
    assert "(256, 64)" in str(caught.value)
    assert "expected groups over the model's own" in str(caught.value)


def test_a_lazy_parameter_is_refused():
    with pytest.raises(ConfigurationError, match=r"lazy parameter 'weight'.*expected one with a shape"):
        quiet(nn.LazyLinear(64))


# What is printed -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=[80, 120])
def columns(request: pytest.FixtureRequest) -> Iterator[int]:
    """rich's own console, so many columns wide."""
    own = rich.get_console()
    kept = dict(own.__dict__)
    rich.reconfigure(width=request.param, force_terminal=False)
    yield request.param
    own.__dict__ = kept


@pytest.fixture
def written(columns: int, capsys: pytest.CaptureFixture[str]) -> Callable[[], list[str]]:
    """The lines written to stdout since the last call; none is too long."""

    def lines() -> list[str]:
        out, err = capsys.readouterr()
        assert err == ""
        found = [line.rstrip() for line in out.splitlines()]
        assert all(len(line) <= columns for line in found)
        return found

    return lines


def show(model: nn.Module, **arguments: Any) -> list[dict[str, Any]]:
    return quiet(model, **{"show": True, **arguments})


def test_one_row_for_all_that_differ_in_numbers_only(written: Callable[[], list[str]]):
    show(LlamaLM(64, layers=3))
    assert [" ".join(line.split()) for line in written()] == [
        "From width 16 to 64",
        "parameters shape taken for lr decay because",
        "embedding.weight 256×64 vector-like 0.02 0 embedding",
        "blocks.*.norm_attention.weight ×3 64 vector-like 0.02 0 vector",
        "blocks.*.norm_feedforward.weight ×3 64 vector-like 0.02 0 vector",
        *(
            f"blocks.*.{name}.weight ×3 {shape} matrix-like 0.005 0.2 fan-in {fan_in}"
            for name, shape, fan_in in (
                ("query", "64×64", 64),
                ("key", "64×64", 64),
                ("value", "64×64", 64),
                ("out", "64×64", 64),
                ("gate", "170×64", 64),
                ("up", "170×64", 64),
                ("down", "64×170", 170),
            )
        ),
        "norm.weight 64 vector-like 0.02 0 vector",
        "head.weight 256×64 matrix-like 0.005 0.2 fan-in 64",
    ]


@pytest.mark.usefixtures("columns")
def test_nothing_is_printed_unasked(written: Callable[[], list[str]]):
    quiet(LlamaLM(64, layers=1))
    classify(LlamaLM(64, layers=1), 64)
    assert written() == []


def test_it_is_printed_by_default(written: Callable[[], list[str]]):
    transfer(nn.Linear(64, 64), base_width=16, width=64, lr=0.02, weight_decay=0.1)
    assert len(written()) == 4


def test_rows_that_differ_in_more_than_numbers_stand_apart(written: Callable[[], list[str]]):
    model = nn.Sequential(
        nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 128), nn.Linear(128, 64), nn.LayerNorm(64)
    )
    show(model, vector_like=["1.weight"])
    weights = [line.split()[:-1] for line in written() if line.startswith("*.weight")]
    assert weights == [
        ["*.weight", "64×64", "matrix-like", "0.005", "0.2", "fan-in"],
        ["*.weight", "64×64", "vector-like", "0.02", "0", "as", "you"],
        ["*.weight", "128×64", "matrix-like", "0.005", "0.2", "fan-in"],
        ["*.weight", "64×128", "matrix-like", "0.005", "0.2", "fan-in"],
        ["*.weight", "64", "vector-like", "0.02", "0"],
    ]


def test_numbers_within_a_name_are_part_of_it(written: Callable[[], list[str]]):
    show(nn.ModuleDict({"conv1": nn.Linear(64, 64, bias=False), "conv2": nn.Linear(64, 64, bias=False)}))
    assert [line.split()[0] for line in written()[2:]] == ["conv1.weight", "conv2.weight"]


def test_what_is_in_no_group_says_so(written: Callable[[], list[str]]):
    model = LlamaLM(64, layers=1)
    show(model, groups=[{"params": model.head.parameters(), "lr": 0.4}])
    lines = written()
    assert sum("in no group" in line for line in lines) == len(trainable(model)) - 1
    (head,) = (line for line in lines if line.startswith("head.weight"))
    assert head.split()[3:5] == ["0.1", "0.2"]


def test_frozen_parameters_have_no_row(written: Callable[[], list[str]]):
    model = LlamaLM(64, layers=1)
    model.embedding.requires_grad_(False)
    show(model)
    assert not any("embedding" in line for line in written())


def first_column(lines: list[str], heading: str, following: str) -> str:
    """All that stands in the first column, folded lines put together again."""
    (head,) = (line for line in lines if line.startswith(heading))
    edge = head.index(following)
    return "".join(line[:edge].strip() for line in lines[lines.index(head) + 1 :])


def nested(path: str, module: nn.Module) -> nn.Module:
    """A model whose one module is at this path."""
    for part in reversed(path.split(".")):
        outer = nn.Module()
        outer.add_module(part, module)
        module = outer
    return module


LONG = "model.vision_tower.vision_model.encoder.layers.23.self_attn.out_proj"


def test_long_names_are_folded_not_cut(written: Callable[[], list[str]], columns: int):
    show(nested(LONG, nn.Linear(64, 64, bias=False)))
    lines = written()
    assert "…" not in "".join(lines)
    text = "".join(line[: lines[1].index("shape")].replace("×1", "").strip() for line in lines[2:])
    assert text == f"{LONG.replace('23', '*')}.weight"
    if columns == 120:
        assert len(lines) == 3, "there is room for it"
    assert "64×64" in lines[2]
    assert "matrix-like" in lines[2]
    assert "fan-in 64" in lines[2]


def test_a_name_is_no_markup(written: Callable[[], list[str]]):
    model = nn.Module()
    model.register_parameter("w[red]", nn.Parameter(torch.randn(64, 64)))
    show(model)
    assert any(line.startswith("w[red] ") for line in written())


# Comparing spectra ---------------------------------------------------------------------------------------------------


def snapshot_of(values: Mapping[str, float], metric: str = SIGMA) -> Snapshot:
    run = RunInfo("run-1", "0.1", "float32", "single", 1)
    return Snapshot(7, 0.0, run, {Series(metric, (layer,)): value for layer, value in values.items()}, {})


def trained(width: int) -> tuple[nn.Module, redline.Session]:
    """A small model and the session of one step of it, closed."""
    torch.manual_seed(width)
    model = nn.Sequential(OrderedDict(first=nn.Linear(5, width), second=nn.Linear(width, width)))
    optimizer = torch.optim.AdamW(quiet(model, base_width=16, width=width))
    with redline.attach(model, optimizer, monitors=[redline.WeightSpectrum(1)]) as session:
        model(torch.randn(8, 5)).square().mean().backward()
        optimizer.step()
    return model, session


def test_sessions_snapshots_and_mappings_compare_alike():
    (narrow, one), (wide, other) = trained(16), trained(64)
    exact = [
        {
            name: torch.linalg.svdvals(p.detach().double())[0].item()
            for name, p in model.named_parameters()
            if p.dim() > 1
        }
        for model in (narrow, wide)
    ]
    by_session = compare_spectra(one, other)
    assert by_session == compare_spectra(one.latest, other.latest) == compare_spectra(one, other.latest)
    assert by_session == compare_spectra(one.latest.layers(SIGMA), other.latest.layers(SIGMA))
    for found in (by_session, compare_spectra(one, exact[1]), compare_spectra(*exact)):
        assert {layer.layer for layer in found.layers} == {"first.weight", "second.weight"}
        for layer in found.layers:
            reference, run = (sigma[layer.layer] for sigma in exact)
            assert layer.reference == pytest.approx(reference, rel=1e-3)
            assert layer.run == pytest.approx(run, rel=1e-3)
            assert layer.ratio == pytest.approx(run / reference, rel=1e-3)


def test_figures_and_verdict():
    found = compare_spectra({"a": 2.0, "b": 4.0, "c": 1.0}, {"a": 2.0, "b": 3.0, "c": 1.5}, tolerance=0.25)
    assert [(one.layer, one.reference, one.run, one.ratio) for one in found.layers] == [
        ("c", 1.0, 1.5, 1.5),
        ("b", 4.0, 3.0, 0.75),
        ("a", 2.0, 2.0, 1.0),
    ]
    assert (found.median_ratio, found.tolerance, found.matches, found.unmatched) == (1.0, 0.25, False, ())


def test_the_worst_match_comes_first_on_either_side():
    found = compare_spectra(dict.fromkeys("abcd", 1.0), {"a": 1.9, "b": 0.5, "c": 1.0, "d": 2.1})
    assert [one.layer for one in found.layers] == ["d", "b", "a", "c"]
    assert found.median_ratio == pytest.approx(1.45)


@pytest.mark.parametrize(
    ("run", "tolerance", "matches"),
    [
        ({"a": 1.0, "b": 1.0}, 0.0, True),
        ({"a": 1.25, "b": 0.75}, 0.25, True),
        ({"a": 1.26, "b": 1.0}, 0.25, False),
        ({"a": 1.0, "b": 0.74}, 0.25, False),
        ({"a": 1.09, "b": 0.91}, None, True),
        ({"a": 1.11, "b": 1.0}, None, False),
        ({"a": 1.0, "b": 0.89}, None, False),
    ],
)
def test_a_match_is_every_layer_within_the_tolerance(run: dict[str, float], tolerance: float | None, matches: bool):
    given = {} if tolerance is None else {"tolerance": tolerance}
    assert compare_spectra({"a": 1.0, "b": 1.0}, run, **given).matches is matches


def test_layers_of_one_run_only_are_named_and_change_no_verdict():
    found = compare_spectra({"a": 1.0, "b": 1.0}, {"c": 9.0, "a": 1.0})
    assert [one.layer for one in found.layers] == ["a"]
    assert found.unmatched == ("b", "c")
    assert found.matches


@pytest.mark.parametrize(
    ("layers", "expected", "unmatched"),
    [
        (["head"], {"head"}, ()),
        ("head", {"head"}, ()),
        (["blocks.*.up"], {"blocks.0.up", "blocks.1.up"}, ()),
        (["blocks.*", "head"], {"blocks.0.up", "blocks.1.up", "head"}, ("blocks.2.up",)),
        ("blocks.?.up", {"blocks.0.up", "blocks.1.up"}, ("blocks.2.up",)),
        (None, {"blocks.0.up", "blocks.1.up", "head"}, ("blocks.2.up", "tail")),
    ],
)
def test_layers_can_be_chosen_by_name_and_pattern(layers: Any, expected: set[str], unmatched: tuple[str, ...]):
    deeper = "blocks.2.up" in unmatched
    reference = {"blocks.0.up": 1.0, "blocks.1.up": 1.0, "head": 1.0} | ({"blocks.2.up": 1.0} if deeper else {})
    found = compare_spectra(
        reference, {"tail": 1.0, "head": 5.0, "blocks.1.up": 1.0, "blocks.0.up": 1.0}, layers=layers
    )
    assert {one.layer for one in found.layers} == expected
    assert found.unmatched == unmatched
    assert found.matches is ("head" not in expected)


def test_the_matrix_like_layers_of_a_model_can_be_chosen_by_classify():
    """As its documentation says."""
    model = LlamaLM(32, layers=1)
    sigma = {name: 1.0 for name, p in model.named_parameters() if p.dim() > 1}
    chosen = [one.name for one in classify(model, 32).values() if one.kind == "matrix-like"]
    found = compare_spectra(sigma, {**sigma, "embedding.weight": 5.0}, layers=chosen)
    assert {one.layer for one in found.layers} == LLAMA_BLOCK | {"head.weight"}
    assert found.matches


def test_stacked_experts_can_be_chosen_by_classify():
    """Their matrices are measured as ``name[e]``, which the parameter's name has to stand for."""
    model = Experts(16)
    optimizer = torch.optim.AdamW(quiet(model, base_width=16, width=16))
    with redline.attach(model, optimizer, monitors=[redline.WeightSpectrum(1)]) as session:
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
    chosen = [one.name for one in classify(model, 16).values() if one.kind == "matrix-like"]
    found = compare_spectra(session, session, layers=chosen)
    experts = {f"{name}[{e}]" for name in ("up", "down") for e in range(4)}
    assert {one.layer for one in found.layers} == experts | {"router.weight"}


def test_a_matrix_of_a_stack_can_be_chosen_by_its_name():
    sigma = {"up[0]": 1.0, "up[1]": 1.0}
    assert [one.layer for one in compare_spectra(sigma, sigma, layers=["up[1]"]).layers] == ["up[1]"]
    assert {one.layer for one in compare_spectra(sigma, sigma, layers=["up*"]).layers} == {"up[0]", "up[1]"}


def test_a_matrix_that_fell_to_zero_does_not_match_and_comes_first():
    found = compare_spectra({"a": 1.0, "b": 1.0, "c": 1.0}, {"a": 1.0, "b": 0.0, "c": 3.0})
    assert [(one.layer, one.ratio) for one in found.layers] == [("b", 0.0), ("c", 3.0), ("a", 1.0)]
    assert not found.matches


def test_a_matrix_that_was_zero_does_not_match_and_comes_first():
    found = compare_spectra({"a": 1.0, "b": 0.0, "c": 1.0}, {"a": 1.0, "b": 1.0, "c": 3.0})
    assert [(one.layer, one.ratio) for one in found.layers] == [("b", INF), ("c", 3.0), ("a", 1.0)]
    assert not found.matches


@pytest.mark.parametrize("value", [NAN, INF])
def test_what_is_not_finite_does_not_match_and_comes_first(value: float):
    for reference, run in itertools.permutations([{"a": 1.0, "b": 1.0}, {"a": 1.0, "b": value}]):
        found = compare_spectra(reference, run)
        assert found.layers[0].layer == "b"
        assert not found.matches


@pytest.mark.parametrize("order", list(itertools.permutations("abc")))
def test_one_nan_does_not_shift_the_median_of_the_others(order: tuple[str, ...]):
    """It may be NaN itself, or the others' median: no third number."""
    run = {"a": NAN, "b": 3.0, "c": 1.0}
    found = compare_spectra(dict.fromkeys(order, 1.0), {name: run[name] for name in order})
    assert math.isnan(found.median_ratio) or found.median_ratio == 2.0


sigmas = st.dictionaries(st.sampled_from("abcdefg"), st.floats(1e-6, 1e6), min_size=1)


@settings(deadline=None)
@given(reference=sigmas, run=sigmas, tolerance=st.floats(0, 1))
def test_comparisons_against_their_definition(reference: dict[str, float], run: dict[str, float], tolerance: float):
    common = reference.keys() & run.keys()
    if not common:
        with pytest.raises(ConfigurationError, match="no layer to compare"):
            compare_spectra(reference, run)
        return
    found = compare_spectra(reference, run, tolerance=tolerance)
    ratios = {name: run[name] / reference[name] for name in common}
    assert {one.layer: one.ratio for one in found.layers} == ratios
    assert set(found.unmatched) == reference.keys() ^ run.keys()
    assert found.matches == all(1 - tolerance <= ratio <= 1 + tolerance for ratio in ratios.values())
    assert found.median_ratio == statistics.median(ratios.values())
    off = [max(one.ratio, 1 / one.ratio) for one in found.layers]
    assert all(worse >= better * (1 - 1e-12) for worse, better in itertools.pairwise(off))


def test_it_is_plain_data():
    found = compare_spectra({"a": 1.0, "b": 2.0, "d": 1.0}, {"a": 1.0, "b": 3.0, "c": 1.0}, tolerance=0.25)
    assert json.loads(json.dumps(found.to_dict())) == {
        "layers": [
            {"layer": "b", "reference": 2.0, "run": 3.0, "ratio": 1.5},
            {"layer": "a", "reference": 1.0, "run": 1.0, "ratio": 1.0},
        ],
        "unmatched": ["d", "c"],
        "tolerance": 0.25,
        "median_ratio": 1.25,
        "matches": False,
    }
    _, session = trained(16)
    json.dumps(compare_spectra(session, session).to_dict())


@pytest.mark.parametrize(
    "empty", [{}, snapshot_of({}), snapshot_of({"a": 1.0}, "redline_update_spectral_norm")], ids=str
)
def test_spectra_that_were_not_measured_are_refused(empty: Any):
    for pair, what in (((empty, {"a": 1.0}), "reference"), (({"a": 1.0}, empty), "run")):
        with pytest.raises(ConfigurationError, match=f"got a {what} without spectra; expected {SIGMA}") as caught:
            compare_spectra(*pair)
        assert "redline.WeightSpectrum()" in str(caught.value)


def test_a_session_that_measured_no_spectra_is_refused():
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    with redline.attach(model, optimizer, monitors=[redline.StepHealth()]) as session:
        model(torch.randn(2, 4)).sum().backward()
        optimizer.step()
    with pytest.raises(ConfigurationError, match="got a run without spectra"):
        compare_spectra({"weight": 1.0}, session)


def test_nothing_in_common_is_refused():
    with pytest.raises(ConfigurationError, match="got no layer to compare") as caught:
        compare_spectra({"a": 1.0, "b": 1.0}, {"c": 1.0})
    assert "2 in the reference (such as 'a'), 1 in the run (such as 'c'); expected common names." in str(caught.value)


@pytest.mark.parametrize("layers", [["c"], [], "b*"])
def test_a_choice_that_leaves_nothing_is_refused(layers: Any):
    with pytest.raises(ConfigurationError, match=r"no layer to compare.*expected common names among layers="):
        compare_spectra({"a": 1.0}, {"a": 1.0, "b": 1.0}, layers=layers)


@pytest.mark.parametrize("tolerance", [-0.1, NAN])
def test_a_tolerance_that_nothing_can_meet_is_refused(tolerance: float):
    with pytest.raises(ConfigurationError, match="got tolerance="):
        compare_spectra({"a": 1.0}, {"a": 1.0}, tolerance=tolerance)


def test_the_comparison_prints_itself(written: Callable[[], list[str]]):
    found = compare_spectra(
        {"blocks.0.down.weight": 1.0, "blocks.1.down.weight": 2.0, "a": 1.0, "head.weight": 3.0},
        {"blocks.0.down.weight": 1.05, "blocks.1.down.weight": 1.0, "b[0]": 1.0, "head.weight": 3.0},
    )
    rich.print(found)
    lines = [" ".join(line.split()) for line in written()]
    title = " ".join(lines[: lines.index("layer reference run ratio")])
    assert title == "Top singular values: 2 of 3 match within 10%, the median ratio is 1"
    assert lines[lines.index("layer reference run ratio") + 1 :] == [
        "blocks.1.down.weight 2 1 ×0.5",
        "blocks.0.down.weight 1 1.05 ×1.05",
        "head.weight 3 3 ×1",
        "a only in one",
        "b[0] only in one",
    ]


def test_the_tolerance_is_printed_and_counts(written: Callable[[], list[str]]):
    rich.print(compare_spectra({"a": 1.0, "b": 1.0}, {"a": 1.2, "b": 1.0}, tolerance=0.25))
    assert "2 of 2 match within 25%" in " ".join(" ".join(written()).split())


def test_long_names_of_layers_are_folded_not_cut(written: Callable[[], list[str]]):
    sigma = {f"{LONG}.parametrizations.weight.original1": 1.0}
    rich.print(compare_spectra(sigma, sigma))
    lines = written()
    assert "…" not in "".join(lines)
    assert first_column(lines, "layer", "reference") == next(iter(sigma))


def test_values_that_are_not_finite_can_be_printed(written: Callable[[], list[str]]):
    rich.print(compare_spectra({"a": 1.0, "b": 0.0}, {"a": NAN, "b": 1.0}))
    assert any("nan" in line for line in written())


def test_what_matches_is_green_and_what_does_not_is_yellow():
    own = rich.get_console()
    kept = dict(own.__dict__)
    written = io.StringIO()
    rich.reconfigure(width=80, file=written, force_terminal=True, color_system="standard")
    try:
        rich.print(compare_spectra({"match": 1.0, "differ": 1.0}, {"match": 1.0, "differ": 2.0}))
    finally:
        own.__dict__ = kept
    assert "\x1b[32mmatch" in written.getvalue()
    assert "\x1b[33mdiffer" in written.getvalue()
