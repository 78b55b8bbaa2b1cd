"""``StepClamp(radius="exact")`` and ``GhostRadius(exact=True)``: real steps held against a float64 tangent and the
exact radius of each sample, the least taken by hand; what is committed, against the optimizer's own step."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp

import redline
import redline.tangent_probe
from redline import ConfigurationError, GhostRadius, StepClamp
from redline.numerics import exact_ghost_radius

FEATURES, CLASSES, BATCH = 6, 5, 16
R, RHO, TAU = "redline_normalized_step_size", "redline_ghost_radius", "redline_update_norm"
EXACT_R, EXACT_RHO, RATIO = "redline_exact_step_size", "redline_exact_ghost_radius", "redline_exact_to_bound_ratio"
Parameters = dict[str, Tensor]


class Net(nn.Sequential):
    """Sure of most samples: their exact radii are well over the bound."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, CLASSES))
        nn.init.normal_(self[2].weight, std=4.0)


class Loop:
    """A plain loop; two made alike are alike."""

    def __init__(self, rate: float, *controllers: Any, monitors: Any = (), logits: Any = None) -> None:
        torch.manual_seed(0)
        self.model = Net()
        self.optimizer = torch.optim.SGD(self.model.parameters(), rate, momentum=0.9, foreach=False)
        if controllers or monitors:
            plugins = {"controllers": controllers, "monitors": monitors}
            self.session = redline.attach(self.model, self.optimizer, **plugins, logits=logits)

    @property
    def parameters(self) -> Parameters:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def step(self, seed: int) -> tuple[Parameters, Parameters, Tensor]:
        """The parameters before it and as the optimizer proposes them, bit for bit, and the batch."""
        before, x = self.parameters, torch.randn(BATCH, FEATURES, generator=torch.Generator().manual_seed(seed))
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(x), torch.arange(BATCH) % CLASSES).backward()
        self.optimizer.step()
        rate = self.optimizer.param_groups[0]["lr"]
        moments = {name: self.optimizer.state[p]["momentum_buffer"] for name, p in self.model.named_parameters()}
        return before, {name: before[name].add(moments[name], alpha=-rate) for name in before}, x

    def reads(self, *metrics: str) -> tuple[float, ...]:
        return tuple(self.session.latest.value(metric) for metric in metrics)


def sizes(before: Parameters, after: Parameters, x: Tensor) -> tuple[Tensor, Tensor]:
    """``r`` of each sample by the bound, and by the exact radius, ``(batch,)``."""
    net, (point, end) = Net().double(), ({name: p.double() for name, p in one.items()} for one in (before, after))
    z, a = jvp(lambda p: functional_call(net, p, (x.double(),)), (point,), ({k: end[k] - point[k] for k in point},))
    return (a.amax(-1) - a.amin(-1)) / math.pi, 1 / exact_ghost_radius(z, a)


def same(one: Parameters, other: Parameters) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def exact(max_r: float = 1.0, **more: Any) -> StepClamp:
    return StepClamp(max_r, radius="exact", **more)


FIRST = sizes(*Loop(1.0).step(3))  # at a rate of 1; r of a first step grows with it
RATE = 1 / float(FIRST[1].max())  # at which the exact r of the first step is 1


@pytest.mark.parametrize("max_r", [1.0, 0.5, 2.0])
def test_a_step_over_the_bound_but_within_the_exact_radius_is_the_optimizers_own(max_r: float) -> None:
    alone, held, bound = (Loop(0.97 * max_r * RATE, *one) for one in ([], [exact(max_r)], [StepClamp(max_r)]))
    for loop in (alone, held, bound):
        _, after, _ = loop.step(3)
        assert same(loop.parameters, after) is (loop is not bound)
    assert same(held.parameters, alone.parameters)
    assert (held.session.interventions, held.reads("redline_step_scale")) == ((), (1,))


@pytest.mark.parametrize("max_r", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("share", [1.03, 4.0, 1e4])
def test_a_longer_one_is_scaled_onto_the_exact_radius(max_r: float, share: float) -> None:
    loop = Loop(share * max_r * RATE, exact(max_r))
    before, after, x = loop.step(3)
    (one,), r, factor = loop.session.interventions, *(loop.session.interventions[0].saw[key] for key in ("r", "scale"))
    assert (r, factor) == pytest.approx((float(sizes(before, after, x)[1].max()), 1 / share), rel=1e-3)
    assert one.reason == f"exact r = {r:.3g} was over {max_r:.3g}: the step was scaled by {factor:.3g}."
    for name, p in loop.parameters.items():
        on_line = before[name].double() + factor * (after[name].double() - before[name].double())
        assert torch.allclose(p.double(), on_line, rtol=3e-7, atol=3e-7 * factor * float(after[name].abs().max()))
    assert float(sizes(before, loop.parameters, x)[1].max()) == pytest.approx(max_r, rel=1e-3)


def test_along_a_run() -> None:
    """Of its steps some are over the bound alone, some over both, some over neither."""
    loop, kinds = Loop(1.0, exact(max_samples=None)), set()
    for seed in range(10):
        loop.optimizer.param_groups[0]["lr"] = (0.005, 0.1, 1.0)[seed % 3]
        before, after, x = loop.step(seed)
        r, exact_r = (float(one.max()) for one in sizes(before, after, x))
        assert loop.reads("redline_step_scale") == pytest.approx((min(1, 1 / exact_r),), rel=1e-3)
        assert (exact_r > 1) is not same(loop.parameters, after)
        kinds.add((r > 1, exact_r > 1))
    assert kinds == {(False, False), (True, False), (True, True)}


@pytest.mark.parametrize("kind", ["masked", "nan", "masked nan", "nan of no tangent"])
def test_positions_that_do_not_count(kind: str) -> None:
    counts = torch.ones(BATCH, dtype=torch.bool)
    counts[FIRST[1].topk(3).indices] = False
    nan = torch.where(counts, 0.0, math.nan)[:, None]
    answers: dict[str, Callable[[Tensor], Any]] = {
        "masked": lambda z: (z, counts),
        "nan": lambda z: z + z * nan,
        "masked nan": lambda z: (z + z * nan, counts),
        "nan of no tangent": lambda z: z + nan,
    }
    held = Loop(1.0, exact(), logits=answers[kind])
    held.step(3)
    r, expected = held.session.interventions[0].saw["r"], float(FIRST[1][counts].max())
    assert expected * (1 - 1e-3) < r < float(FIRST[0].max()) * (1 + 1e-3), "it is never let pass"
    assert r == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("factor", "did"), [(1e38, [(math.inf, 0)]), (math.nan, [])])
def test_where_tangents_are_not_finite_it_does_as_the_bound_does(factor: float, did: Any) -> None:
    for clamp in (exact(), StepClamp()):
        loop = Loop(1.0, clamp, logits=lambda z: z * 1e-5 * factor * 1e10)
        ends = loop.step(3)
        assert same(loop.parameters, ends[0 if did else 1])
        assert [(one.saw["r"], one.saw["scale"]) for one in loop.session.interventions] == did


def test_what_there_is_not_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="got radius='foo'; expected 'bound' or 'exact'"):
        StepClamp(radius="foo")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match=r"got reduction=0\.9 of the exact radius; expected 'max'"):
        exact(reduction=0.9)


WITH_NAN = pytest.param(lambda z: torch.cat([z[:1] * math.nan, z[1:]]), id="a position is nan")


@pytest.mark.parametrize("logits", [pytest.param(None, id="plain"), WITH_NAN])
def test_the_monitor_costs_no_further_tangent_and_changes_nothing(logits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, ends, take = [], [], redline.tangent_probe.logit_tangent
    monkeypatch.setattr(redline.tangent_probe, "logit_tangent", lambda *a, **k: (taken.append(1), take(*a, **k))[1])
    for monitors in ([], [GhostRadius(1, exact=True)]):
        loop = Loop(0.1, exact(), monitors=monitors, logits=logits)
        loop.step(0)
        taken.clear()  # the first is checked
        for seed in range(1, 8):
            loop.step(seed)
            assert len(taken) == seed
        ends.append((loop.parameters, [one.saw["scale"] for one in loop.session.interventions]))
    assert (ends[0][1] == ends[1][1], same(ends[0][0], ends[1][0]), len(ends[0][1]) > 3) == (True, True, True)


def test_it_pickles() -> None:
    loops = [Loop(0.1, clamp) for clamp in (exact(0.5), pickle.loads(pickle.dumps(exact(0.5))))]
    for loop in loops:
        loop.step(3)
    assert loops[0].session.interventions == loops[1].session.interventions != ()


@pytest.mark.parametrize("rate", [0.002, 0.1, 1.0])
@pytest.mark.parametrize("controllers", [[], [exact()]], ids=["alone", "and a clamp"])
def test_what_the_monitor_reads_of_the_step_as_proposed(rate: float, controllers: Any) -> None:
    loop = Loop(rate, *controllers, monitors=[pickle.loads(pickle.dumps(GhostRadius(1, exact=True, max_samples=None)))])
    for seed in range(3):
        expected_r, expected = (float(one.max()) for one in sizes(*loop.step(seed)))
        r, rho, tau, exact_r, exact_rho, ratio = loop.reads(R, RHO, TAU, EXACT_R, EXACT_RHO, RATIO)
        assert (r, exact_r, exact_rho) == pytest.approx((expected_r, expected, tau / expected), rel=1e-3)
        assert exact_r <= r * (1 + 1e-6)
        assert (ratio, ratio) == pytest.approx((r / exact_r, exact_rho / rho), rel=1e-5)


@pytest.mark.filterwarnings("ignore::redline.errors.RedlineWarning")
def test_where_the_step_cannot_be_measured_the_readings_are_absent() -> None:
    loop, there = Loop(0.1, monitors=[GhostRadius(1, exact=True)]), []
    for step in (lambda: loop.step(0), loop.optimizer.step):  # the second without a forward
        step()
        there.append({bool(loop.session.latest.series(metric)) for metric in (EXACT_R, EXACT_RHO, RATIO, R)})
    assert there == [{True}, {False}]


def test_a_step_that_moves_no_logit_has_no_ghosts() -> None:
    loop = Loop(0.0, monitors=[GhostRadius(1, exact=True)])
    loop.step(0)
    assert loop.reads(R, EXACT_R, RHO, EXACT_RHO) == (0, 0, math.inf, math.inf)


def test_a_transformer_survives_a_rate_10000_times_too_large(load_example: Any, monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples" / "studies")
    train = load_example("studies/spiked").train
    bound, by_exact = (train("Transformer", arm, 0, severity=1e4, steps=100) for arm in ("bound", "exact"))
    assert by_exact["accuracy"] > bound["accuracy"] - 0.02 > 0.88
    assert 0 < by_exact["shortened"] < bound["shortened"]
