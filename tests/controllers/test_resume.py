"""A run that is cut and resumed equals one that was not, to the bit: with each controller, and with all of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from resume_runs import (
    STEPS,
    Did,
    Incidents,
    Made,
    Run,
    all_three,
    assert_sessions_agree,
    clamp,
    cut_and_resumed,
    guards_did,
    non_finite,
    sgd,
    spike,
    trace,
)
from torch import nn
from torch.optim import Optimizer
from torch_optimizers import adamw_foreach, adamw_fused, muon_and_adamw

import redline


def non_finite_with_state() -> list[redline.Controller]:
    return [redline.NonFiniteGuard(stop_after=4, restore_state=True)]


# Each with what the guards together have to do about it: (name, controllers, incidents, cut after so many steps, what).
# The snapshots are of steps 0, 18 and 36.
CASES: list[tuple[str, Made, Incidents, int, Did]] = [
    ("clamp", clamp, {}, 3, {}),
    ("clamp, later", clamp, {25: "batch"}, 25, {}),
    ("NaN before the cut", non_finite, {20: "nan"}, 22, {"withhold": [20]}),
    ("NaN after the cut", non_finite, {24: "nan"}, 22, {"withhold": [24]}),
    ("NaN around the cut", non_finite, {20: "nan", 21: "nan", 22: "nan"}, 21, {"withhold": [20, 21, 22]}),
    ("state restored", non_finite_with_state, {20: "nan", 22: "nan"}, 21, {"withhold": [20, 22]}),
    ("spike before the cut", spike, {20: "batch"}, 22, {"withhold": [20]}),
    ("spike after the cut", spike, {24: "batch"}, 22, {"withhold": [24]}),
    ("roll-back before the cut", spike, {24: "parameters"}, 28, {"withhold": [24], "rollback": [25]}),
    ("roll-back after the cut", spike, {24: "parameters"}, 22, {"withhold": [24], "rollback": [25]}),
    ("cut ahead of the roll-back", spike, {24: "parameters"}, 25, {"withhold": [24], "rollback": [25]}),
    ("cut behind the roll-back", spike, {24: "parameters"}, 26, {"withhold": [24], "rollback": [25]}),
    (
        "the snapshot twice",
        spike,
        {20: "parameters", 26: "parameters"},
        23,
        {"withhold": [20, 26], "rollback": [21, 27]},
    ),
    (
        "cut amid roll-backs",
        spike,
        {index: "batch" for index in range(24, 29)},
        26,
        {"withhold": [24, 28], "rollback": [25, 26, 27]},
    ),
    ("cut behind a new snapshot", spike, {38: "parameters"}, 37, {"withhold": [38], "rollback": [39]}),
    (
        "all three",
        all_three,
        {20: "nan", 24: "parameters", 30: "batch"},
        22,
        {"withhold": [20, 24, 30], "rollback": [25]},
    ),
    (
        "all three, cut amid jumps",
        all_three,
        {20: "batch", 24: "parameters", 30: "nan"},
        25,
        {"withhold": [20, 24, 30], "rollback": [25]},
    ),
]
EVERY_CASE = pytest.mark.parametrize(
    ("controllers", "incidents", "cut", "did"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)


@EVERY_CASE
def test_a_run_that_was_cut_equals_one_that_was_not(
    controllers: Made, incidents: Incidents, cut: int, did: Did
) -> None:
    through = Run(sgd, controllers(), incidents)
    through.steps(0, STEPS)
    assert guards_did(through.session) == did
    second = cut_and_resumed(sgd, controllers, incidents, cut)
    assert second.training() == through.training()
    assert_sessions_agree(second.session, through.session)
    if controllers in (clamp, all_three):
        scaled = {one.step for one in through.session.interventions if one.action == "scale"}
        assert min(scaled) < cut
    if controllers is not clamp:
        assert all(torch.isfinite(tensor).all() for tensor in through.model.state_dict().values())


@pytest.mark.parametrize("optimizers", [adamw_foreach, adamw_fused, muon_and_adamw])
@pytest.mark.parametrize("cut", [25, 31])
def test_any_optimizer_resumes_with_all_three(optimizers: Callable[[nn.Module], list[Optimizer]], cut: int) -> None:
    incidents = {20: "nan", 24: "parameters", 30: "batch", 32: "nan"}
    through = Run(optimizers, all_three(), incidents)
    through.steps(0, STEPS)
    assert guards_did(through.session) == {"withhold": [20, 24, 30, 32], "rollback": [25]}
    assert "scale" in [one.action for one in through.session.interventions]
    second = cut_and_resumed(optimizers, all_three, incidents, cut)
    assert second.training() == through.training()
    assert_sessions_agree(second.session, through.session)


def test_a_run_may_be_cut_after_every_step() -> None:
    incidents = {20: "nan", 24: "parameters", 30: "batch"}
    through = Run(adamw_fused, all_three(), incidents)
    through.steps(0, STEPS)
    run = Run(adamw_fused, all_three(), incidents)
    for index in range(STEPS):
        run.steps(index, index + 1)
        file = run.save()
        run.session.close()
        run = Run(adamw_fused, all_three(), incidents, seed=index)
        run.load(file)
    assert run.training() == through.training()
    assert trace(run.session) == trace(through.session)
    assert guards_did(run.session) == {"withhold": [20, 24, 30], "rollback": [25]}


def test_without_the_sessions_state_it_would_be_another_run() -> None:
    """The incidents are such that it matters."""
    incidents = {24: "parameters"}
    through = Run(sgd, spike(), incidents)
    through.steps(0, STEPS)
    first = Run(sgd, spike(), incidents)
    first.steps(0, 25)
    second = Run(sgd, spike(), incidents, seed=1)
    for part, other in zip(second.parts(), first.parts(), strict=True):
        part.load_state_dict(other.state_dict())
    second.steps(25, STEPS)
    assert second.training() != through.training()
