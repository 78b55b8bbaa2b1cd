"""RadiusLR beside StepClamp: the clamp has the last word on the length."""

from __future__ import annotations

import pytest
from composition_runs import COMMITTED, SCALE, Run, batch, radius_lr
from step_lengths import reference

import redline
from redline import StepClamp


@pytest.mark.parametrize("order", [1, -1])
def test_the_clamp_has_the_last_word_on_the_length(order: int) -> None:
    run = Run()
    with run.attach(*[radius_lr(2.0), StepClamp()][::order], monitors=[redline.GhostRadius(1)]) as session:
        for seed in range(4):
            before = run.parameters
            run.step(seed)
            assert reference(run.model, before, run.parameters, batch(seed)[0]) == pytest.approx(1, rel=1e-3)
            assert session.latest.value(COMMITTED) == pytest.approx(1, rel=1e-4)
            one, other = session.interventions[-2:]
            assert (one.controller, other.controller) == ("RadiusLR", "StepClamp")
            assert (other.saw["r"], other.saw["scale"]) == pytest.approx((2, 0.5), rel=1e-4)
            assert session.latest.value(SCALE) == pytest.approx(one.saw["scale"] / 2, rel=1e-4)
            assert session.latest.value("redline_normalized_step_size") == pytest.approx(one.saw["r"], rel=1e-4)


def test_a_clamp_above_the_length_asked_for_changes_nothing() -> None:
    runs = []
    for controllers in ([radius_lr(0.5)], [StepClamp(), radius_lr(0.5)]):
        run = Run()
        with run.attach(*controllers) as session:
            run.steps(0, 5)
        runs.append(run.everything)
        assert {one.controller for one in session.interventions} == {"RadiusLR"}
    assert runs[0] == runs[1]
