"""StepClamp: which samples and positions count for ``r``, and which quantile of them it is."""

from __future__ import annotations

import copy
import math
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from step_clamp_runs import Run, batch, prepared
from step_lengths import BATCH, CLASSES, assert_scaled, normalizing, spreads
from torch import Tensor, nn
from torch.func import functional_call
from torch_optimizers import sgd

from redline import StepClamp
from redline.numerics import normalized_step_size


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
