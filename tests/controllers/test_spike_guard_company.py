"""SpikeGuard beside another controller."""

from __future__ import annotations

import pytest
from spike_guard_runs import Run, assert_same, differing, falling, sgd

import redline


@pytest.mark.parametrize("first", [0, 1])
def test_a_roll_back_saves_a_run_that_another_would_stop(first: int) -> None:
    guards = [redline.SpikeGuard(patience=0), redline.NonFiniteGuard(stop_after=1)]
    guarded = Run(controllers=[guards[first], guards[1 - first]])
    guarded.steps(30)
    guarded.step(spoil=["nan"])
    assert guarded.did == [(30, "rollback")]
    assert_same(guarded.after[30], guarded.before[20])
    guarded.step()


class Withholding(redline.Controller):
    """Withholds one step."""

    needs = redline.Need.NOTHING

    def __init__(self, index: int) -> None:
        self.index = index

    def before_update(self, step: redline.Step) -> redline.Withhold | None:
        return redline.Withhold("as told.") if step.index == self.index else None


@pytest.mark.parametrize("first", [0, 1])
def test_a_roll_back_outranks_withholding(first: int) -> None:
    controllers = [redline.SpikeGuard(patience=0), Withholding(30)]
    guarded = Run(sgd, falling, [controllers[first], controllers[1 - first]])
    guarded.steps(30)
    guarded.step(spoil=["parameters"])
    assert sorted(guarded.did) == [(30, "rollback"), (30, "withhold")]
    assert_same(guarded.after[30], guarded.before[20])


@pytest.mark.parametrize("first", [0, 1])
def test_a_snapshot_due_at_a_step_that_another_withholds_has_seen_nothing_of_its_batch(first: int) -> None:
    controllers = [redline.SpikeGuard(patience=0), Withholding(20)]
    guarded = Run(sgd, falling, [controllers[first], controllers[1 - first]])
    guarded.steps(30)
    assert guarded.session.report().snapshots[0].step == 20
    assert differing(guarded.before[20], guarded.after[20]) == {"model"}  # the running statistics
    guarded.step(spoil=["parameters"])
    assert guarded.did == [(20, "withhold"), (30, "rollback")]
    assert_same(guarded.after[30], guarded.after[20])
