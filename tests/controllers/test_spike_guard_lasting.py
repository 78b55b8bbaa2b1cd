"""SpikeGuard: a jump that lasts is accepted as a new level, or stops the run."""

from __future__ import annotations

import pytest
from spike_guard_runs import Run, assert_same, falling, sgd

import redline
from redline import RunStoppedError


@pytest.mark.parametrize(("patience", "most"), [(1, 3), (0, 1), (2, 2)])
def test_a_lasting_new_level_is_accepted(patience: int, most: int) -> None:
    guarded = Run(sgd, falling, [redline.SpikeGuard(patience=patience, max_roll_backs=most)])
    guarded.steps(30)
    for _ in range(60):
        guarded.step(shift=1)  # other labels from here on
    count = patience + most + 1
    actions = ["withhold"] * patience + ["rollback"] * most + ["withhold"]
    assert guarded.did == [(30 + index, action) for index, action in enumerate(actions)]
    last = guarded.session.interventions[-1]
    assert "stays there" in last.reason
    assert "new level" in last.reason
    for index in range(30 + patience, 30 + count):
        assert_same(guarded.after[index]["model"], guarded.before[20]["model"])
    assert guarded.losses[30 + count] > guarded.losses[29] + 0.5  # nothing was learned of it yet
    assert guarded.losses[-1] < guarded.losses[30 + count] - 0.5  # and now it was


def test_from_the_new_level_on_jumps_are_measured_anew() -> None:
    guarded = Run(controllers=[redline.SpikeGuard(patience=0, max_roll_backs=1)])
    for _ in range(20):
        guarded.step(shown=1.0)
    for _ in range(20):
        guarded.step(shown=5.0)
    guarded.step(shown=5.4)
    guarded.step(shown=6.0)
    assert guarded.did == [(20, "rollback"), (21, "withhold"), (41, "rollback")]
    assert guarded.session.interventions[-1].saw["median"] == 5.0


@pytest.mark.parametrize(("patience", "most"), [(1, 3), (0, 1)])
def test_a_lasting_nan_stops_the_run(patience: int, most: int) -> None:
    guarded = Run(sgd, falling, [redline.SpikeGuard(patience=patience, max_roll_backs=most)])
    guarded.steps(30)
    count = patience + most
    for _ in range(count):
        guarded.step(spoil=["nan"])
    at = 30 + count
    with pytest.raises(RunStoppedError, match=rf"SpikeGuard stopped the run at step {at}: the loss jumped to nan"):
        guarded.step(spoil=["nan"])
    assert guarded.did == [
        (30 + index, action) for index, action in enumerate(["withhold"] * patience + ["rollback"] * most + ["stop"])
    ]
    assert f"{most} roll-backs did not help" in guarded.session.interventions[-1].reason
    for name, parameter in guarded.model.named_parameters():
        assert_same(parameter, guarded.before[20]["model"][name])


def test_a_run_that_is_nan_from_its_start_is_stopped_and_no_roll_back_is_spoken_of() -> None:
    guarded = Run(controllers=[redline.SpikeGuard(max_roll_backs=2)])
    for _ in range(3):
        guarded.step(spoil=["nan"])
    with pytest.raises(RunStoppedError, match="SpikeGuard stopped the run at step 3"):
        guarded.step(spoil=["nan"])
    assert guarded.did == [(0, "withhold"), (1, "withhold"), (2, "withhold"), (3, "stop")]
    assert "there was no good step to go back to" in guarded.session.interventions[-1].reason


def test_whoever_goes_on_after_a_stop_begins_anew() -> None:
    guarded = Run(controllers=[redline.SpikeGuard(patience=1, max_roll_backs=1)])
    guarded.steps(20)
    for _ in range(2):
        guarded.step(spoil=["nan"])
    with pytest.raises(RunStoppedError):
        guarded.step(spoil=["nan"])
    for optimizer in guarded.optimizers:
        optimizer.zero_grad()
    guarded.model.load_state_dict(guarded.before[0]["model"])
    guarded.step()
    guarded.step(spoil=["nan"])
    assert [action for _, action in guarded.did] == ["withhold", "rollback", "stop", "withhold"]
