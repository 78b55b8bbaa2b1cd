"""Observing alone changes nothing: every optimizer, and every loop in which one is stepped."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from observed_runs import (
    Attention,
    Convolutional,
    Loop,
    accumulating,
    adam,
    adamw_foreach,
    adamw_fused,
    assert_unchanged,
    differences,
    lbfgs,
    muon_and_adamw,
    sgd,
    train,
    under_autocast,
    with_closure,
    with_closure_by_keyword,
)
from torch import nn
from torch.optim import Optimizer

import redline


@pytest.mark.parametrize("kind", [Convolutional, Attention])
@pytest.mark.parametrize("optimizers", [sgd, adam, adamw_foreach, adamw_fused, muon_and_adamw])
def test_plain_loop_is_unchanged(
    kind: type[nn.Module],
    optimizers: Callable[[nn.Module], list[Optimizer]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert_unchanged(capsys, kind=kind, optimizers=optimizers)


@pytest.mark.parametrize(
    ("loop", "optimizers"),
    [
        (accumulating, sgd),
        (accumulating, muon_and_adamw),
        (with_closure, sgd),
        (with_closure, adamw_fused),
        (with_closure_by_keyword, adam),
        (under_autocast, adamw_foreach),
    ],
)
def test_other_loops_are_unchanged(
    loop: Loop, optimizers: Callable[[nn.Module], list[Optimizer]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert_unchanged(capsys, loop=loop, optimizers=optimizers)


def test_line_search_that_calls_its_closure_many_times_is_unchanged(capsys: pytest.CaptureFixture[str]) -> None:
    assert_unchanged(capsys, steps=20, loop=with_closure, optimizers=lbfgs)


def test_attention_under_autocast_is_unchanged(capsys: pytest.CaptureFixture[str]) -> None:
    assert_unchanged(capsys, kind=Attention, loop=under_autocast, optimizers=adam)


def test_default_monitors_on_their_default_schedules_change_nothing() -> None:
    unwatched = train(sessions=0)
    watched = train(sessions=1, monitors=redline.default_monitors)
    assert watched.sessions[0].latest.series("redline_measurements_total") == {
        ("WeightSpectrum",): 2,
        ("UpdateSpectrum",): 2,
        ("GhostRadius",): 2,
        ("StepHealth",): 100,
    }
    assert differences(watched, unwatched) == []
