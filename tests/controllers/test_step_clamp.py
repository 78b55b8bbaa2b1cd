"""StepClamp: the step is as long as the radius allows, and otherwise the optimizer's own.

``r`` is held against a Jacobian in float64; what is committed, against an identical run that nobody controls.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import ControlledRun, HostReads, frozen
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.optim import Optimizer
from torch.utils.data import DataLoader

import redline
from redline import ConfigurationError, NonFiniteGuard, RedlineWarning, RunStoppedError, SpikeGuard, StepClamp
from redline.integrations.lightning import RedlineCallback
from redline.numerics import normalized_step_size

FEATURES, CLASSES, BATCH = 6, 3, 16
R = "redline_normalized_step_size"


# Runs -------------------------------------------------------------------------------------------------------------


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, CLASSES))


def normalizing() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, CLASSES))


def sgd(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-2)]


def adamw(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.AdamW(model.parameters(), 1e-2)]


def adamw_fused(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.AdamW(model.parameters(), 1e-2, fused=True)]


def muon_and_adamw(model: nn.Module) -> list[Optimizer]:
    parameters = list(model.parameters())
    return [
        torch.optim.Muon([parameter for parameter in parameters if parameter.dim() == 2], 0.02),
        torch.optim.AdamW([parameter for parameter in parameters if parameter.dim() != 2], 1e-2),
    ]


EVERY_OPTIMIZER = pytest.mark.parametrize(
    "optimizers", [sgd, adamw, adamw_fused, muon_and_adamw], ids=lambda make: make.__name__
)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, FEATURES, generator=generator)
    return x, torch.randint(0, CLASSES, (BATCH,), generator=generator)


class Run(ControlledRun):
    """A model with its optimizers; two made alike are alike."""

    def __init__(
        self, optimizers: Callable[[nn.Module], list[Optimizer]] = sgd, model: Callable[[], nn.Module] = plain
    ) -> None:
        torch.manual_seed(0)
        self.model = model()
        self.optimizers = optimizers(self.model)
        self.session: redline.Session | None = None

    def backward(self, seed: int) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        x, y = batch(seed)
        loss = F.cross_entropy(self.model(x), y)
        if self.session is not None:
            self.session.observe(loss=loss)
        loss.backward()

    def update(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def step(self, seed: int) -> None:
        self.backward(seed)
        self.update()

    def steps_of(self, seeds: Iterable[int]) -> None:
        for seed in seeds:
            self.step(seed)


def prepared(optimizers: Callable[[nn.Module], list[Optimizer]] = sgd, model: Callable[[], nn.Module] = plain) -> Run:
    """Two steps in, so that moments are there."""
    run = Run(optimizers, model)
    run.step(1)
    run.step(2)
    return run


def spreads(model: nn.Module, before: dict[str, Tensor], after: dict[str, Tensor], x: Tensor) -> np.ndarray:
    """Of each sample's logit tangent along the update, by the whole Jacobian in float64; dropout off."""
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    point = {name: tensor.double() for name, tensor in before.items()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def logits(parameters: dict[str, Tensor]) -> Tensor:
        state = {**parameters, **{name: buffer.clone() for name, buffer in buffers.items()}}
        return functional_call(model, state, (x.double(),))

    jacobian = jacrev(logits)(point)
    tangent = sum((jacobian[name].flatten(2) @ (after[name].double() - point[name]).flatten()) for name in point)
    return (tangent.amax(-1) - tangent.amin(-1)).numpy()


def reference(model: nn.Module, before: dict[str, Tensor], after: dict[str, Tensor], x: Tensor) -> float:
    return float(spreads(model, before, after, x).max() / math.pi)


def assert_scaled(
    actual: dict[str, Tensor], before: dict[str, Tensor], after: dict[str, Tensor], factor: float
) -> None:
    """``theta_before + factor * p`` to the rounding of float32; computed in float64."""
    for name in before:
        update = after[name].double() - before[name].double()
        expected = before[name].double() + factor * update
        bound = 2 * torch.finfo(torch.float32).eps * (expected.abs() + factor * update.abs())
        assert bool(((actual[name].double() - expected).abs() <= bound).all()), name


# The factor -------------------------------------------------------------------------------------------------------


@EVERY_OPTIMIZER
@pytest.mark.parametrize("model", [plain, dropping, normalizing], ids=lambda make: make.__name__)
@pytest.mark.parametrize("share", [0.4, 0.01])
def test_the_step_is_scaled_by_max_r_over_r(
    optimizers: Callable[[nn.Module], list[Optimizer]], model: Callable[[], nn.Module], share: float
) -> None:
    alone, run = prepared(optimizers, model), prepared(optimizers, model)
    before = alone.parameters
    assert frozen(before) == frozen(run.parameters)
    torch.manual_seed(5)
    alone.step(3)
    r = reference(alone.model, before, alone.parameters, batch(3)[0])
    max_r = share * r
    torch.manual_seed(5)
    with run.attach(StepClamp(max_r), monitors=[redline.GhostRadius(1)]) as session:
        run.step(3)
        latest = session.latest
    (one,) = session.interventions
    assert (one.step, one.controller, one.action) == (0, "StepClamp", "scale")
    assert one.saw["r"] == pytest.approx(r, rel=1e-4)
    assert one.saw["scale"] == pytest.approx(share, rel=1e-4)
    assert one.saw["max_r"] == max_r
    assert one.reason == f"r = {r:.3g} was over {max_r:.3g}: the step was scaled by {share:.3g}."
    assert_scaled(run.parameters, before, alone.parameters, one.saw["scale"])
    assert frozen([o.state_dict() for o in run.optimizers]) == frozen([o.state_dict() for o in alone.optimizers])
    assert frozen(dict(run.model.named_buffers())) == frozen(dict(alone.model.named_buffers()))
    assert latest.value(R) == pytest.approx(r, rel=1e-4), "r is of the step as proposed"
    assert latest.value("redline_committed_step_size") == pytest.approx(max_r, rel=1e-4)
    assert latest.value("redline_step_scale") == one.saw["scale"]


@EVERY_OPTIMIZER
def test_every_step_is_scaled_by_the_lesser_of_1_and_max_r_over_r(
    optimizers: Callable[[nn.Module], list[Optimizer]],
) -> None:
    """Along a run in which some steps are too long; those that are not are the optimizer's own."""
    run, max_r, clamped = prepared(optimizers), 0.1, []
    with run.attach(StepClamp(max_r)) as session:
        for seed in range(3, 13):
            alone, before = run.uncontrolled(), run.parameters
            if seed % 3 == 0:
                rates = [group["lr"] for o in (*run.optimizers, *alone.optimizers) for group in o.param_groups]
                for o in (*run.optimizers, *alone.optimizers):
                    for group in o.param_groups:
                        group["lr"] *= 30
            alone.step(seed)
            run.step(seed)
            if seed % 3 == 0:
                for o in (*run.optimizers, *alone.optimizers):
                    for group in o.param_groups:
                        group["lr"] = rates.pop(0)
            after = alone.parameters
            factor = min(1.0, max_r / reference(alone.model, before, after, batch(seed)[0]))
            assert session.latest.value("redline_step_scale") == pytest.approx(factor, rel=1e-4)
            clamped.append(factor < 1)
            if factor == 1:
                assert frozen(run.parameters) == frozen(after)
            else:
                assert_scaled(run.parameters, before, after, session.latest.value("redline_step_scale"))
    assert 0 < sum(clamped) < len(clamped)
    assert [one.step for one in session.interventions] == [step for step, was in enumerate(clamped) if was]


@EVERY_OPTIMIZER
@pytest.mark.parametrize("model", [plain, dropping, normalizing], ids=lambda make: make.__name__)
def test_a_run_of_short_steps_is_its_own_to_the_bit(
    optimizers: Callable[[nn.Module], list[Optimizer]], model: Callable[[], nn.Module]
) -> None:
    alone, run = Run(optimizers, model), Run(optimizers, model)
    torch.manual_seed(5)
    for seed in range(5):
        alone.step(seed)
    random_state = torch.get_rng_state()
    torch.manual_seed(5)
    with run.attach(StepClamp(1e4)) as session:
        for seed in range(5):
            run.step(seed)
        assert session.latest.value("redline_step_scale") == 1
        assert session.latest.value("redline_committed_step_size") > 0, "it was measured"
    assert run.everything == alone.everything
    assert torch.equal(torch.get_rng_state(), random_state)
    assert session.interventions == ()


def test_a_step_exactly_as_long_as_allowed_is_left_alone() -> None:
    probe = prepared()
    with probe.attach(StepClamp(1e-3)) as session:
        probe.step(3)
    r = session.interventions[0].saw["r"]
    alone, exact, below = prepared(), prepared(), prepared()
    alone.step(3)
    with exact.attach(StepClamp(r)) as session:
        exact.step(3)
    assert exact.everything == alone.everything
    assert session.interventions == ()
    with below.attach(StepClamp(r * (1 - 1e-6))) as session:
        below.step(3)
    assert len(session.interventions) == 1


def test_the_default_is_the_redline() -> None:
    assert StepClamp().max_r == 1.0
    run = Run(lambda model: [torch.optim.SGD(model.parameters(), 100.0)])
    with run.attach(StepClamp()) as session:
        run.step(1)
    (one,) = session.interventions
    assert one.saw["r"] > 1
    assert one.saw["scale"] * one.saw["r"] == pytest.approx(1)


# Reductions -------------------------------------------------------------------------------------------------------


@st.composite
def spread_lists(draw: st.DrawFn) -> tuple[list[int], list[bool]]:
    """With many ties, in eighths; and which of them count."""
    values = draw(st.lists(st.integers(0, draw(st.sampled_from([2, 8, 1000]))), min_size=1, max_size=40))
    return values, draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))


SHARES = [Fraction(1, 10), Fraction(3, 10), Fraction(9, 10), Fraction(1, 3), Fraction(2, 3), Fraction(7, 10)]
SHARES += [Fraction(99, 100), Fraction(1, 2), Fraction(1)]


@settings(max_examples=300, deadline=None)
@given(
    given_spreads=spread_lists(),
    share=st.one_of(st.sampled_from(SHARES), st.fractions(Fraction(1, 50), 1, max_denominator=50)),
    masked=st.booleans(),
    offset=st.integers(-5, 5),
    classes=st.sampled_from([1, 2, 4]),
)
def test_quantile_is_the_smallest_spread_that_so_many_do_not_exceed(
    given_spreads: tuple[list[int], list[bool]], share: Fraction, masked: bool, offset: int, classes: int
) -> None:
    """The definition, counted out in fractions; and numpy's inverted distribution function."""
    values, mask = given_spreads
    spread = torch.tensor(values, dtype=torch.float64) / 8
    columns = {1: [spread], 2: [spread, 0 * spread], 4: [0.5 * spread, 0 * spread, spread, 0.25 * spread]}[classes]
    tangent = torch.stack(columns, -1) + (offset if classes > 1 else 0)
    counted = sorted(value for value, counts in zip(values, mask, strict=True) if counts or not masked)
    expected = 0.0
    if counted:
        enough = [s for s in counted if sum(v <= s for v in counted) >= share * len(counted)]
        expected = min(enough) / 8
        if share in SHARES:
            position = np.quantile(np.array(counted) / 8, float(share), method="inverted_cdf")
            if (share * len(counted)).denominator != 1:  # else numpy, too, may fall to rounding
                assert position == expected
    given_mask = torch.tensor(mask) if masked else None
    found = normalized_step_size(tangent, given_mask, float(share))
    assert found.shape == ()
    assert float(found) == pytest.approx(expected / math.pi, rel=1e-12)


def test_quantile_falls_to_no_rounding() -> None:
    """7 % of 100 are 7, and not the 7.000000000000001 of floating point; every percentage of every number."""
    for positions in range(1, 101):
        tangent = torch.arange(1, positions + 1, dtype=torch.float64).reshape(-1, 1)
        for percent in range(1, 101, 1 if positions % 25 == 0 else 7):
            rank = -(-percent * positions // 100)
            assert round(float(normalized_step_size(tangent, None, percent / 100)) * math.pi, 9) == rank


def test_quantile_of_many_positions_in_more_dimensions() -> None:
    generator = np.random.default_rng(0)
    tangent = generator.normal(size=(40, 50, 7))
    mask = generator.random((40, 50)) < 0.6
    counted = np.sort(np.ptp(tangent, axis=-1)[mask])
    for share in (0.1, 0.3, 0.5, 0.9, 0.99, 1 / 3, 1.0):
        expected = counted[math.ceil(Fraction(share).limit_denominator(1000) * len(counted)) - 1] / math.pi
        found = normalized_step_size(torch.tensor(tangent), torch.tensor(mask), share)
        assert float(found) == pytest.approx(expected, rel=1e-12)


def test_nan_counts_as_the_largest_and_only_where_it_counts() -> None:
    tangent = torch.tensor([[0.0, 1.0], [0.0, math.nan], [0.0, 3.0], [0.0, 2.0]])
    mask = torch.tensor([True, False, True, True])
    assert math.isnan(normalized_step_size(tangent))
    assert math.isnan(normalized_step_size(tangent, None, 0.9))
    assert float(normalized_step_size(tangent, None, 0.75)) == pytest.approx(3 / math.pi)
    assert float(normalized_step_size(tangent, mask)) == pytest.approx(3 / math.pi)
    assert float(normalized_step_size(tangent, mask, 0.9)) == pytest.approx(3 / math.pi)
    nothing = torch.zeros(4, dtype=torch.bool)
    assert float(normalized_step_size(tangent, nothing)) == float(normalized_step_size(tangent, nothing, 0.5)) == 0


@pytest.mark.parametrize("reduction", ["max", 1.0, 1, 0.9, 0.5, 0.1])
def test_the_clamp_holds_the_quantile_asked_for(reduction: Any) -> None:
    alone, run = prepared(), prepared()
    before = run.parameters
    alone.step(3)
    each = np.sort(spreads(alone.model, before, alone.parameters, batch(3)[0])) / math.pi
    r = each[math.ceil((1 if reduction == "max" else reduction) * BATCH - 1e-9) - 1]
    with run.attach(StepClamp(0.5 * r, reduction=reduction)) as session:
        run.step(3)
    (one,) = session.interventions
    assert one.saw["r"] == pytest.approx(r, rel=1e-4)
    assert_scaled(run.parameters, before, alone.parameters, one.saw["scale"])


@pytest.mark.parametrize("samples", [1, 4, 5, 16, 100, None])
def test_r_is_of_so_many_samples_spread_over_the_batch(samples: int | None) -> None:
    alone, run = prepared(), prepared()
    before = run.parameters
    alone.step(3)
    each = spreads(alone.model, before, alone.parameters, batch(3)[0]) / math.pi
    used = min(samples or BATCH, BATCH)
    r = max(each[k * BATCH // used] for k in range(used))
    with run.attach(StepClamp(1e-3, max_samples=samples)) as session:
        run.step(3)
    assert session.interventions[0].saw["r"] == pytest.approx(r, rel=1e-4)


def test_where_batch_statistics_couple_the_samples_r_is_of_the_whole_batch() -> None:
    alone, run = prepared(sgd, normalizing), prepared(sgd, normalizing)
    before = run.parameters
    alone.step(3)
    each = spreads(alone.model, before, alone.parameters, batch(3)[0]) / math.pi
    assert each[::4].max() < 0.99 * each.max(), "the samples that would have been taken"
    with run.attach(StepClamp(1e-3, max_samples=4)) as session:
        run.step(3)
    assert session.interventions[0].saw["r"] == pytest.approx(each.max(), rel=1e-4)


class Tagger(nn.Module):
    """One answer a word; where the word is 0 there is padding, whose logits move farther than all others'."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 5)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, words: Tensor) -> SimpleNamespace:
        logits = self.head(self.embedding(words)) * torch.where(words == 0, 50.0, 1.0).unsqueeze(-1)
        return SimpleNamespace(logits=logits, counted=words != 0)


def test_positions_that_do_not_count_are_left_out() -> None:
    words = torch.randint(0, 9, (8, 5), generator=torch.Generator().manual_seed(0))
    tags = torch.where(words == 0, -100, words % CLASSES)

    def step(run: Run) -> None:
        F.cross_entropy(run.model(words).logits.flatten(0, 1), tags.flatten(), ignore_index=-100).backward()
        run.update()

    alone, masked, unmasked = (Run(sgd, Tagger) for _ in range(3))
    before = alone.parameters
    step(alone)
    after = alone.parameters
    h = 1e-4
    ends = []
    for sign in (1, -1):
        model = copy.deepcopy(alone.model).double()
        moved = {n: before[n].double() + sign * h * (after[n].double() - before[n].double()) for n in before}
        ends.append(functional_call(model, moved, (words,)).logits)
    each = np.ptp(((ends[0] - ends[1]) / (2 * h)).detach().numpy(), axis=-1) / math.pi
    r = each[(words != 0).numpy()].max()
    assert each.max() > 2 * r
    with masked.attach(StepClamp(0.5 * r), logits=lambda output: (output.logits, output.counted)) as session:
        step(masked)
    assert session.interventions[0].saw["r"] == pytest.approx(r, rel=1e-4)
    assert_scaled(masked.parameters, before, after, session.interventions[0].saw["scale"])
    with unmasked.attach(StepClamp(0.5 * r)) as session:
        step(unmasked)
    assert session.interventions[0].saw["r"] == pytest.approx(each.max(), rel=1e-4)


# Where in the loop ------------------------------------------------------------------------------------------------


def test_under_accumulation_r_is_that_of_the_last_micro_batch() -> None:
    def step(run: Run) -> None:
        for seed in (3, 4, 5):
            x, y = batch(seed)
            (F.cross_entropy(run.model(x), y) / 3).backward()
        run.update()

    alone, run = Run(), Run()
    before = run.parameters
    step(alone)
    each = [reference(alone.model, before, alone.parameters, batch(seed)[0]) for seed in (3, 4, 5)]
    assert len({round(r / each[-1], 3) for r in each}) == 3
    with run.attach(StepClamp(0.5 * each[-1])) as session:
        step(run)
    (one,) = session.interventions
    assert one.saw["r"] == pytest.approx(each[-1], rel=1e-4)
    assert_scaled(run.parameters, before, alone.parameters, one.saw["scale"])


@pytest.mark.parametrize("fused", [False, True])
def test_under_a_grad_scaler_the_step_that_is_taken_is_clamped_and_the_skipped_one_is_not(fused: bool) -> None:
    def optimizers(model: nn.Module) -> list[Optimizer]:
        return [torch.optim.AdamW(model.parameters(), 1e-2, fused=fused)]

    def step(run: Run, scaler: torch.amp.GradScaler, seed: int, overflow: bool = False) -> None:
        run.optimizers[0].zero_grad()
        x, y = batch(seed)
        scaler.scale(F.cross_entropy(run.model(x), y)).backward()
        if overflow:
            next(run.model.parameters()).grad.fill_(math.inf)  # type: ignore[union-attr]
        scaler.step(run.optimizers[0])
        scaler.update()

    alone, run = Run(optimizers), Run(optimizers)
    of_alone, of_run = (torch.amp.GradScaler("cpu", init_scale=2.0**10) for _ in range(2))
    before = run.parameters
    for one, scaler in ((alone, of_alone), (run, of_run)):
        if one is run:
            run.attach(StepClamp(0.05))
        step(one, scaler, 1, overflow=True)
        assert frozen(one.parameters) == frozen(before)
        step(one, scaler, 2)
    assert run.session is not None
    run.session.close()
    r = reference(alone.model, before, alone.parameters, batch(2)[0])
    assert r > 0.05
    (one,) = run.session.interventions
    assert one.saw["r"] == pytest.approx(r, rel=1e-4)
    assert_scaled(run.parameters, before, alone.parameters, one.saw["scale"])
    assert of_run.state_dict() == of_alone.state_dict()


def test_a_step_without_a_forward_is_left_alone_once_one_was_measured() -> None:
    run = Run()
    with run.attach(StepClamp(1e-3)) as session:
        run.step(1)
        assert len(session.interventions) == 1
        alone = run.uncontrolled()
        for seed in (2, 3):
            for one in (alone, run):
                for k, parameter in enumerate(one.model.parameters()):
                    generator = torch.Generator().manual_seed(10 * seed + k)
                    parameter.grad = torch.randn(parameter.shape, generator=generator)
            alone.update()
            if seed == 2:
                with pytest.warns(RedlineWarning, match="was not called in training mode"):
                    run.update()
            else:
                run.update()  # said once; again would be an error here
        assert run.everything == alone.everything
        assert session.latest.measured_at[redline.Series("redline_committed_step_size")] == 0
        assert session.latest.value("redline_step_scale") == 1
    assert len(session.interventions) == 1


def test_positions_with_nan_logits_say_nothing_and_the_others_hold_the_step() -> None:
    """As though they had been masked."""

    def broken(output: Tensor) -> Tensor:
        return torch.cat([output[:1] * math.nan, output[1:]])

    def masked(output: Tensor) -> tuple[Tensor, Tensor]:
        return output, torch.arange(len(output)) > 0

    held = []
    for logits in (broken, masked):
        run = Run()
        with run.attach(StepClamp(1e-3), logits=logits) as session:
            run.step(1)
        (one,) = session.interventions
        held.append((one.saw["r"], run.everything))
    assert held[0][0] == pytest.approx(held[1][0], rel=1e-6)
    assert held[0] == held[1]


def test_step_of_which_no_position_says_anything_is_left_alone() -> None:
    alone, run = Run(), Run()
    with run.attach(StepClamp(1e-3), logits=lambda output: output * math.nan) as session:
        for seed in (1, 2):
            alone.step(seed)
            run.step(seed)
    assert run.everything == alone.everything
    assert session.interventions == ()


# Steps that are not finite ----------------------------------------------------------------------------------------


def overlong() -> tuple[Run, Callable[[Run], None]]:
    """A run, and a step of it whose update is finite, along which the logits' tangent is not."""
    run = Run(lambda model: [torch.optim.SGD(model.parameters(), 1e-10, momentum=0.9)], lambda: nn.Linear(4, 3))
    run.model.get_parameter("bias").data[0] = -0.0  # whose sign a sum with 0 would lose

    def step(run: Run) -> None:
        run.optimizers[0].zero_grad()
        x = 1e25 * torch.ones(1, 4)
        F.cross_entropy(run.model(x), run.model(x).argmin(-1)).backward()
        run.update()

    return run, step


def test_of_a_step_that_is_infinitely_too_long_nothing_is_committed() -> None:
    (alone, step), (run, _) = overlong(), overlong()
    before = frozen(run.parameters)
    step(alone)
    assert frozen(alone.parameters) != before
    assert all(bool(tensor.isfinite().all()) for tensor in alone.parameters.values())
    with run.attach(StepClamp()) as session:
        step(run)
        assert frozen(run.parameters) == before
        assert session.latest.value("redline_committed_step_size") == 0
        assert session.latest.value("redline_step_scale") == 0
    (one,) = session.interventions
    assert (one.action, one.saw["r"], one.saw["scale"]) == ("scale", math.inf, 0)
    assert frozen(run.optimizers[0].state_dict()) == frozen(alone.optimizers[0].state_dict())


@EVERY_OPTIMIZER
@pytest.mark.parametrize("rate", [math.nan, math.inf])
def test_an_update_that_is_not_finite_is_rejected(
    optimizers: Callable[[nn.Module], list[Optimizer]], rate: float
) -> None:
    run = prepared(optimizers)
    before = frozen(run.parameters)
    with run.attach(StepClamp()) as session:
        for optimizer in run.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        with pytest.raises(RunStoppedError, match=r"StepClamp rejected step 0: the update was not finite \(norm"):
            run.step(3)
    assert frozen(run.parameters) == before
    assert [one.action for one in session.interventions] == ["reject"]


# Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_r", [0, 0.0, -1.0, math.nan, math.inf, -math.inf])
def test_a_limit_that_is_not_positive_is_refused(max_r: float) -> None:
    with pytest.raises(ConfigurationError, match=f"got max_r={max_r}; expected a positive number of radii"):
        StepClamp(max_r)


@pytest.mark.parametrize("reduction", [0, 0.0, -0.1, 1.0001, 2, math.nan, "min", "0.5", None])
def test_a_quantile_outside_0_to_1_is_refused(reduction: Any) -> None:
    with pytest.raises(
        ConfigurationError, match=rf"got reduction={reduction!r}; expected 'max' or a quantile in \(0, 1\]"
    ):
        StepClamp(reduction=reduction)


@pytest.mark.parametrize("samples", [0, -1])
def test_fewer_than_one_sample_is_refused(samples: int) -> None:
    with pytest.raises(ConfigurationError, match=f"got max_samples={samples}; expected at least 1, or None"):
        StepClamp(max_samples=samples)


class Answering(nn.Module):
    """Its output is made of the logits."""

    def __init__(self, answer: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net = plain()
        self.answer = answer

    def forward(self, x: Tensor) -> Any:
        return self.answer(self.net(x))


@pytest.mark.parametrize(
    ("answer", "logits", "message"),
    [
        (lambda z: {"scores": z}, lambda output: output["scores"], "got a dict as logits; .* Pass `logits=`"),
        (lambda z: (z, z.sum()), lambda output: output[0], "got a tuple as logits|got a mask"),
        (lambda z: z.logsumexp(-1).mean(), None, r"got a torch.float32 tensor of shape \(\) as logits; .*`logits=`"),
    ],
    ids=["a dict", "a tuple", "a loss"],
)
def test_an_output_without_logits_is_refused_at_the_first_step_and_nothing_is_scaled(
    answer: Callable[[Tensor], Any], logits: Callable[[Any], Tensor] | None, message: str
) -> None:
    def step(run: Run) -> None:
        x, y = batch(1)
        output = run.model(x)
        (output if logits is None else F.cross_entropy(logits(output), y)).backward()
        run.update()

    alone, run = Run(sgd, lambda: Answering(answer)), Run(sgd, lambda: Answering(answer))
    step(alone)
    with run.attach(StepClamp(1e-6)) as session, pytest.raises(ConfigurationError, match=message):
        step(run)
    assert run.everything == alone.everything, "the step is the optimizer's own"
    assert session.interventions == ()
    if logits is not None:  # the remedy works
        again = Run(sgd, lambda: Answering(answer))
        with again.attach(StepClamp(1e-6), logits=logits) as session:
            step(again)
        assert len(session.interventions) == 1


@pytest.mark.parametrize("others", [[], [NonFiniteGuard()]], ids=["alone", "with a guard"])
def test_a_model_never_called_in_training_mode_is_refused_at_the_first_step(others: list[Any]) -> None:
    alone, run = Run(), Run()
    alone.model.eval()
    run.model.eval()
    alone.step(1)
    with (
        run.attach(*others, StepClamp(1e-6)) as session,
        pytest.warns(RedlineWarning, match="was not called in training mode"),
        pytest.raises(
            ConfigurationError, match=r"got no logits to measure the first step by .*Pass module= and logits="
        ),
    ):
        run.step(1)
    assert run.everything == alone.everything, "the step is the optimizer's own"
    assert session.interventions == ()


REGRESSIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": F.mse_loss,
    "smooth l1": F.smooth_l1_loss,
    "huber": F.huber_loss,
    "mse, weighted": lambda z, y: 0.5 * F.mse_loss(z, y, reduction="none").sum(-1).mean() / 4,
}


@pytest.mark.parametrize("kind", REGRESSIONS)
def test_a_loss_that_is_no_cross_entropy_is_refused_when_it_is_observed(kind: str) -> None:
    run = Run()
    untouched = run.everything
    x, y = batch(1)
    with run.attach(StepClamp(1e-6)) as session:
        loss = REGRESSIONS[kind](run.model(x), F.one_hot(y, CLASSES).float())
        with pytest.raises(
            ConfigurationError, match=r"got a loss made by \w+Loss; expected a cross-entropy .*Leave the"
        ):
            session.observe(loss=loss)
    assert run.everything == untouched
    with run.attach(NonFiniteGuard(), SpikeGuard()) as session:  # which work with any loss
        session.observe(loss=loss)


CROSS_ENTROPIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross-entropy": F.cross_entropy,
    "smoothed": lambda z, y: F.cross_entropy(z, y, label_smoothing=0.1),
    "nll": lambda z, y: F.nll_loss(z.log_softmax(-1), y),
    "soft targets": lambda z, y: F.cross_entropy(z, F.one_hot(y, CLASSES).float()),
    "binary": lambda z, y: F.binary_cross_entropy_with_logits(z, F.one_hot(y, CLASSES).float()),
    "distillation": lambda z, y: F.kl_div(z.log_softmax(-1), torch.full_like(z, 1 / CLASSES), reduction="batchmean"),
    "by hand": lambda z, y: (z.logsumexp(-1) - z.gather(-1, y[:, None])[:, 0]).mean(),
    "and an auxiliary regression": lambda z, y: F.cross_entropy(z, y) + 0.1 * F.mse_loss(z, torch.zeros_like(z)),
    "by hand, from probabilities": lambda z, y: -z.softmax(-1).gather(-1, y[:, None]).log().mean(),
}


@pytest.mark.parametrize("kind", CROSS_ENTROPIES)
def test_a_cross_entropy_is_not_refused(kind: str) -> None:
    run = Run()
    x, y = batch(1)
    with run.attach(StepClamp(1e-6)) as session:
        loss = CROSS_ENTROPIES[kind](run.model(x), y) / 4
        session.observe(loss=loss)
        loss.backward()
        run.update()
    assert len(session.interventions) == 1


class Regression(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = plain()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, data: tuple[Tensor, Tensor], index: int) -> Tensor:
        return F.mse_loss(self(data[0]), F.one_hot(data[1], CLASSES).float())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning", "ignore::FutureWarning")
def test_a_fit_of_a_regression_is_refused_at_its_first_step() -> None:
    """Lightning hands over the loss by itself, so that it can be told."""
    torch.manual_seed(0)
    module = Regression()
    untouched = frozen(module.state_dict())
    callback = RedlineCallback(monitors=[], controllers=[StepClamp(1e-6)])
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.raises(ConfigurationError, match="got a loss made by MseLoss; expected a cross-entropy"):
        trainer.fit(module, DataLoader([batch(1), batch(2)], batch_size=None))  # type: ignore[arg-type]
    assert frozen(module.state_dict()) == untouched


# Optimizers that would undo it ------------------------------------------------------------------------------------


class Descent(Optimizer):
    """Gradient descent, for others to build on."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.move(parameter, group["lr"])

    def move(self, parameter: Tensor, rate: float) -> None:
        parameter -= rate * parameter.grad


class SGDScheduleFree(Descent):
    """The parameters are an average of a sequence ``z`` that is kept in the state."""

    def move(self, parameter: Tensor, rate: float) -> None:
        state = self.state[parameter]
        if not state:
            state["z"] = parameter.clone()
        state["z"] -= rate * parameter.grad
        parameter.lerp_(state["z"], 0.1)


class Averaging(SGDScheduleFree):
    """The same under a name that says nothing."""


class Lookahead(Descent):
    def move(self, parameter: Tensor, rate: float) -> None:
        state = self.state[parameter]
        if not state:
            state["slow"] = parameter.clone()
        super().move(parameter, rate)
        parameter.copy_(state["slow"].lerp_(parameter, 0.5))


class Precise(Descent):
    """Keeps float32 masters of half-precision parameters, under a key that nobody knows."""

    def move(self, parameter: Tensor, rate: float) -> None:
        state = self.state[parameter]
        if not state:
            state["wide"] = parameter.float()
        state["wide"] -= rate * parameter.grad.float()
        parameter.copy_(state["wide"])


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (SGDScheduleFree, "SGDScheduleFree keeps shadow weights"),
        (Lookahead, "Lookahead keeps shadow weights"),
        (torch.optim.LBFGS, "LBFGS moves the parameters many times within one step"),
    ],
)
def test_an_optimizer_known_to_undo_it_is_refused_at_once(kind: type[Optimizer], reason: str) -> None:
    run = Run(lambda model: [kind(model.parameters(), lr=0.1)])  # type: ignore[call-arg]
    untouched = run.everything
    with pytest.raises(
        ConfigurationError, match=f"got controllers on {kind.__name__}, which may only be monitored: {reason}"
    ):
        run.attach(StepClamp())
    assert run.everything == untouched
    with run.attach():  # watching is fine
        pass


@pytest.mark.parametrize(("kind", "dtype", "key"), [(Averaging, torch.float32, "z"), (Precise, torch.bfloat16, "wide")])
def test_an_optimizer_found_to_undo_it_is_refused_at_the_first_step(
    kind: type[Descent], dtype: torch.dtype, key: str
) -> None:
    alone, run = (
        Run(lambda model: [kind(model.parameters(), 0.1)], lambda: Answering(Tensor.float).to(dtype)) for _ in range(2)
    )

    def step(run: Run) -> None:
        x, y = batch(1)
        F.cross_entropy(run.model(x.to(dtype)), y).backward()
        run.update()

    step(alone)
    with (
        run.attach(StepClamp(1e-6)) as session,
        pytest.raises(ConfigurationError, match=rf"on {kind.__name__}.*keeps shadow weights \(state '{key}'\)"),
    ):
        step(run)
    assert run.everything == alone.everything, "nothing was scaled"
    assert session.interventions == ()


# On an accelerator ------------------------------------------------------------------------------------------------


@pytest.fixture
def accelerated(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, tensors pass for those of an accelerator, whose values nobody on the host knows."""

    def begin() -> None:
        for module in ("interventions", "control"):
            monkeypatch.setattr(f"redline.{module}.is_on_host", lambda tensor: False)

    return begin


def all_three() -> list[redline.Controller]:
    return [NonFiniteGuard(), SpikeGuard(), StepClamp(0.1)]


def long_steps(run: Run, seeds: Sequence[int]) -> None:
    """Every third step is far too long, every seventh batch has a NaN in its gradients."""
    for seed in seeds:
        run.backward(seed)
        factor = 30 if seed % 3 == 0 else 1
        if seed % 7 == 0:
            next(run.model.parameters()).grad.view(-1)[0] = math.nan  # type: ignore[union-attr]
        for optimizer in run.optimizers:
            for group in optimizer.param_groups:
                group["lr"] *= factor
        run.update()
        for optimizer in run.optimizers:
            for group in optimizer.param_groups:
                group["lr"] /= factor


@EVERY_OPTIMIZER
@pytest.mark.parametrize("model", [plain, normalizing], ids=lambda make: make.__name__)
def test_on_an_accelerator_the_run_is_the_same(
    optimizers: Callable[[nn.Module], list[Optimizer]],
    model: Callable[[], nn.Module],
    accelerated: Callable[[], None],
) -> None:
    def run() -> tuple[Any, ...]:
        one = Run(optimizers, model)
        with one.attach(*all_three()) as session:
            long_steps(one, range(1, 16))
            gauges = {
                name: session.latest.value(name) for name in ("redline_step_scale", "redline_committed_step_size")
            }
            counters = {name: session.latest.series(f"redline_{name}_total") for name in ("interventions", "steps")}
        return one.everything, repr(session.interventions), counters, gauges, repr(session.report().to_dict()["notes"])

    on_host = run()
    accelerated()
    on_device = run()
    for what, host, device in zip(("run", "trace", "counters", "gauges", "notes"), on_host, on_device, strict=True):
        assert device == host, what
    assert "'scale'" in on_host[1]
    assert "'withhold'" in on_host[1]


def test_on_an_accelerator_an_infinite_r_commits_nothing(accelerated: Callable[[], None]) -> None:
    accelerated()
    run, step = overlong()
    before = frozen(run.parameters)
    with run.attach(StepClamp()) as session:
        step(run)
        assert frozen(run.parameters) == before
        assert session.latest.value("redline_committed_step_size") == 0
        assert session.latest.value("redline_step_scale") == 0
        assert [(one.action, one.saw["r"], one.saw["scale"]) for one in session.interventions] == [
            ("scale", math.inf, 0)
        ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_on_an_accelerator_the_run_is_the_same_in_other_precisions(
    dtype: torch.dtype, accelerated: Callable[[], None]
) -> None:
    def run() -> tuple[Any, str]:
        one = Run(sgd, lambda: Answering(Tensor.float if dtype is torch.bfloat16 else Tensor.clone).to(dtype))
        with one.attach(NonFiniteGuard(), StepClamp(0.1)) as session:
            for seed in range(6):
                one.optimizers[0].zero_grad()
                one.optimizers[0].param_groups[0]["lr"] = 3.0 if seed % 2 else 1e-2
                x, y = batch(seed)
                F.cross_entropy(one.model(x.to(dtype)), y).backward()
                one.update()
            assert 0 < len(session.interventions) < 6
            return one.everything, repr(session.interventions)

    on_host = run()
    accelerated()
    assert run() == on_host


@pytest.mark.parametrize("optimizers", [sgd, adamw_fused], ids=lambda make: make.__name__)
@pytest.mark.parametrize("model", [plain, dropping, normalizing], ids=lambda make: make.__name__)
def test_on_an_accelerator_nobody_waits_twice_a_step(
    optimizers: Callable[[nn.Module], list[Optimizer]],
    model: Callable[[], nn.Module],
    accelerated: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import redline.interventions
    import redline.readings

    def waits(**clamp: Any) -> list[int]:
        """At each step of a run with a step too long now and then; the first is left out."""
        copies: list[int] = []
        for module in (redline.interventions, redline.readings):
            bring = module.to_host
            monkeypatch.setattr(module, "to_host", lambda tensors, bring=bring: (copies.append(1), bring(tensors))[1])
        found = []
        run = Run(optimizers, model)
        with run.attach(NonFiniteGuard(), SpikeGuard(), StepClamp(0.1, **clamp)) as session:
            for seed in range(1, 9):
                run.backward(seed)
                for optimizer in run.optimizers:
                    optimizer.param_groups[0]["lr"] = 0.5 if seed % 3 == 0 else 1e-3
                copies.clear()
                with HostReads() as reads:
                    run.update()
                found.append(len(copies) + len(reads.seen))
            copies.clear()
            assert {one.action for one in session.interventions} == {"scale"}
            assert 1 < len(session.interventions) < 8
        return found[1:]

    bare = Run(optimizers, model)
    bare.step(1)
    bare.backward(2)
    with HostReads() as reads:
        bare.update()
    assert reads.seen == [], "the optimizer itself waits for nothing"
    assert min(waits()) > 1, "on the host it costs nothing to look"
    accelerated()
    assert waits() == [2] * 7, "once before the update, for the guards, and once after it, for the clamp"
    accelerated()
    assert waits(stale_after=1) == [1] * 7, "a clamp that measures every step need not ask"


@pytest.mark.parametrize(
    "controllers",
    [lambda: [NonFiniteGuard()], all_three, lambda: [StepClamp(), NonFiniteGuard()]],
    ids=["guard", "all three", "clamp and guard"],
)
@pytest.mark.parametrize("optimizers", [sgd, adamw, muon_and_adamw], ids=lambda make: make.__name__)
def test_on_an_accelerator_an_update_that_is_not_finite_is_taken_back_at_once_and_the_run_stops_before_its_next(
    optimizers: Callable[[nn.Module], list[Optimizer]],
    controllers: Callable[[], list[redline.Controller]],
    accelerated: Callable[[], None],
) -> None:
    accelerated()
    run = prepared(optimizers)
    with run.attach(*controllers()) as session:
        run.step(3)
        before = frozen(run.parameters)
        rates = [group["lr"] for optimizer in run.optimizers for group in optimizer.param_groups]
        for optimizer in run.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = math.nan
        run.step(4)
        assert frozen(run.parameters) == before
        state = run.everything
        for optimizer in run.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rates.pop(0)
        run.backward(5)
        with pytest.raises(RunStoppedError, match=r"rejected step 1: the update was not finite \(norm nan\)"):
            run.update()
        assert frozen(run.parameters) == before
        assert run.everything[1][0]["state"] == state[1][0]["state"]
    assert [(one.step, one.action) for one in session.interventions if one.step] == [(1, "reject")], "once"


def test_on_an_accelerator_the_clamp_alone_waits_for_nothing_and_the_run_stops_once_the_rejection_is_read(
    accelerated: Callable[[], None],
) -> None:
    accelerated()
    run = prepared(sgd)
    with run.attach(StepClamp()) as session:
        run.step(3)
        before = frozen(run.parameters)
        rate = run.optimizers[0].param_groups[0]["lr"]
        run.optimizers[0].param_groups[0]["lr"] = math.nan
        for seed in (4, 5):
            run.step(seed)
            assert frozen(run.parameters) == before
        run.optimizers[0].param_groups[0]["lr"] = rate
        assert [(one.step, one.action) for one in session.interventions] == [(1, "reject"), (2, "reject")]
        run.backward(6)
        with pytest.raises(RunStoppedError, match=r"StepClamp rejected step \d: the update was not finite"):
            run.update()
        assert frozen(run.parameters) == before


def test_on_an_accelerator_what_nobody_reads_is_read_in_the_end(accelerated: Callable[[], None]) -> None:
    accelerated()
    run = prepared(sgd)
    seeds = iter(range(100))
    with run.attach(StepClamp()):
        run.optimizers[0].param_groups[0]["lr"] = math.nan
        with pytest.raises(RunStoppedError, match="StepClamp rejected step"):
            run.steps_of(seeds)
    assert 30 < len(list(seeds)) < 99, "within 64 steps or so, and not at once"


def test_on_an_accelerator_a_checkpoint_that_is_loaded_ends_a_rejection_that_nobody_read(
    accelerated: Callable[[], None],
) -> None:
    accelerated()
    run = prepared(sgd)
    with run.attach(NonFiniteGuard()) as session:
        run.step(3)
        saved = copy.deepcopy((session.state_dict(), run.model.state_dict(), run.optimizers[0].state_dict()))
        run.optimizers[0].param_groups[0]["lr"] = math.nan
        run.step(4)
        session.load_state_dict(saved[0])
        run.model.load_state_dict(saved[1])
        run.optimizers[0].load_state_dict(saved[2])
        run.step(4)
    assert session.interventions == ()


def test_on_an_accelerator_a_restored_state_makes_a_rejected_step_no_step(accelerated: Callable[[], None]) -> None:
    accelerated()
    alone, run = prepared(adamw), prepared(adamw)
    with run.attach(NonFiniteGuard(restore_state=True), StepClamp(1e4)) as session:
        run.optimizers[0].param_groups[0]["lr"] = math.nan
        run.step(3)
        run.optimizers[0].param_groups[0]["lr"] = alone.optimizers[0].param_groups[0]["lr"]
        assert run.everything == alone.everything
        alone.step(4)
        run.step(4)
    assert run.everything == alone.everything
    assert [one.action for one in session.interventions] == ["reject"]


class Rejecting(redline.Controller):
    """Knows by itself that it rejects; only what it saw is still on the device."""

    def inspect(self, step: redline.Step) -> list[redline.Reject]:
        return [redline.Reject("tau = {tau:.3g}.", {"tau": step.update.norm})] if step.index == 1 else []


@pytest.mark.parametrize("on_accelerator", [False, True])
@pytest.mark.parametrize("restores", [False, True])
def test_on_an_accelerator_a_rejection_that_the_host_knows_of_is_carried_out_as_on_the_host(
    restores: bool, on_accelerator: bool, accelerated: Callable[[], None]
) -> None:
    if on_accelerator:
        accelerated()
    alone, run = prepared(adamw), prepared(adamw)
    controller = Rejecting()
    controller.snapshots_state = restores
    with run.attach(controller) as session:
        run.step(3)
        alone.step(3)
        before = run.everything
        if restores:
            run.step(4)
            assert run.everything == before
            run.step(5)
            alone.step(5)
            assert run.everything == alone.everything
        else:
            with pytest.raises(RunStoppedError, match=r"Rejecting rejected step 1: tau = 0\.\d+\."):
                run.step(4)
            assert frozen(run.parameters) == frozen(alone.parameters)
        assert [(one.step, one.action) for one in session.interventions] == [(1, "reject")]


@pytest.mark.parametrize("on_accelerator", [False, True])
@pytest.mark.parametrize("controllers", [[StepClamp], [NonFiniteGuard, StepClamp]], ids=["clamp", "guard and clamp"])
def test_the_clamp_and_the_monitor_of_the_radius_cost_one_tangent_together(
    controllers: list[Any], on_accelerator: bool, accelerated: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    import redline.tangent_probe

    taken = []
    take = redline.tangent_probe.logit_tangent
    monkeypatch.setattr(
        redline.tangent_probe, "logit_tangent", lambda *args, **kwargs: (taken.append(1), take(*args, **kwargs))[1]
    )
    if on_accelerator:
        accelerated()
    run = prepared()
    with run.attach(*(kind() for kind in controllers), monitors=[redline.GhostRadius(1)]):
        run.step(3)
        taken.clear()  # the first is checked
        run.step(4)
        assert len(taken) == 1
