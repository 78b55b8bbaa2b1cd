"""StepClamp measures what it cannot rule out: which steps it measures, and that none too long gets by."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from bits import frozen
from runs import ControlledRun
from torch import Tensor, nn

import redline
from redline.tangent_probe import TangentProbe

STALE = 20


class Replayed(torch.optim.Optimizer):
    """Steps by exactly what it is told, so that a test decides on length and direction."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 1.0})
        self.update: list[Tensor] = []

    @torch.no_grad()
    def step(self, closure: object = None) -> None:
        for parameter, change in zip(self.param_groups[0]["params"], self.update, strict=True):
            parameter.add_(change)


class Run(ControlledRun):
    """Two linear layers on 16 samples. Its updates move either layer along one direction, by a length of their own."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 4, bias=False))
        self.parameters_in_order = list(self.model.parameters())
        self.optimizers = [Replayed(self.parameters_in_order)]
        self.x, self.y = torch.randn(16, 8), torch.randint(4, (16,))
        self.directions = [torch.randn_like(p) for p in self.parameters_in_order]
        self.session = None

    def step(self, lengths: tuple[float, float] = (1e-3, 1e-3), scale_inputs: float = 1.0) -> None:
        loss = F.cross_entropy(self.model(self.x * scale_inputs), self.y)
        if self.session is not None:
            self.session.observe(loss=loss)
        loss.backward()
        optimizer = self.optimizers[0]
        optimizer.update = [length * d / d.norm() for length, d in zip(lengths, self.directions, strict=True)]
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def tangents(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry a tangent taken."""
    taken: list[int] = []
    measure = TangentProbe.measure
    monkeypatch.setattr(
        TangentProbe, "measure", lambda self, *args, **kwargs: (taken.append(1), measure(self, *args, **kwargs))[1]
    )
    return taken


def quiet(run: Run, steps: int = 3 * STALE) -> None:
    for _ in range(steps):
        run.step()


def test_a_quiet_run_is_measured_seldom_and_never_longer_than_stale_after_apart(tangents: list[int]) -> None:
    run, at = Run(), []
    with run.attach(redline.StepClamp(max_samples=None)):
        for step in range(110):
            before = len(tangents)
            run.step()
            if len(tangents) > before:
                at.append(step)
    gaps = [b - a for a, b in pairwise(at)]
    assert at[0] == 0
    assert gaps == [2, 4, 8, 16, STALE, STALE, STALE]


def test_stale_after_1_measures_every_step(tangents: list[int]) -> None:
    run = Run()
    with run.attach(redline.StepClamp(stale_after=1)):
        quiet(run, 30)
    assert len(tangents) == 30


@pytest.mark.parametrize("wait", [0, 1, 2, 3, 7, 3 * STALE, 3 * STALE + 5])
def test_a_step_that_jumps_is_measured_and_clamped_whenever_it_comes(wait: int, tangents: list[int]) -> None:
    run = Run()
    with run.attach(redline.StepClamp(max_samples=None)) as session:
        quiet(run, wait)
        before = len(tangents)
        run.step((100.0, 100.0))
    assert len(tangents) == before + 1
    assert [one.step for one in session.interventions] == [wait]
    assert session.latest.value("redline_committed_step_size") == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("layer", [0, 1])
def test_the_same_length_moved_into_one_layer_is_measured(layer: int, tangents: list[int]) -> None:
    """The norm of the whole update stays; one layer gets what the other had, and more than the forecast allows."""
    run = Run()
    small, large = 1e-3, 1.0
    usual = (large, small) if layer else (small, large)
    turned = (small, large) if layer else (large, small)
    with run.attach(redline.StepClamp(max_r=100.0, max_samples=None)):
        for _ in range(3 * STALE):
            run.step(usual)
        before = len(tangents)
        run.step(turned)
    assert len(tangents) == before + 1


@pytest.mark.parametrize("stale_after", [5, STALE])
def test_a_bad_batch_at_equal_norms_is_measured_by_its_loss(stale_after: int, tangents: list[int]) -> None:
    run = Run()
    with run.attach(redline.StepClamp(max_samples=None, stale_after=stale_after)) as session:
        quiet(run)
        before = len(tangents)
        run.step((1e-3, 1e-3), scale_inputs=1e4)
    assert len(tangents) == before + 1
    assert session.interventions[-1].step == 3 * STALE


def test_the_blind_spot_ends_with_the_staleness_limit(tangents: list[int]) -> None:
    """Within a parameter, at equal norms and an equal loss, a turn is not seen at once; but it is."""
    run = Run()
    with run.attach(redline.StepClamp(max_r=0.02, max_samples=None)) as session:
        run.x[:, 0] = 1e-2  # what moves this feature's column hardly moves a logit
        run.directions[0] = torch.zeros(8, 8)
        run.directions[0][:, 0] = 1.0
        run.directions[1] = torch.randn_like(run.directions[1])
        for _ in range(3 * STALE):
            run.step((0.3, 1e-6))
        assert not session.interventions
        run.directions[0] = torch.randn(8, 8)
        for _ in range(STALE):
            run.step((0.3, 1e-6))
    first = session.interventions[0].step
    assert 3 * STALE <= first < 4 * STALE


def test_a_step_near_the_redline_is_measured_every_time(tangents: list[int]) -> None:
    run = Run()
    with run.attach(
        redline.StepClamp(max_samples=None), monitors=[redline.GhostRadius(1, max_samples=None)]
    ) as session:
        run.step()
        to_half = 0.6 / session.latest.value("redline_normalized_step_size") * 1e-3
    run, before = Run(), len(tangents)
    with run.attach(redline.StepClamp(max_samples=None)):
        for _ in range(10):
            run.step((to_half, to_half))
    assert len(tangents) == before + 10


def masked(run: Run) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Logits, of which none count while ``run.counts`` is false."""
    return lambda output: (output, torch.full((len(output),), run.counts))


def test_r_of_a_step_at_which_nothing_counted_stands_for_no_other(tangents: list[int]) -> None:
    run = Run()
    run.counts = False
    clamp = redline.StepClamp(max_samples=None)
    with redline.attach(run.model, run.optimizers, monitors=[], controllers=[clamp], logits=masked(run)) as session:
        run.session = session
        for _ in range(5):
            run.step()
        run.counts = True
        before = len(tangents)
        run.step((100.0, 100.0))
    assert len(tangents) == before + 1
    assert [one.step for one in session.interventions] == [5]


def test_parameters_that_take_turns_are_told_apart(tangents: list[int]) -> None:
    """As many, and as large, as those of the last step: but others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    optimizers = [Replayed([parameter]) for parameter in model.parameters()]
    x, y = torch.randn(16, 8), torch.randint(8, (16,))
    clamp = redline.StepClamp(max_r=100.0, max_samples=None)
    with redline.attach(model, optimizers, monitors=[], controllers=[clamp]):
        for step in range(6):
            F.cross_entropy(model(x), y).backward()
            optimizer = optimizers[step % 2]
            optimizer.update = [torch.full((8, 8), 1e-3)]
            optimizer.step()
            model.zero_grad()
        model(x)  # the last step ends ahead of it
    assert len(tangents) == 6


def test_a_staleness_limit_that_is_lower_than_the_one_before_holds_at_once(tangents: list[int]) -> None:
    run = Run()
    with run.attach(redline.StepClamp(max_samples=None)) as session:
        quiet(run, 33)  # measured at 30, the next not before 50
        state = session.state_dict()
    before = len(tangents)
    with run.attach(redline.StepClamp(max_samples=None, stale_after=5)) as session:
        session.load_state_dict(state)
        for _ in range(5):
            run.step()
    assert len(tangents) > before


@pytest.mark.parametrize("length", [math.nan, math.inf])
def test_an_update_that_is_not_finite_is_never_passed(length: float) -> None:
    run = Run()
    with run.attach(redline.StepClamp(max_samples=None)):
        quiet(run)
        with pytest.raises(redline.RunStoppedError, match="not finite"):
            run.step((length, 1e-3))


def test_what_moves_for_the_first_time_is_measured(tangents: list[int]) -> None:
    run = Run()
    with run.attach(redline.StepClamp(max_samples=None)):
        for _ in range(3 * STALE):
            run.step((1e-3, 0.0))
        before = len(tangents)
        run.step((1e-3, 1e-4))
    assert len(tangents) == before + 1


def test_a_step_of_nothing_is_told_by_its_norms_and_left_alone(tangents: list[int]) -> None:
    run = Run()
    with run.attach(redline.StepClamp(max_samples=None)) as session:
        quiet(run, 8)
        before = len(tangents)
        run.step((0.0, 0.0))
    assert len(tangents) == before
    assert not session.interventions


def test_a_step_that_moves_nothing_of_the_model_is_left_alone() -> None:
    run = Run()
    with run.attach(redline.StepClamp(max_samples=None)):
        quiet(run, 5)
        for parameter in run.parameters_in_order:
            parameter.requires_grad_(False)
        F.cross_entropy(run.model(run.x.requires_grad_()), run.y).backward()
        run.optimizers[0].update = [torch.zeros_like(parameter) for parameter in run.parameters_in_order]
        with pytest.warns(redline.RedlineWarning, match="no parameter of Sequential"):
            run.optimizers[0].step()


class Trained(ControlledRun):
    """A net in training by Adam, in batches, with a rate that jumps."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 5))
        self.optimizers = [torch.optim.Adam(self.model.parameters(), lr=1e-4)]
        self.session = None

    def train(self, steps: range, spike: Callable[[int], float] = lambda step: 1.0) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(64, 16, generator=generator)
            loss = F.cross_entropy(self.model(x), x[:, :5].argmax(-1))
            if self.session is not None:
                self.session.observe(loss=loss)
            loss.backward()
            self.optimizers[0].param_groups[0]["lr"] = 1e-4 * spike(step)
            self.optimizers[0].step()
            self.optimizers[0].zero_grad()


def spiked(step: int) -> float:
    return 1e4 if step in (0, 70, 71) else 1.0


def test_it_does_what_a_clamp_does_that_measures_every_step(tangents: list[int]) -> None:
    ends, counts = [], []
    for stale_after in (1, STALE):
        run, before = Trained(), len(tangents)
        with run.attach(redline.StepClamp(max_samples=None, stale_after=stale_after)) as session:
            run.train(range(100), spiked)
        ends.append((run.everything, [(one.step, one.saw["r"]) for one in session.interventions]))
        counts.append(len(tangents) - before)
    assert ends[0] == ends[1]
    assert {0, 70, 71} <= {step for step, _ in ends[0][1]}
    assert counts[0] == 100
    assert counts[1] < 40


def test_a_run_that_is_resumed_equals_one_that_was_not_and_is_measured_at_the_same_steps(tangents: list[int]) -> None:
    whole = Trained()
    with whole.attach(redline.StepClamp(max_samples=16)):
        whole.train(range(33), spiked)
        until = len(tangents)
        at = [(step, len(tangents)) for step in range(33, 80) if whole.train(range(step, step + 1), spiked) is None]
    first = Trained()
    with first.attach(redline.StepClamp(max_samples=16)) as session:
        first.train(range(33), spiked)
        state = session.state_dict()
    before = len(tangents)
    with first.attach(redline.StepClamp(max_samples=16)) as session:
        session.load_state_dict(state)
        again = [(step, len(tangents)) for step in range(33, 80) if first.train(range(step, step + 1), spiked) is None]
    assert [(step, count - before) for step, count in again] == [(step, count - until) for step, count in at]
    assert first.everything == whole.everything


@pytest.mark.parametrize("every", [1, 3, 7])
def test_monitors_beside_it_change_nothing(every: int) -> None:
    ends = []
    for monitors in ([], [redline.GhostRadius(every, max_samples=16)]):
        run = Trained()
        with run.attach(redline.StepClamp(0.05, max_samples=16), monitors=monitors) as session:
            run.train(range(80), spiked)
        ends.append((run.everything, frozen([dict(one.saw) for one in session.interventions])))
    assert ends[0] == ends[1]


class EverySecondBack(redline.Controller):
    """Takes every second step back, ahead of the clamp, which then measures none of these."""

    snapshots_state = True
    per_parameter = True

    def __init__(self, first: int) -> None:
        self.first = first

    def inspect(self, step: redline.Step) -> list[redline.Reject]:
        return [redline.Reject("taken back.")] if step.index % 2 == self.first else []


@pytest.mark.parametrize("first", [0, 1])
def test_monitors_measuring_where_the_clamp_is_not_asked_change_nothing(first: int) -> None:
    ends = []
    for monitors in ([], [redline.GhostRadius(1, max_samples=3, remember=2)]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=3.0, momentum=0.9)
        controllers = [EverySecondBack(first), redline.StepClamp(0.1, max_samples=3, remember=2)]
        with redline.attach(model, optimizer, monitors=monitors, controllers=controllers):
            for seed in range(12):
                generator = torch.Generator().manual_seed(seed)
                x, y = torch.randn(16, 6, generator=generator), torch.randint(0, 4, (16,), generator=generator)
                x[0] *= 30 if seed % 2 == first else 1  # fragile, and measured where the clamp is not asked
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
        ends.append(frozen(model.state_dict()))
    assert ends[0] == ends[1]


class Fours(nn.Sequential):
    """A net that takes batches of a multiple of 4 only."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) % 4:
            raise RuntimeError("no multiple of 4")
        return super().forward(x)


def test_a_sub_sample_that_fails_for_a_monitor_does_not_change_the_clamps() -> None:
    ends = []
    for monitors in ([], [redline.GhostRadius(1, max_samples=3, remember=0)]):
        torch.manual_seed(0)
        model = Fours(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=3.0)
        clamp = redline.StepClamp(0.1, max_samples=4, remember=0)
        warned = pytest.warns(redline.RedlineWarning, match="on the whole batch") if monitors else nullcontext()
        with warned, redline.attach(model, optimizer, monitors=monitors, controllers=[clamp]) as session:
            for seed in range(6):
                generator = torch.Generator().manual_seed(seed)
                x, y = torch.randn(16, 6, generator=generator), torch.randint(0, 4, (16,), generator=generator)
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
        ends.append((frozen(model.state_dict()), frozen([dict(one.saw) for one in session.interventions])))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("stale_after", [0, -1, 2.5, True])
def test_a_staleness_that_is_none_is_refused(stale_after: object) -> None:
    with pytest.raises(redline.ConfigurationError, match=r"got stale_after=.*; expected a number of steps"):
        redline.StepClamp(stale_after=stale_after)  # type: ignore[arg-type]
