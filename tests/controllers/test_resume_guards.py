"""What the guards of a resumed run go by: bad steps in a row, snapshots and schedulers of the run that was cut."""

from __future__ import annotations

import pytest
from resume_runs import STEPS, Run, cut_and_resumed, guards_did, non_finite, sgd, spike
from torch.optim.lr_scheduler import ExponentialLR

import redline


def test_a_resumed_run_that_goes_on_with_nan_is_stopped_where_the_uncut_one_is() -> None:
    incidents = {index: "nan" for index in range(20, STEPS)}
    messages = []
    for cut in (None, 22):
        run = Run(sgd, non_finite(), incidents)
        if cut is not None:
            run.steps(0, cut)
            file = run.save()
            run = Run(sgd, non_finite(), incidents, seed=1)
            run.load(file)
        with pytest.raises(redline.RunStoppedError, match="at 4 steps in a row") as stopped:
            run.steps(cut or 0, STEPS)
        messages.append(str(stopped.value))
        assert run.session.interventions[-1].step == 23
    assert messages[0] == messages[1]


def test_a_resumed_run_does_not_take_a_snapshot_ahead_of_its_time() -> None:
    second = cut_and_resumed(sgd, spike, {}, 22)
    assert [kept.step for kept in second.session.report().snapshots] == [36]
    first = Run(sgd, spike(), {})
    first.steps(0, 22)
    second = Run(sgd, spike(), {}, seed=1)
    second.load(first.save())
    second.steps(22, 30)
    assert [kept.step for kept in second.session.report().snapshots] == [18]


@pytest.mark.parametrize("schedulers", [0, 2])
def test_a_state_with_other_schedulers_is_refused_when_it_is_loaded_and_not_in_the_midst_of_a_roll_back(
    schedulers: int,
) -> None:
    """Or it is made do with; but the run must not die of the guard."""
    first = Run(sgd, spike(), {})
    first.steps(0, 22)
    state = first.session.state_dict()
    second = Run(sgd, spike(), {24: "parameters"})
    second.session.close()
    second.schedulers = [ExponentialLR(second.optimizers[0], 0.99) for _ in range(schedulers)]
    second.session = redline.attach(
        second.model,
        second.optimizers,
        monitors=[],
        controllers=spike(),
        schedulers=second.schedulers,
    )
    for part, other in zip((second.model, *second.optimizers), (first.model, *first.optimizers), strict=True):
        part.load_state_dict(other.state_dict())
    refusal = ""
    try:
        second.session.load_state_dict(state)
    except redline.ConfigurationError as error:
        refusal = str(error)
    if refusal:
        assert "schedulers" in refusal
    else:
        second.steps(22, 30)
        assert guards_did(second.session) == {"withhold": [24], "rollback": [25]}
