"""Transfer to another width: which parameters are matrix-like, overrides, and the numbers they get."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scaling_models import (
    LLAMA_BLOCK,
    Tied,
    cases,
    convolutional,
    matrix_like,
    quiet,
    rates,
    seeded,  # noqa: F401 around every test
    trainable,
)
from torch import nn
from torch.nn.utils import parametrizations

from redline import ConfigurationError
from redline.integrations.demo.models import DigitsTransformer, LlamaLM
from redline.scaling import ScaledParameter, classify


class With(nn.Module):
    """A module with one parameter, ``p``, of a shape."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.randn(shape))


# Which parameters are matrix-like ------------------------------------------------------------------------------------


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
    ids=lambda given: "_".join(sorted(given)) or "none" if isinstance(given, set) else str(given),
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
