"""What is seen of layers in a forward-mode pass, against float64 differences of what ordinary hooks capture."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from redline.numerics import logit_tangent
from redline.numerics.layer_radii import SINGULARITIES
from redline.numerics.layer_recorder import LayerSteps


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


class Tapped(nn.Module):
    """Hand-written attention and functions in its own forward; taps let ordinary hooks see what goes into them."""

    def __init__(self):
        super().__init__()
        self.first, self.relu = nn.Linear(6, 8), nn.ReLU(inplace=True)
        self.q, self.k, self.up, self.head = (nn.Linear(8, 8) for _ in range(4))
        self.tap_relu, self.tap_scores, self.tap_gelu, self.tap_glu = (nn.Identity() for _ in range(4))

    def forward(self, x):
        x = self.relu(self.tap_relu(self.first(x)))
        scores = self.tap_scores(self.q(x) @ self.k(x).transpose(-2, -1) / 3)
        x = x + torch.softmax(scores, -1) @ x
        x = x + F.gelu(self.tap_gelu(self.up(x)), approximate="tanh")
        return F.glu(self.tap_glu(self.head(x)).mean(1))


def by_difference(model: nn.Module, x: Tensor, direction: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """What went through each tap, and its derivative along the direction, in float64."""
    ends: list[dict[str, Tensor]] = [{}, {}, {}]
    for seen, t in zip(ends, (0.0, 1e-6, -1e-6), strict=True):
        moved = copy.deepcopy(model).double()
        for name, tap in moved.named_children():

            def keep(_: nn.Module, args: tuple[Tensor], __: Tensor, name: str = name, seen: dict = seen) -> None:
                seen[name] = args[0].detach().clone()

            tap.register_forward_hook(keep)
        with torch.no_grad():
            for name, parameter in moved.named_parameters():
                parameter += t * direction[name]
            moved(x.double())
    return {name: (ends[0][name], (ends[1][name] - ends[2][name]) / 2e-6) for name in ends[0]}


def smallest(h: Tensor, dh: Tensor, distance: Callable[[Tensor], Tensor], q: float) -> float:
    radii = sorted((distance(h) / dh.abs()).flatten().tolist())
    return 1 / radii[max(math.ceil(q * len(radii)), 1) - 1]


def test_layers_of_a_model_agree_with_float64_differences():
    model, x = Tapped(), torch.randn(7, 3, 6)
    direction = {name: 0.05 * torch.randn_like(parameter) for name, parameter in model.named_parameters()}
    layers = logit_tangent(model, (x,), None, direction, layers=True).layers
    assert layers is not None
    assert layers.failures == {}
    taps = by_difference(model, x, direction)
    roots = torch.tensor(SINGULARITIES[F.gelu](x, approximate="tanh"), dtype=torch.complex128)
    for q in (0.01, 0.2):
        sizes = {name: size.item() for name, size in layers.activation(q).items()}
        gate = (part.mean(1).chunk(2, -1)[1] for part in taps["tap_glu"])
        assert sizes == pytest.approx(
            {
                "relu": smallest(*taps["tap_relu"], torch.abs, q),
                "Tapped": smallest(*taps["tap_gelu"], lambda h: (h.unsqueeze(-1) - roots).abs().amin(-1), q),
                "Tapped#2": smallest(*gate, lambda h: torch.hypot(h, torch.tensor(math.pi).double()), q),
            },
            rel=2e-3,
        )
    slope = taps["tap_scores"][1]
    assert list(layers.attention) == ["Tapped"]
    spread = (slope.amax(-1) - slope.amin(-1)).max().item()
    assert layers.attention["Tapped"].item() == pytest.approx(spread / math.pi, rel=1e-3)


@pytest.mark.parametrize("kind", [Tapped, lambda: nn.Sequential(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True))])
def test_recording_changes_no_bit_and_leaves_nothing_behind(kind: Callable[[], nn.Module]):
    model, x = kind(), torch.randn(7, 3, 6)
    direction = {name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}
    before = {name: str(vars(module)) for name, module in model.named_modules()}
    plain, seen = (logit_tangent(model, (x,), None, direction, layers=layers) for layers in (False, True))
    assert plain.layers is None
    assert seen.layers is not None
    assert torch.equal(plain.logits, seen.logits)
    assert torch.equal(plain.tangent, seen.tangent)
    assert plain.method == seen.method
    assert {name: str(vars(module)) for name, module in model.named_modules()} == before
    assert not torch_module._global_forward_hooks
    assert not torch_module._global_forward_pre_hooks
    assert not torch_module._global_forward_hooks_always_called
    assert logit_tangent(model, (x,), None, direction, layers=True, method="finite_difference").layers is None


# Each way of calling it -------------------------------------------------------------------------------------


def sizes_of(model: nn.Module, x: Tensor, **options: str) -> LayerSteps:
    direction = {name: 0.1 * torch.ones_like(parameter) for name, parameter in model.named_parameters()}
    layers = logit_tangent(model, (x,), None, direction, layers=True, **options).layers
    assert layers is not None
    return layers


class Bare(nn.Module):
    """A linear layer, and one function on what it gives."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.linear, self.function = nn.Linear(5, 4), function

    def forward(self, x):
        return self.function(self.linear(x))


SAME: dict[str, list[Callable[[Tensor], Tensor]]] = {
    "relu": [F.relu, torch.relu, Tensor.relu, Tensor.relu_, F.relu_, nn.ReLU(), nn.ReLU(True), nn.LeakyReLU(0.3, True)],
    "sigmoid": [torch.sigmoid, Tensor.sigmoid, torch.sigmoid_, F.silu, nn.SiLU(True), nn.Sigmoid(), F.softplus],
    "tanh": [torch.tanh, Tensor.tanh_, nn.Tanh(), F.tanh],
    "hardtanh": [nn.Hardtanh(), F.hardtanh, F.hardtanh_, lambda h: F.hardtanh(input=h, min_val=-1.0, max_val=1.0)],
}


@pytest.mark.parametrize("kind", SAME)
def test_a_function_counts_however_it_is_called(kind: str):
    model, x = Bare(SAME[kind][0]), torch.randn(9, 5)
    (expected,) = sizes_of(model, x).activation().values()
    for function in SAME[kind]:
        other = Bare(function)
        other.linear = model.linear
        layers = sizes_of(other, x)
        name = "function" if isinstance(function, nn.Module) else "Bare"
        assert {layer: size.item() for layer, size in layers.activation().items()} == {name: expected.item()}, function


@pytest.mark.parametrize(
    "function",
    [
        lambda h: h.softmax(1),
        lambda h: h.softmax(dim=-1),
        lambda h: F.softmax(h, dim=-1, dtype=torch.float64),
        lambda h: torch.softmax(input=h, dim=1),
        nn.Softmax(-1),
    ],
)
def test_softmax_over_the_last_dimension_is_attention_however_it_is_called(function: Callable[[Tensor], Tensor]):
    model, x = Bare(function), torch.randn(9, 5)
    with torch.no_grad():
        direction = {name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}
        slope = x @ direction["linear.weight"].T + direction["linear.bias"]
    layers = logit_tangent(model, (x,), None, direction, layers=True).layers
    assert layers is not None
    (size,) = layers.attention.values()
    assert size.item() == pytest.approx((slope.amax(1) - slope.amin(1)).max().item() / math.pi, rel=1e-5)


def test_softmax_over_another_dimension_and_entire_functions_are_left_alone():
    for function in (lambda h: h.softmax(0), F.gelu, torch.sin, lambda h: torch.relu(h.long()).float() + h):
        layers = sizes_of(Bare(function), torch.randn(9, 5))
        assert (layers.attention, layers.activation_radii, layers.failures) == ({}, {}, {})


def test_what_cannot_be_measured_costs_the_logits_nothing(monkeypatch: pytest.MonkeyPatch):
    def fail(*args: object) -> None:
        raise RuntimeError("no such thing")

    monkeypatch.setattr("redline.numerics.layer_recorder.activation_radius", fail)
    model, x = Bare(torch.relu), torch.randn(9, 5)
    direction = {name: torch.ones_like(parameter) for name, parameter in model.named_parameters()}
    taken = logit_tangent(model, (x,), None, direction, layers=True)
    assert taken.method == "forward_mode"
    assert taken.layers == LayerSteps(failures={"Bare": "RuntimeError: no such thing"})


def test_a_recurrence_does_not_name_every_time_step():
    def unrolled(h: Tensor) -> Tensor:
        for _ in range(40):
            h = torch.tanh(h)
        return h

    layers = sizes_of(Bare(unrolled), torch.randn(9, 5))
    assert list(layers.activation_radii) == ["Bare", *(f"Bare#{call}" for call in range(2, 17))]
    assert list(layers.failures) == ["Bare"]


def test_half_precision_is_measured_in_float32():
    model, x = Bare(torch.sigmoid).bfloat16(), torch.randn(9, 5).bfloat16()
    (size,), (expected,) = (sizes_of(one, x.to(dtype)).activation().values() for one, dtype in (
        (model, torch.bfloat16), (copy.deepcopy(model).float(), torch.float32)))  # fmt: skip
    assert size.dtype == torch.float32
    assert size.item() == pytest.approx(expected.item(), rel=0.02)
