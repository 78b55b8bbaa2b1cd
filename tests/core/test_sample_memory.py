"""The samples that bound lately are measured again with the next sub-sample.

Batch 0 holds an outlier, whose logits any step moves farther than those of all samples that come later.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp

import redline
from redline import ConfigurationError, GhostRadius, StepClamp

FEATURES, CLASSES, BATCH, OUTLIER = 5, 5, 16, 4  # of 16, four are measured: 0, 4, 8 and 12
R, SAMPLES, OF = "redline_normalized_step_size", "redline_tangent_samples", "redline_batch_samples"


class Net(nn.Module):
    """``(..., features) -> (..., classes)``; steep where its input is large."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.body, self.dropout, self.head = nn.Linear(FEATURES, 8), nn.Dropout(dropout), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor, *, bias: Tensor | None = None) -> Tensor:
        z = self.head(self.dropout(F.leaky_relu(self.body(x.to(self.head.weight.dtype)), 0.3)))
        return z if bias is None else z + bias


def batch(seed: int, *shape: int, outlier: bool = False) -> Tensor:
    x = torch.randn(*(shape or (BATCH,)), FEATURES, generator=torch.Generator().manual_seed(seed))
    if outlier:
        x[OUTLIER] = 100 * x[OUTLIER].sign()
    return x


class Loop:
    """A plain loop with plain SGD, and of its last step all that the references need."""

    def __init__(self, *monitors: Any, controllers: Any = (), model: Callable[[], nn.Module] = Net) -> None:
        torch.manual_seed(0)
        self.model = model()
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.005)
        if monitors or controllers:
            self.session = redline.attach(self.model, self.optimizer, monitors=monitors, controllers=controllers)

    def step(self, x: Tensor, call: Callable[[nn.Module, Tensor], Tensor] = lambda model, x: model(x)) -> None:
        self.before = copy.deepcopy(self.model.state_dict())
        self.optimizer.zero_grad()
        z = call(self.model, x).flatten(0, -2)
        F.cross_entropy(z, torch.arange(len(z)) % CLASSES).backward()
        x.fill_(1e3)  # a loop may read the next batch into the same memory
        self.optimizer.step()
        self.update = {name: p.detach().double() - self.before[name] for name, p in self.model.named_parameters()}

    def r(self, x: Tensor) -> float:
        """Of one sample, along the last step at the parameters before it, in float64."""
        point = {name: p.double() for name, p in self.before.items()}
        net = Net().double()
        tangent = jvp(lambda p: functional_call(net, p, (x.double(),)), (point,), (self.update,))[1]
        return float((tangent.amax(-1) - tangent.amin(-1)).max()) / math.pi

    def reads(self, metric: str = R) -> float:
        return self.session.latest.value(metric)


@pytest.mark.parametrize("every", [1, 3])
def test_the_outlier_is_measured_again_where_it_is_remembered(every: int) -> None:
    watched, forgetful = (Loop(GhostRadius(every, max_samples=4, remember=most)) for most in (1, 0))
    outlier = batch(0, outlier=True)[OUTLIER]
    for seed in range(0, 6 * every):
        for loop in (watched, forgetful):
            loop.step(batch(seed, outlier=seed == 0))
        if seed % every:
            continue
        assert watched.reads() == pytest.approx(watched.r(outlier), rel=1e-4)
        assert (watched.reads(SAMPLES), forgetful.reads(SAMPLES)) == (5 if seed else 4, 4)
        assert watched.reads(OF) == forgetful.reads(OF) == BATCH
        assert watched.session.margins.samples.tolist() == ([0, 4, 8, 12, -1] if seed else [0, 4, 8, 12])
        first = watched.session.margins.most_fragile(1)[0]
        assert (first.sample, first.r) == (None if seed else OUTLIER, pytest.approx(watched.reads(), rel=1e-6))
        ordinary = [forgetful.r(batch(seed, outlier=seed == 0)[k]) for k in (0, 4, 8, 12)]
        assert forgetful.reads() == pytest.approx(max(ordinary), rel=1e-4)
        assert seed == 0 or forgetful.reads() < 0.5 * watched.reads()


def test_the_largest_of_old_and_new_are_kept() -> None:
    loop, pool = Loop(GhostRadius(1, max_samples=4, remember=3)), []
    for seed in range(6):
        loop.step(batch(seed, outlier=seed == 0))
        pool += list(batch(seed, outlier=seed == 0)[[0, 4, 8, 12]])
        expected = sorted((loop.r(x) for x in pool), reverse=True)
        assert loop.reads(SAMPLES) == len(pool)
        measured = sorted(loop.session.margins.r.tolist(), reverse=True)
        assert measured == pytest.approx(expected, rel=1e-4)
        pool = sorted(pool, key=loop.r, reverse=True)[:3]


def test_the_whole_batch_is_joined_by_nothing() -> None:
    loop = Loop(GhostRadius(1, max_samples=4, remember=2))
    outlier = batch(0, outlier=True)[OUTLIER]
    loop.step(batch(0, outlier=True))
    x = batch(1, 4)
    loop.step(x.clone())
    assert (loop.reads(SAMPLES), loop.reads(OF)) == (4, 4)
    assert loop.reads() == pytest.approx(max(map(loop.r, x)), rel=1e-4)
    loop.step(batch(2))
    assert loop.reads(SAMPLES) == 6, "it does not forget meanwhile"
    assert loop.reads() == pytest.approx(loop.r(outlier), rel=1e-4)


@pytest.mark.parametrize("change", ["length", "dtype"])
def test_batches_of_another_kind_are_measured_by_themselves(change: str) -> None:
    loop, counts = Loop(GhostRadius(1, max_samples=4, remember=1)), []
    for seed in range(4):
        x = batch(seed, BATCH, 2 if change == "length" and seed >= 2 else 3)
        x = x.double() if change == "dtype" and seed >= 2 else x
        own = x[[0, 4, 8, 12]].clone()
        loop.step(x)
        counts.append(loop.reads(SAMPLES))
        if seed % 2 == 0:
            assert loop.reads() == pytest.approx(max(map(loop.r, own)), rel=1e-4)
    assert counts == [4, 5, 4, 5]
    assert loop.session.notes == ()


AS_LONG = pytest.param((CLASSES,), 4, 1)


@pytest.mark.parametrize(
    ("shared", "measured", "kept"), [((CLASSES,), 4, 2), ((1,), 4, 1), ((), 4, 1), AS_LONG], ids=str
)
def test_keyword_inputs_and_those_that_are_no_samples(shared: tuple[int, ...], measured: int, kept: int) -> None:
    """Also one as long as what is measured, the kept among it."""
    loop, outlier = Loop(GhostRadius(1, max_samples=measured, remember=kept)), batch(0, outlier=True)[OUTLIER]
    for seed in range(4):
        loop.step(batch(seed, outlier=seed == 0), lambda model, x: model(x=x, bias=torch.zeros(shared)))
        assert loop.reads(SAMPLES) == (measured + kept if seed else measured)
        assert loop.reads() == pytest.approx(loop.r(outlier), rel=1e-4)
    assert loop.session.notes == ()


def test_a_monitor_of_other_samples_does_not_alter_what_the_clamp_does() -> None:
    runs = [Loop(*monitors, controllers=[StepClamp(1e-4, max_samples=4)]) for monitors in ([], [GhostRadius(2)])]
    for seed in range(4):
        for loop in runs:
            loop.step(batch(seed, 64))
    alone, watched = ([one.saw["r"] for one in loop.session.interventions] for loop in runs)
    assert len(alone) == 4
    assert watched == alone


def test_the_same_batch_again_does_not_fill_the_memory_with_one_sample() -> None:
    loop = Loop(GhostRadius(1, max_samples=4, remember=3))
    for _ in range(5):
        loop.step(batch(0))
    remembered = loop.session.margins.r[loop.session.margins.samples < 0].tolist()
    assert len({round(r / max(remembered), 4) for r in remembered}) == 3


def test_watching_with_a_memory_changes_no_bit() -> None:
    ends = []
    for monitors in ([], [GhostRadius(1, max_samples=4, remember=3, exact=True)]):
        loop = Loop(*monitors, model=lambda: Net(dropout=0.3))
        for seed in range(6):
            loop.step(batch(seed, outlier=seed == 0))
        gradients = [p.grad for p in loop.model.parameters()]
        ends.append([*loop.model.state_dict().values(), *gradients, torch.get_rng_state()])
    assert loop.reads(SAMPLES) == 7
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


def clamped(radius: Any) -> Loop:
    return Loop(controllers=[StepClamp(3e-4, radius=radius, max_samples=8, remember=3)])


def run(loop: Loop, first: int, last: int) -> list[Tensor]:
    for seed in range(first, last):
        loop.step(batch(seed, 32, outlier=seed == 2))
    return [p.detach().clone() for p in loop.model.parameters()]


@pytest.mark.parametrize(("cut", "radius"), [(3, "bound"), (7, "bound"), (3, "exact"), (7, "exact")])
def test_a_run_that_was_cut_equals_one_that_was_not(cut: int, radius: Any) -> None:
    through = clamped(radius)
    whole = run(through, 0, 12)
    first, file = clamped(radius), io.BytesIO()
    run(first, 0, cut)
    torch.save([first.model.state_dict(), first.session.state_dict()], file)
    file.seek(0)
    states, resumed = torch.load(file, weights_only=True), []
    for forget in (False, True):
        second = clamped(radius)
        second.model.load_state_dict(states[0])
        second.session.load_state_dict(states[1])
        if forget:
            second.session.load_state_dict({**states[1], "probe": clamped(radius).session.state_dict()["probe"]})
        resumed.append(run(second, cut, 12))
    assert through.session.interventions
    equal = [all(torch.equal(one, other) for one, other in zip(whole, end, strict=True)) for end in resumed]
    assert equal == [True, False]


@pytest.mark.parametrize("plugin", [GhostRadius, StepClamp, redline.RadiusLR])
def test_fewer_than_none_is_refused(plugin: Any) -> None:
    with pytest.raises(ConfigurationError, match="got remember=-1; expected a number of samples, or 0 for none"):
        plugin(remember=-1)
