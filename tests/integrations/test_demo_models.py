"""The demo's small LLaMA: causal, rotary, initialized as muP asks, and within reach of forward-mode AD."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from redline.integrations.demo.models import ByteLM, DigitsTransformer, LlamaBlock, LlamaLM
from redline.numerics import logit_tangent

WIDTHS = (32, 64, 128, 256)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def stirred(model: nn.Module) -> nn.Module:
    """The model in float64 with noise on every parameter: its readout, too, is no longer 0."""
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def some_bytes(*shape: int) -> Tensor:
    return torch.randint(256, shape)


def gain(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


# Shapes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [16, 32, 64])
@pytest.mark.parametrize("time", [1, 5, 64])
def test_logits_of_every_position(width: int, time: int):
    logits = LlamaLM(width, layers=1)(some_bytes(3, time))
    assert logits.shape == (3, time, 256)
    assert logits.dtype == torch.float32


def test_depth_width_of_heads_and_context_are_as_asked():
    model = LlamaLM(48, layers=3, head_width=8, context=20)
    assert len(model.blocks) == 3
    assert model.rotation.shape == (2, 20, 4)
    block = model.blocks[0]
    assert [tuple(one.weight.shape) for one in (block.query, block.key, block.value, block.out)] == [(48, 48)] * 4
    assert [tuple(one.weight.shape) for one in (block.gate, block.up, block.down)] == [(128, 48), (128, 48), (48, 128)]
    assert model(some_bytes(1, 20)).shape == (1, 20, 256)


def test_nothing_but_matrices_gains_and_the_embedding():
    names = {name for name, _ in LlamaLM(32, layers=1).named_parameters()}
    assert names == {
        "embedding.weight",
        "norm.weight",
        "head.weight",
        *(f"blocks.0.{norm}.weight" for norm in ("norm_attention", "norm_feedforward")),
        *(f"blocks.0.{matrix}.weight" for matrix in ("query", "key", "value", "out", "gate", "up", "down")),
    }
    assert LlamaLM(32).state_dict().keys() == dict(LlamaLM(32).named_parameters()).keys()  # no table of angles


# Causal --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [LlamaLM, ByteLM])
@pytest.mark.parametrize("changed", [1, 6, 11])
def test_a_byte_changes_no_logits_before_it_and_all_from_it_on(build: type[nn.Module], changed: int):
    model = stirred(build(32))
    before = some_bytes(2, 12)
    after = before.clone()
    after[:, changed] = (after[:, changed] + 1) % 256
    with torch.no_grad():
        moved = (model(after) - model(before)).abs().amax(dim=-1)
    assert moved[:, :changed].max() < 1e-12
    assert moved[:, changed:].min() > 1e-9


def test_the_readouts_gradient_reaches_every_parameter():
    model = stirred(LlamaLM(32))
    F.cross_entropy(model(some_bytes(2, 9)).flatten(0, 1), some_bytes(18)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_samples_do_not_mix():
    model, tokens = stirred(LlamaLM(32)), some_bytes(3, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)[1:2], model(tokens[1:2]))


# Rotary --------------------------------------------------------------------------------------------------------------


def test_angles_are_those_of_the_paper():
    model = LlamaLM(32, head_width=8, context=40)
    for time in (0, 1, 39):
        for pair in range(4):
            angle = time * 10_000 ** (-2 * pair / 8)
            assert model.rotation[0, time, pair].item() == pytest.approx(math.cos(angle), abs=1e-5)
            assert model.rotation[1, time, pair].item() == pytest.approx(math.sin(angle), abs=1e-5)


def rotary_block() -> tuple[LlamaBlock, Tensor]:
    """A block of three heads, and a table of angles that is exact in float64."""
    model = stirred(LlamaLM(48, layers=1, head_width=16))
    angles = torch.outer(
        torch.arange(64, dtype=torch.float64), 10_000 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    )
    return model.blocks[0], torch.stack([angles.cos(), angles.sin()])


@pytest.mark.parametrize("shift", [1, 7, 50])
def test_only_relative_positions_count(shift: int):
    block, rotation = rotary_block()
    x = torch.randn(2, 12, 48, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(block(x, rotation[:, shift : shift + 12]), block(x, rotation[:, :12]))


def test_positions_do_count():
    block, rotation = rotary_block()
    x = torch.randn(2, 12, 48, dtype=torch.float64)
    with torch.no_grad():
        stretched, still = block(x, rotation[:, :36:3]), block(x, rotation[:, :1].expand(-1, 12, -1))
        turned = block(x, rotation[:, :12])
    assert (turned - stretched).abs().max() > 1e-3
    assert (turned - still).abs().max() > 1e-3


def test_the_order_of_earlier_bytes_counts():
    model, tokens = stirred(LlamaLM(32)), torch.tensor([[1, 2, 3, 4, 5]])
    with torch.no_grad():
        moved = model(tokens[:, [1, 0, 2, 3, 4]])[:, -1] - model(tokens)[:, -1]
    assert moved.abs().max() > 1e-6


def test_attention_against_one_written_out_in_full():
    block, rotation = rotary_block()
    x = torch.randn(1, 6, 48, dtype=torch.float64)

    def turned(vector: Tensor, time: int) -> Tensor:
        pairs = torch.view_as_complex(vector.reshape(-1, 2).contiguous())
        return torch.view_as_real(pairs * torch.complex(rotation[0, time], rotation[1, time])).reshape(-1)

    with torch.no_grad():
        normed = block.norm_attention(x)[0]
        mixed = torch.zeros(6, 48, dtype=torch.float64)
        for head in (slice(0, 16), slice(16, 32), slice(32, 48)):
            q, k, v = (one(normed)[:, head] for one in (block.query, block.key, block.value))
            for i in range(6):
                scores = torch.stack([turned(q[i], i) @ turned(k[j], j) / math.sqrt(16) for j in range(i + 1)])
                mixed[i, head] = scores.softmax(0) @ v[: i + 1]
        attended = x[0] + block.out(mixed)
        normed = block.norm_feedforward(attended)
        gated = torch.sigmoid(block.gate(normed)) * block.gate(normed) * block.up(normed)
        torch.testing.assert_close(block(x, rotation[:, :6])[0], attended + block.down(gated))


# Initialization ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", WIDTHS)
def test_hidden_matrices_start_at_variance_one_over_fan_in(width: int):
    for name, parameter in LlamaLM(width).blocks.named_parameters():
        if parameter.dim() == 2:
            variance = parameter.var().item() * parameter.shape[1]
            assert variance == pytest.approx(1, abs=5 * math.sqrt(2 / parameter.numel())), name  # 5 standard errors
            assert abs(parameter.mean().item()) < 5 / math.sqrt(parameter.numel() * parameter.shape[1]), name


@pytest.mark.parametrize("width", WIDTHS)
def test_embeddings_start_at_variance_one_gains_at_one_and_the_readout_at_zero(width: int):
    model = LlamaLM(width)
    variance = model.embedding.weight.var().item()
    assert variance == pytest.approx(1, abs=5 * math.sqrt(2 / model.embedding.weight.numel()))
    assert all((p == 1).all() for name, p in model.named_parameters() if "norm" in name)
    assert not model.head.weight.any()
    logits = model(some_bytes(2, 8)).flatten(0, 1)
    assert F.cross_entropy(logits, some_bytes(16)).item() == pytest.approx(math.log(256))


def test_widths_differ_in_nothing_that_grows():
    """What a block adds to the residual stream is of the same size at every width."""
    gains = []
    for width in WIDTHS:
        model = LlamaLM(width, layers=1)
        x = torch.randn(8, 32, width)
        with torch.no_grad():
            gains.append(gain(model.blocks[0](x, model.rotation[:, :32]) - x))
    assert max(gains) / min(gains) < 1.25


# Forward-mode AD -----------------------------------------------------------------------------------------------------


def differentiated(model: nn.Module, tokens: Tensor, direction: dict[str, Tensor], h: float = 1e-6) -> Tensor:
    """A central difference in float64."""
    ends = []
    for sign in (1, -1):
        point = {name: p + sign * h * direction[name] for name, p in model.named_parameters()}
        with torch.no_grad():
            ends.append(torch.func.functional_call(model, point, (tokens,)))
    return (ends[0] - ends[1]) / (2 * h)


@pytest.mark.parametrize("build", [LlamaLM, ByteLM])
def test_logit_tangents_by_forward_mode(build: type[nn.Module]):
    model, tokens = stirred(build(32)), some_bytes(2, 10)
    direction = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    with sdpa_kernel(SDPBackend.MATH):  # torch has no forward-mode rule for the fused attention
        found = logit_tangent(model, (tokens,), {}, direction, method="forward_mode")
    assert found.method == "forward_mode"
    torch.testing.assert_close(found.tangent, differentiated(model, tokens, direction), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.logits, model(tokens).detach())


@pytest.mark.parametrize("build", [LlamaLM, ByteLM])
def test_no_logit_tangent_falls_back_to_a_finite_difference(build: type[nn.Module]):
    model, tokens = build(32), some_bytes(2, 10)
    direction = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    assert logit_tangent(model, (tokens,), {}, direction).method in ("forward_mode", "math_attention")


# The others ----------------------------------------------------------------------------------------------------------


def test_logits_of_the_digits():
    assert DigitsTransformer(16, layers=1)(torch.rand(5, 64)).shape == (5, 10)


def test_the_rows_of_a_digit_are_told_apart():
    model, x = stirred(DigitsTransformer(16, layers=1)), torch.rand(1, 64, dtype=torch.float64)
    with torch.no_grad():
        assert (model(x) - model(x.view(8, 8).flip(0).view(1, 64))).abs().max() > 1e-4


def test_dropout_is_for_training_only():
    model, tokens = ByteLM(32, layers=1, dropout=0.5), some_bytes(2, 10)
    with torch.no_grad():
        assert not torch.equal(model(tokens), model(tokens))
        model.eval()
        assert torch.equal(model(tokens), model(tokens))
