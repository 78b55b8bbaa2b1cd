"""A rejected step: parameters and state go back, or the run stops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from bits import assert_same_bits
from torch import Tensor, nn
from torch.optim import Optimizer
from transaction_runs import EVERY_OPTIMIZER, Deciding, Descent, Joint, Run, at, prepared, scaling

import redline
from redline import ConfigurationError, ControllerError, Need, Reject, RunStoppedError, Scale


class Counting(Descent):
    """Keeps a number, a list and a setting of the group, none of them tensors."""

    def move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        super().move(parameter, group)
        group["moves"] = group.get("moves", 0) + 1
        state = self.state[parameter]
        state.setdefault("history", []).append(group["moves"])
        state["count"] = state.get("count", 0) + 1


@EVERY_OPTIMIZER
def test_rejection_with_a_snapshot_brings_parameters_and_state_back(
    optimizers: Callable[[nn.Module], list[Optimizer]],
) -> None:
    run, alone = prepared(optimizers), prepared(optimizers)
    controller = Deciding(at(1, Reject("as told.", {"r": 9.0})), snapshots_state=True)
    with run.attach(controller) as session:
        run.step(3)
        alone.step(3)
        before, state = run.parameters, run.state
        run.step(4)
        assert_same_bits(run.parameters, before)
        assert run.state == state
        assert session.latest.value("redline_step_scale") == 0
        run.step(5)
        alone.step(5)  # which never saw the step that was rejected
    assert_same_bits(run.parameters, alone.parameters)
    assert run.state == alone.state
    assert session.interventions == (redline.Intervention(1, "Deciding", "reject", "as told.", {"r": 9.0}),)
    assert session.latest.value("redline_interventions_total", controller="Deciding", action="reject") == 1


@EVERY_OPTIMIZER
def test_rejected_first_step_leaves_no_state(optimizers: Callable[[nn.Module], list[Optimizer]]) -> None:
    run, fresh = Run(optimizers), Run(optimizers)
    with run.attach(Deciding(at(0, Reject("as told.")), snapshots_state=True)):
        run.step(1)
    assert_same_bits(run.parameters, fresh.parameters)
    assert run.state == fresh.state
    run.step(2)
    fresh.step(2)
    assert_same_bits(run.parameters, fresh.parameters)


def test_rejection_brings_back_state_that_is_no_tensor() -> None:
    run = Run(lambda model: [Counting(model.parameters(), 0.1)])
    with run.attach(Deciding(at(1, Reject("as told.")), snapshots_state=True)):
        run.step(1)
        before, state = run.parameters, run.state
        run.step(2)
    assert_same_bits(run.parameters, before)
    assert run.state == state


@EVERY_OPTIMIZER
def test_rejection_without_a_snapshot_stops_the_run(optimizers: Callable[[nn.Module], list[Optimizer]]) -> None:
    run = prepared(optimizers)
    before = run.parameters
    with run.attach(Deciding(at(1, Reject("r was 12.")))) as session:
        run.step(3)
        before = run.parameters
        with pytest.raises(RunStoppedError, match=r"Deciding rejected step 1: r was 12\. The parameters are as they"):
            run.step(4)
        assert_same_bits(run.parameters, before)
        assert [one.action for one in session.interventions] == ["reject"]


def test_rejection_ends_the_questions() -> None:
    run = Run()
    first, second = Deciding(at(0, Reject("as told.")), snapshots_state=True), Joint(at(0, Scale(0.5, "as told.")))
    with run.attach(first, second) as session:
        run.step(1)
    assert [one.action for one in session.interventions] == ["reject"]
    assert second.seen == []


def test_rejection_after_a_scale_goes_back_all_the_way() -> None:
    run = prepared()
    before = run.parameters
    rejecting = Joint(at(0, Reject("as told.")), snapshots_state=True)
    with run.attach(scaling(0.5, "body.weight", per_parameter=True), scaling(0.5), rejecting):
        run.step(3)
    assert_same_bits(run.parameters, before)


@pytest.mark.parametrize("needs", [Need.NOTHING, Need.GRADIENTS])
@pytest.mark.parametrize("decision", [Scale(0.0, "as told."), Reject("as told.")])
def test_decision_on_an_update_that_nobody_kept_is_never_silently_dropped(
    needs: Need, decision: Scale | Reject
) -> None:
    """A controller that reads gradients alone may still take the step back: that is done, or said to be impossible."""
    run = prepared()
    before = run.parameters
    with run.attach(Deciding(at(0, decision), needs=needs, snapshots_state=True)):
        try:
            run.step(3)
        except (ConfigurationError, ControllerError):
            return
    assert_same_bits(run.parameters, before)
