"""Margins: ``r`` of each sample, against a forward-mode tangent of that sample alone in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp

import redline
from redline import GhostRadius, StepClamp, UpdateClamp
from redline.margins import StepMargins
from redline.numerics import exact_ghost_radius
from redline.trail import FragileSample

FEATURES, CLASSES, BATCH, TIME = 5, 4, 12, 3
Logits = Callable[[Any], Any]


@pytest.fixture(autouse=True)
def _seeded() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


class Net(nn.Module):
    """Logits of each position by itself: ``(..., features) -> (..., classes)``, reshaped as asked."""

    def __init__(self, shape: Callable[[Tensor], Tensor] = lambda z: z) -> None:
        super().__init__()
        self.body, self.head, self.shape = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES), shape

    def forward(self, x: Tensor) -> Tensor:
        return self.shape(self.head(torch.tanh(self.body(x))))


class Loop:
    """A plain loop, and of its last step all that the references need."""

    def __init__(self, model: nn.Module, monitors: Any = (), controllers: Any = (), rate: float = 0.5, **more: Any):
        self.model, self.optimizer = model, torch.optim.SGD(model.parameters(), rate)
        self.session = redline.attach(model, self.optimizer, monitors=monitors, controllers=controllers, **more)

    def step(self, x: Tensor) -> StepMargins | None:
        self.before = copy.deepcopy(self.model.state_dict())
        self.optimizer.zero_grad()
        z = self.model(x).flatten(0, -2)
        F.cross_entropy(z, torch.arange(len(z)) % z.shape[-1]).backward()
        self.update = {
            name: -self.optimizer.param_groups[0]["lr"] * p.grad.double() for name, p in self.model.named_parameters()
        }
        self.optimizer.step()
        return self.session.margins

    def tangent(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and their tangent along the update as the optimizer proposes it, of these inputs alone."""
        model = Net().double()

        def logits(point: dict[str, Tensor]) -> Tensor:
            return functional_call(model, point, (x.double(),))

        return jvp(logits, ({name: p.double() for name, p in self.before.items()},), (self.update,))

    def r(self, x: Tensor) -> float:
        """The largest of one sample's positions."""
        tangent = self.tangent(x)[1]
        return float((tangent.amax(-1) - tangent.amin(-1)).max()) / math.pi


def vectors() -> Tensor:
    return torch.randn(BATCH, FEATURES)


def sequences() -> Tensor:
    return torch.randn(BATCH, TIME, FEATURES)


def assert_margins(margins: StepMargins | None, expected: dict[int, float], step: int = 0) -> None:
    assert margins is not None
    assert margins.step == step
    assert margins.samples.dtype == torch.int64
    assert margins.samples.tolist() == list(expected)
    assert margins.r.tolist() == pytest.approx(list(expected.values()), rel=1e-4)


@pytest.mark.parametrize(("max_samples", "places"), [(None, range(12)), (12, range(12)), (4, [0, 3, 6, 9]), (1, [0])])
def test_r_of_each_sample_by_its_place_in_the_batch(max_samples: int | None, places: Any) -> None:
    loop = Loop(Net(), [GhostRadius(1, max_samples=max_samples, remember=0)])
    assert loop.session.margins is None
    for step in range(2):
        x = vectors()
        margins = loop.step(x)
        expected = {k: loop.r(x[k]) for k in places}
        assert_margins(margins, expected, step)
        assert margins.exact_r is None
        ordered = sorted(expected, key=expected.__getitem__, reverse=True)
        most = margins.most_fragile(3)
        assert [one.sample for one in most] == ordered[:3]
        assert [one.r for one in most] == pytest.approx([expected[k] for k in ordered[:3]], rel=1e-4)
        assert {one.exact_r for one in most} == {None}
    assert len(margins.most_fragile()) == min(5, len(expected))
    assert loop.session.latest.value("redline_normalized_step_size") == pytest.approx(max(expected.values()), rel=1e-4)


@pytest.mark.parametrize("max_samples", [None, 5])
@pytest.mark.parametrize("kind", ["in time", "flattened", "batch second"])
def test_of_a_sample_of_several_positions_the_largest(kind: str, max_samples: int | None) -> None:
    dim = int(kind == "batch second")
    model = Net((lambda z: z.flatten(0, 1)) if kind == "flattened" else lambda z: z)
    loop = Loop(model, [GhostRadius(1, max_samples=max_samples)], batch_dim=dim)
    x = sequences()
    margins = loop.step(x.transpose(0, 1) if dim else x)
    places = range(BATCH) if max_samples is None else [0, 2, 4, 7, 9]
    assert_margins(margins, {k: loop.r(x[k]) for k in places})


@pytest.mark.parametrize("flat", [False, True])
def test_positions_that_do_not_count(flat: bool) -> None:
    counts = torch.rand(BATCH, TIME) < 0.5
    counts[:2] = False
    counts[2:, 0] |= ~counts[2:].any(1)
    pick: Logits = lambda z: (z.flatten(0, 1), counts.flatten()) if flat else (z, counts)  # noqa: E731
    loop = Loop(Net(), [GhostRadius(1, max_samples=None)], logits=pick)
    x = sequences()
    margins = loop.step(x)
    assert_margins(margins, {k: loop.r(x[k][counts[k]]) if k >= 2 else 0.0 for k in range(BATCH)})


@pytest.mark.parametrize("kind", ["a prompt ahead", "batch second and flattened"])
def test_logits_that_cannot_be_told_by_sample(kind: str) -> None:
    ahead = kind == "a prompt ahead"
    model = Net((lambda z: torch.cat([z[0, :1], z.flatten(0, 1)])) if ahead else lambda z: z.flatten(0, 1))
    loop = Loop(model, [GhostRadius(1)], batch_dim=0 if ahead else 1)
    assert loop.step(sequences()) is None
    assert loop.session.latest.value("redline_normalized_step_size") > 0
    assert loop.session.notes == ()


def test_without_a_measurement_there_are_none_and_later_the_last_ones() -> None:
    loop = Loop(Net(), [GhostRadius(lambda step: step == 1)])
    assert loop.step(vectors()) is None
    x = vectors()
    loop.step(x)
    expected = {k: loop.r(x[k]) for k in range(BATCH)}
    assert_margins(loop.step(vectors()), expected, 1)


class Late(GhostRadius):
    after_commit = True  # of what was committed


@pytest.mark.parametrize("radius", ["bound", "exact"])
@pytest.mark.parametrize("monitors", [[], [GhostRadius], [Late]], ids=["clamp alone", "monitor", "late monitor"])
def test_they_speak_of_the_step_as_proposed(radius: Any, monitors: Any) -> None:
    loop = Loop(Net(), [one(1) for one in monitors], [StepClamp(1e-2, radius=radius, max_samples=None)])
    x = vectors()
    margins = loop.step(x)
    (clamped,) = loop.session.interventions
    assert clamped.saw["scale"] < 0.5
    assert_margins(margins, {k: loop.r(x[k]) for k in range(BATCH)})


def test_they_speak_of_it_when_single_parameters_were_shortened_too() -> None:
    loop = Loop(Net(), [GhostRadius(1, max_samples=None)], [UpdateClamp(1e-2), StepClamp(1e-3)])
    x = vectors()
    margins = loop.step(x)
    assert {one.controller for one in loop.session.interventions} == {"UpdateClamp", "StepClamp"}
    assert_margins(margins, {k: loop.r(x[k]) for k in range(BATCH)})


@pytest.mark.parametrize("by", ["monitor", "clamp"])
@pytest.mark.parametrize("in_time", [False, True])
def test_the_exact_radius_of_the_sample_that_binds(by: str, in_time: bool) -> None:
    one: Any = GhostRadius(1, exact=True) if by == "monitor" else StepClamp(1e-2, radius="exact")
    loop = Loop(Net(), rate=3.0, **{f"{'monitor' if by == 'monitor' else 'controller'}s": [one]})
    with torch.no_grad():
        loop.model.head.weight.mul_(10)  # confident, some of them
    x = sequences() if in_time else vectors()
    margins = loop.step(x)
    exact = [1 / float(exact_ghost_radius(*loop.tangent(x[k])).min()) for k in range(BATCH)]
    binding = exact.index(max(exact))
    first, *rest = margins.most_fragile(BATCH)
    assert first.sample == binding
    assert first.exact_r == pytest.approx(exact[binding], rel=1e-4)
    assert first.r == pytest.approx(loop.r(x[binding]), rel=1e-4)
    assert len(rest) == BATCH - 1
    for one in rest:
        assert one.exact_r is None or one.exact_r == pytest.approx(exact[one.sample], rel=1e-4)
    assert loop.session.margins is margins


def test_most_fragile_puts_first_what_is_known_exactly_and_then_the_largest_r() -> None:
    columns = (
        torch.tensor([0, 4, 8, -1]),
        torch.tensor([9.0, 2.0, 3.0, 5.0]),
        torch.tensor([math.nan, 0.5, math.nan, 1]),
    )
    expected = [(None, 5.0, 1.0), (4, 2.0, 0.5), (0, 9.0, None), (8, 3.0, None)]
    assert StepMargins(7, *columns).most_fragile() == [FragileSample(7, *one) for one in expected]
    assert [one.sample for one in StepMargins(7, *columns[:2], None).most_fragile(2)] == [0, None]


def test_a_sample_that_is_nan_does_not_hide_which_binds() -> None:
    margins = StepMargins(0, torch.arange(4), torch.tensor([1.0, math.nan, 3.0, 2.0]), None).most_fragile()
    assert [one.sample for one in margins if not math.isnan(one.r)] == [2, 3, 0]


def test_a_batch_of_which_no_position_is_picked_does_not_end_a_run_that_is_watched() -> None:
    loop = Loop(Net(), [GhostRadius(1, exact=True)], logits=lambda z: z.flatten(0, 1)[:0])
    loop.step(sequences())
    assert loop.session.latest.value("redline_normalized_step_size") == 0
    assert loop.session.margins is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_place_in_a_large_batch_is_told_exactly_of_a_model_in_half_precision(dtype: torch.dtype) -> None:
    margins = StepMargins(0, torch.tensor([3, 4097]), torch.tensor([1.0, 2.0], dtype=dtype), None)
    assert margins.leading()[:, 0].tolist() == [4097, 3]
