"""Layer radii of real steps in a session: the right figures under the right names, and nothing disturbed."""

import copy
import math
from typing import Any

import pytest
import rich
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

import redline
from redline import ConfigurationError, GhostRadius, LayerRadii, RedlineWarning

R, ATTENTION, ACTIVATION = (f"redline_{name}_step_size" for name in ("normalized", "attention", "activation"))
BINDING = "redline_binding_step_size"
CLASSES, WIDTH, HEADS, TIME = 5, 8, 2, 4


class Mixed(nn.Module):
    """nn.MultiheadAttention with a padding mask, a fused attention with a causal one, functions and modules."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.3, batch_first=True)
        self.feed_forward = nn.Sequential(nn.Linear(WIDTH, 16), nn.SiLU(), nn.Dropout(0.4), nn.Linear(16, WIDTH))
        self.qkv, self.head = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        CALLED.append(len(x))
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[:, -1] = True
        x = x + self.attention(x, x, x, key_padding_mask=padding, need_weights=False)[0]
        x = x + self.feed_forward(x)
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.head(F.relu(x).mean(1))


CALLED: list[int] = []


def mixed() -> Mixed:
    torch.manual_seed(0)
    return Mixed()


class Step:
    """Steps of a model in a session, and what is needed to work out the first one again."""

    def __init__(self, model: nn.Module, *monitors: Any, steps: int = 1, **options: Any) -> None:
        self.before, self.generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        self.x = torch.randn(12, TIME, WIDTH, generator=self.generator)
        torch.manual_seed(1)
        CALLED.clear()
        self.losses: list[float] = []
        with redline.attach(model, optimizer, monitors=monitors, run="layers", **options) as self.session:
            for _ in range(steps):
                loss = F.cross_entropy(model(self.x).float(), torch.arange(len(self.x)) % CLASSES)
                self.losses.append(loss.item())
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        self.after, self.latest = model, self.session.latest

    def by_difference(self, function: Any) -> tuple[Tensor, Tensor]:
        """``function(model, x)`` in float64 before the step, and its derivative along it."""
        ends = []
        for t in (0.0, 1e-5, -1e-5):
            model = copy.deepcopy(self.before).double()
            with torch.no_grad():
                for parameter, last in zip(model.parameters(), self.after.parameters(), strict=True):
                    parameter += t * (last.double() - parameter)
                ends.append(function(model.eval(), self.x.double()))
        return ends[0], (ends[1] - ends[2]) / 2e-5


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def everything() -> LayerRadii:
    return LayerRadii(every=1, max_samples=None)


def attended(model: Any, x: Tensor) -> Tensor:
    padding = torch.zeros(x.shape[:2], dtype=torch.bool)
    padding[:, -1] = True
    return x + model.attention(x, x, x, key_padding_mask=padding)[0]


def padded_scores(model: Any, x: Tensor) -> Tensor:
    projected = F.linear(x, model.attention.in_proj_weight, model.attention.in_proj_bias)
    q, k, _ = projected.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    return (q @ k.transpose(-2, -1))[..., :-1] / math.sqrt(WIDTH / HEADS)


def gate(model: Any, x: Tensor) -> Tensor:
    return model.feed_forward[0](attended(model, x))


def causal_scores(model: Any, x: Tensor) -> Tensor:
    x = attended(model, x)
    q, k, _ = model.qkv(x + model.feed_forward(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    return q @ k.transpose(-2, -1) / math.sqrt(WIDTH / HEADS)


def spread(tangent: Tensor, kept: Tensor | None = None) -> float:
    kept = torch.ones_like(tangent, dtype=torch.bool) if kept is None else kept.expand_as(tangent)
    high, low = tangent.masked_fill(~kept, -math.inf).amax(-1), tangent.masked_fill(~kept, math.inf).amin(-1)
    return (high - low).amax().item() / math.pi


def test_readings_agree_with_float64_differences():
    step = Step(Mixed(), everything())
    _, padded = step.by_difference(padded_scores)
    _, causal = step.by_difference(causal_scores)
    h, dh = step.by_difference(gate)
    radii = sorted((torch.hypot(h, torch.tensor(math.pi).double()) / dh.abs()).flatten().tolist())
    assert step.latest.layers(ATTENTION) == pytest.approx(
        {"attention": spread(padded), "Mixed": spread(causal, torch.ones(TIME, TIME).tril().bool())}, rel=2e-3
    )
    activations = step.latest.layers(ACTIVATION)
    assert list(activations) == ["feed_forward.1", "Mixed"]
    assert activations["feed_forward.1"] == pytest.approx(1 / radii[math.ceil(0.01 * len(radii)) - 1], rel=2e-3)
    assert step.latest.series(BINDING) == {
        ("output",): pytest.approx(spread(step.by_difference(lambda model, x: model(x))[1]), rel=2e-3),
        ("attention",): max(step.latest.layers(ATTENTION).values()),
        ("activation",): max(activations.values()),
    }


def test_a_wider_quantile_gives_longer_radii():
    narrow, wide = (Step(mixed(), LayerRadii(1, quantile=q)).latest.layers(ACTIVATION) for q in (0.01, 0.2))
    assert all(narrow[name] > wide[name] for name in wide)


def test_autocast_agrees_with_full_precision():
    plain = Step(mixed(), everything()).latest
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = Step(mixed(), everything()).latest
    for metric in (ATTENTION, ACTIVATION):
        assert cast.layers(metric) == pytest.approx(plain.layers(metric), rel=0.1)


# Not disturbing ----------------------------------------------------------------------------------------------


def state(model: nn.Module) -> list[str]:
    return [str({key: value for key, value in vars(module).items() if "hooks" in key}) for module in model.modules()]


def test_the_run_stays_the_same_to_the_bit_and_nothing_stays_on_the_modules():
    alone, watched = mixed(), mixed()
    clean = state(alone)
    assert clean == state(watched)
    first = Step(alone, steps=3)
    second = Step(watched, everything(), steps=3)
    assert first.losses == second.losses
    for one, other in zip(alone.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one, other)
    assert state(watched) == clean
    for left in ("forward_hooks", "forward_pre_hooks", "forward_hooks_always_called"):
        assert not getattr(torch_module, f"_global_{left}")


@pytest.mark.parametrize("order", [1, -1])
def test_one_pass_serves_r_and_the_layers(order: int):
    alone = Step(Mixed(), GhostRadius(1), steps=3)
    calls = list(CALLED)
    both = Step(copy.deepcopy(alone.before), *[GhostRadius(1), LayerRadii(1)][::order], steps=3)
    assert calls == CALLED
    assert both.latest.value(R) == alone.latest.value(R)
    assert both.latest.value(BINDING, radius="output") == both.latest.value(R)
    assert both.session.notes == ()


def test_layers_are_seen_only_when_due():
    class Watch(GhostRadius):
        def measure(self, step: redline.Step, readings: redline.Readings) -> None:
            super().measure(step, readings)
            seen.append(step.tangent(self.max_samples, self.remember).layers is not None)

    seen: list[bool] = []
    step = Step(Mixed(), Watch(1), LayerRadii(lambda index: index == 1), steps=4)
    assert seen == [False, True, False, False]
    at = {one.metric: when for one, when in step.latest.measured_at.items()}
    assert (at[R], at[ATTENTION], at[ACTIVATION], at[BINDING]) == (3, 1, 1, 1)


def test_names_are_those_of_the_whole_model():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Mixed()

        def forward(self, x: Tensor) -> Any:
            return {"loss": None, "z": self.net(x)}["z"]

    latest = Step(Outer(), everything(), module="net").latest
    assert set(latest.layers(ATTENTION)) == {"net.attention", "net.Mixed"}
    assert set(latest.layers(ACTIVATION)) == {"net.feed_forward.1", "net.Mixed"}


def test_by_finite_difference_nothing_is_written_and_a_note_says_why():
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient

    class Custom(Mixed):
        def forward(self, x: Tensor) -> Tensor:
            return Opaque.apply(super().forward(x))

    with pytest.warns(RedlineWarning, match=r"The radii of layers are not measured: .* by finite difference"):
        step = Step(Custom(), GhostRadius(1), everything(), steps=3)
    assert R in step.latest
    assert not {ATTENTION, ACTIVATION, BINDING} & {one.metric for one in step.latest.values}
    assert (len(step.session.notes), step.session.report().binding) == (1, ())


@pytest.mark.parametrize(
    ("options", "what"), [({"max_samples": 0}, "max_samples=0"), ({"quantile": 0.0}, "quantile=0")]
)
def test_wrong_arguments_are_refused(options: dict[str, Any], what: str):
    with pytest.raises(ConfigurationError, match=f"got {what}"):
        LayerRadii(**options)


def test_the_report_says_which_radius_binds(capsys: pytest.CaptureFixture[str]):
    step = Step(Mixed(), everything(), steps=8)
    binding = {one.radius: one for one in step.session.report().binding}
    assert list(binding) == ["output", "attention", "activation"]
    assert [sum(one.shares[quarter] or 0 for one in binding.values()) for quarter in range(4)] == [1, 1, 1, 1]
    assert binding["activation"].shares == (1, 1, 1, 1)
    last = step.latest.layers(ACTIVATION)
    assert binding["activation"].layer == max(last, key=lambda name: last[name])
    rich.print(step.session.report())
    assert "Which radius binds" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::redline.errors.RedlineWarning")
def test_what_can_no_longer_be_measured_does_not_stay_behind():
    """A forward in training mode, and then a step without one."""
    model = Mixed()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = torch.randn(4, TIME, WIDTH, generator=torch.Generator().manual_seed(0))
    names = {ATTENTION, ACTIVATION, BINDING}
    with redline.attach(model, optimizer, monitors=[everything()]) as session:
        model(x).square().mean().backward()
        optimizer.step()
        assert {one.metric for one in session.latest.values} & names == names
        optimizer.step()
        assert not {one.metric for one in session.latest.values} & names
