"""The step transaction alone: what it commits of an update net of decoupled decay."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from bits import frozen
from torch import Tensor, nn

from redline import (
    Decay,
    ScaleMatrices,
)
from redline.parameters import MatrixLayer
from redline.transaction import StepTransaction


def transaction(dtype: torch.dtype = torch.float64) -> tuple[StepTransaction, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    before, after = (torch.randn(3, 4, 5, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    parameter = nn.Parameter(before.clone())
    made = StepTransaction()
    made.save({"one": parameter})
    with torch.no_grad():
        parameter.copy_(after)
    return made, parameter, before, after


FORMS: list[Callable[[float], Any]] = [
    float,
    lambda value: torch.tensor(value, dtype=torch.float64),
    lambda value: torch.full((3, 1, 1), value, dtype=torch.float64),
]


@pytest.mark.parametrize("forms", list(itertools.product(FORMS, repeat=2)), ids=lambda forms: "")
def test_shares_as_floats_and_as_tensors_commit_the_same(forms: Sequence[Callable[[float], Any]]) -> None:
    first, second = forms
    made, parameter, before, after = transaction()
    made.shrink("one", first(0.125))
    made.scale_net("one", second(0.3), first(0.25))
    made.scale(first(0.5), ["one"])
    made.shrink("one", second(-0.0625))
    # p + d W is q; then less 0.125 W, so that 0.375 W of decay would be in force; told 0.25, the rest is scaled too.
    update, decay = after - before, 0.25
    left = update - 0.125 * before
    left = 0.3 * (left + decay * before) - decay * before
    left = 0.5 * left + 0.0625 * before
    torch.testing.assert_close(made.update()["one"], left, rtol=0, atol=1e-14)
    made.commit()
    torch.testing.assert_close(parameter.detach(), before + left, rtol=0, atol=1e-14)


@pytest.mark.parametrize("form", FORMS, ids=["float", "0-d", "stack"])
def test_shrinking_by_nothing_and_back_leaves_the_bits(form: Callable[[float], Any]) -> None:
    made, parameter, _, after = transaction(torch.float32)
    made.shrink("one", form(0.0))
    made.shrink("one", form(0.25))
    made.shrink("one", form(-0.25))
    made.scale_net("one", form(1.0), form(0.5))
    made.commit()
    assert frozen(parameter) == frozen(after)


def test_shrinking_alone_starts_from_what_the_optimizer_wrote() -> None:
    """To take the update first would lose what of a small result is left of a large parameter."""
    made, parameter = StepTransaction(), nn.Parameter(torch.full((3,), 2.0**20))
    made.save({"one": parameter})
    with torch.no_grad():
        parameter.fill_(1.1)
    made.shrink("one", 2.0**-20)
    made.commit()
    torch.testing.assert_close(parameter.detach(), torch.full((3,), 0.1), rtol=0, atol=1e-7)


def test_decisions_end_with_their_commit() -> None:
    made, parameter, before, after = transaction()
    made.scale_net("one", 0.5, 0.25)
    made.commit()
    once = parameter.detach().clone()
    torch.testing.assert_close(once, before + 0.5 * (after - before) - 0.125 * before, rtol=0, atol=1e-14)
    made.commit()
    assert torch.equal(parameter, once)
    torch.testing.assert_close(made.update()["one"], once - before, rtol=0, atol=0)
    made.scale(0.0)
    made.close()
    assert (made.parameters, made.before, made.update()) == ({}, {}, {})
    made.commit()
    assert torch.equal(parameter, once)


def test_whether_a_decision_acts_is_told_from_its_numbers_or_its_words() -> None:
    layers = [MatrixLayer("one", "one", 7, 5)]
    assert bool(ScaleMatrices(layers, torch.tensor([0.5]), "").acts)
    assert not bool(ScaleMatrices(layers, torch.tensor([1.0]), "").acts)
    assert ScaleMatrices(layers, torch.tensor([math.nan]), "").acts
    assert Decay(layers, torch.tensor([0.5]), "").acts is True
    assert Decay(layers, torch.tensor([0.5]), None).acts is False
    assert not bool(ScaleMatrices((), torch.zeros(0), "").acts)
