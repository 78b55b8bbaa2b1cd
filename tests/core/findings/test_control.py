"""Rules on interventions."""

from __future__ import annotations

import pytest
import torch
from reports import report_of, tally
from torch import nn
from torch.nn import functional as F

import redline
from redline.findings.control import clamp_carries_the_run, repeated_rejections, run_stopped


def test_a_clamp_that_scales_a_quarter_of_the_steps_carries_the_run():
    found = clamp_carries_the_run(report_of(400, interventions=[tally("StepClamp", "scale", 100)]))
    assert found is not None
    assert (found.level, "StepClamp 100 of 400 steps" in found.seen) == ("watch", True)
    assert clamp_carries_the_run(report_of(400, interventions=[tally("StepClamp", "scale", 99)])) is None


def test_the_first_steps_of_a_run_say_nothing_of_that_yet():
    assert clamp_carries_the_run(report_of(9, interventions=[tally("StepClamp", "scale", 9)])) is None


def test_other_actions_and_controllers_that_act_by_design_do_not_count():
    decays = tally("WeightDecayControl", "decay", 400)
    length = tally("RadiusLR", "scale", 400, by_design=True)
    assert clamp_carries_the_run(report_of(400, interventions=[decays, length])) is None


@pytest.mark.parametrize(("count", "level"), [(2, None), (3, "watch"), (9, "watch"), (10, "bad")])
def test_repeated_rejections_of_a_thousand_steps(count: int, level: str | None):
    found = repeated_rejections(report_of(1000, interventions=[tally("NonFiniteGuard", "withhold", count)]))
    assert (None if found is None else found.level) == level


def test_rejections_of_all_kinds_count_together_and_scaled_steps_do_not():
    did = [tally("A", "withhold", 1), tally("A", "rollback", 1), tally("B", "reject", 1), tally("C", "scale", 50)]
    found = repeated_rejections(report_of(1000, interventions=did))
    assert found is not None
    assert "turned steps away 3 times: A withhold ×1" in found.seen
    assert "C" not in found.seen
    assert repeated_rejections(report_of(1000, interventions=did[1:])) is None


def test_a_run_that_a_controller_stopped_says_why():
    found = run_stopped(report_of(91, interventions=[tally("NonFiniteGuard", "stop", 1)]))
    assert found is not None
    assert (found.level, found.seen) == ("bad", "NonFiniteGuard stopped the run at step 90: it was too long")
    assert run_stopped(report_of(91, interventions=[tally("NonFiniteGuard", "withhold", 1)])) is None


@pytest.mark.parametrize(
    ("controller", "carried"),
    [(redline.StepClamp(max_r=1e-3), True), (redline.RadiusLR(0.5), False)],
    ids=["clamp", "length"],
)
def test_in_a_real_run_the_clamp_carries_and_what_sets_every_length_does_not(
    controller: redline.Controller, carried: bool
):
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    x, y = torch.randn(16, 6), torch.randint(3, (16,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with redline.attach(model, optimizer, monitors=[], controllers=[controller]) as session:
        for _ in range(20):
            loss = F.cross_entropy(model(x), y)
            session.observe(loss=loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    report = session.report()
    assert next(one.count for one in report.interventions if one.action == "scale") >= 20
    assert ("clamp_carries_the_run" in [one.rule for one in report.verdicts]) == carried
