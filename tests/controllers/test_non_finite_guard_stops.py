"""NonFiniteGuard: so many bad steps in a row stop the run."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
from non_finite_guard_runs import EVERY_OPTIMIZER, Run, actions, bad_batch, batch, gradients_of
from torch import nn
from torch.optim import Optimizer

import redline
from redline import ConfigurationError, NonFiniteGuard, RunStoppedError


@EVERY_OPTIMIZER
def test_the_run_stops_after_n_in_a_row(optimizers: Callable[[nn.Module], list[Optimizer]]) -> None:
    run = Run(optimizers)
    with run.attach(NonFiniteGuard(stop_after=3)) as session:
        run.step(batch(1))
        before = run.everything
        spoil = gradients_of(math.nan, "norm.bias", "head.bias")
        run.step(batch(2), spoil)
        run.step(batch(3), spoil)
        parameters, state = run.parameters, run.state
        with pytest.raises(
            RunStoppedError,
            match=r"NonFiniteGuard stopped the run at step 3: the gradients were not finite \(2 of 6 parameters, the "
            r"first norm\.bias, the last head\.bias\), at 3 steps in a row",
        ):
            run.step(batch(4), spoil)
        assert run.parameters == parameters == before["parameters"]
        assert run.state == state == before["state"]
    assert actions(session) == [(1, "withhold"), (2, "withhold"), (3, "stop")]
    assert [one.saw["in_a_row"] for one in session.interventions] == [1, 2, 3]


def test_a_run_that_was_stopped_has_its_running_statistics_from_before_the_step() -> None:
    """Whoever saves the model then, and evaluates it, must not find a NaN in it."""
    run = Run()
    with run.attach(NonFiniteGuard(stop_after=2)):
        run.step(batch(1))
        before = run.everything
        run.step(bad_batch(2))
        assert run.everything == before
        with pytest.raises(RunStoppedError):
            run.step(bad_batch(3))
    assert run.everything == before


def test_a_good_step_begins_the_count_anew() -> None:
    run, alone = Run(), Run()
    guard = NonFiniteGuard(stop_after=3)
    with run.attach(guard) as session:
        for seed in range(8):
            if seed % 3 == 2:
                run.step(batch(seed))
                alone.step(batch(seed))
            else:
                run.step(bad_batch(seed))
        assert run.everything == alone.everything
        run.step(batch(8))
        run.step(bad_batch(9))
        run.step(bad_batch(10))
        with pytest.raises(RunStoppedError, match="at step 11"):
            run.step(bad_batch(11))
        # Whoever goes on begins anew.
        run.step(bad_batch(12))
    assert actions(session)[-4:] == [(9, "withhold"), (10, "withhold"), (11, "stop"), (11, "withhold")]


def test_one_bad_step_stops_the_run_if_so_asked() -> None:
    run = Run()
    parameters = run.parameters
    with run.attach(NonFiniteGuard(stop_after=1)), pytest.raises(RunStoppedError, match="at step 0"):
        run.step(bad_batch(1))
    assert run.parameters == parameters


def test_a_resumed_run_goes_on_counting() -> None:
    run = Run()
    with run.attach(NonFiniteGuard(stop_after=3)) as session:
        run.step(bad_batch(1))
        run.step(bad_batch(2))
        saved = copy.deepcopy(session.state_dict())
    resumed = Run()
    with resumed.attach(NonFiniteGuard(stop_after=3)) as session:
        session.load_state_dict(saved)
        with pytest.raises(RunStoppedError, match="at step 2"):
            resumed.step(bad_batch(3))


@pytest.mark.parametrize("stop_after", [0, -1])
def test_a_limit_that_cannot_work_is_refused(stop_after: int) -> None:
    with pytest.raises(ConfigurationError, match=f"got stop_after={stop_after}; expected at least 1 step"):
        NonFiniteGuard(stop_after=stop_after)


def test_whoever_goes_on_after_a_stop_still_has_what_other_controllers_kept() -> None:
    """The stop comes at a step at which another guard takes its snapshot."""
    run = Run()
    guards = [NonFiniteGuard(stop_after=1), redline.SpikeGuard(patience=0)]
    with redline.attach(run.model, run.optimizers, monitors=[], controllers=guards) as session:
        session.observe(loss=1.0)
        with pytest.raises(RunStoppedError):
            run.step(batch(1), gradients_of(math.nan, "body.weight"))
        before = run.parameters
        session.observe(loss=math.nan)
        run.step(batch(2))
    assert run.parameters == before
    assert actions(session)[-1][1] in ("withhold", "rollback")
