"""What is exported of a decision: the scale, r of what was committed, the traces."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from transaction_runs import Deciding, Joint, Linear, Run, at, scaling, withholding

import redline
from redline import Reject, Scale, Step


def test_readings_and_traces_of_a_scaled_step() -> None:
    run = Run(model=Linear)
    controller = Deciding(at(1, Scale(0.5, "too long.", saw={"r": 2.5})))
    with run.attach(controller, monitors=[redline.GhostRadius(1, max_samples=None)]) as session:
        for index, scale in ((0, 1.0), (1, 0.5), (2, 1.0)):
            run.step(index)
            latest = session.latest
            assert latest.value("redline_step_scale") == scale
            proposed = latest.value("redline_normalized_step_size")
            assert latest.value("redline_committed_step_size") == pytest.approx(scale * proposed)
            assert latest.measured_at[redline.Series("redline_committed_step_size")] == index
        assert session.interventions == (redline.Intervention(1, "Deciding", "scale", "too long.", {"r": 2.5}),)
        assert latest.value("redline_interventions_total", controller="Deciding", action="scale") == 1


def test_several_joint_scales_multiply() -> None:
    run = Run(model=Linear)
    with run.attach(scaling(0.5), scaling(0.2), monitors=[redline.GhostRadius(1, max_samples=None)]) as session:
        run.step(1)
        latest = session.latest
    assert latest.value("redline_step_scale") == pytest.approx(0.1)
    assert latest.value("redline_committed_step_size") == pytest.approx(
        0.1 * latest.value("redline_normalized_step_size"), rel=1e-4
    )
    assert [one.controller for one in session.interventions] == ["Deciding", "Deciding-2"]
    assert latest.value("redline_interventions_total", controller="Deciding-2", action="scale") == 1


def test_monitors_see_the_step_as_proposed_and_the_weights_as_committed() -> None:
    alone, run = Run(model=Linear), Run(model=Linear)
    before = run.parameters["weight"]
    alone.step(1)
    proposed = alone.parameters["weight"] - before
    with run.attach(scaling(0.0), monitors=[redline.UpdateSpectrum(1), redline.WeightSpectrum(1)]) as session:
        run.step(1)
        latest = session.latest
    assert latest.value("redline_update_norm") == pytest.approx(float(proposed.norm()), rel=1e-5)
    sigma = torch.linalg.matrix_norm(before.double(), 2)
    assert latest.value("redline_weight_spectral_norm", layer="weight") == pytest.approx(float(sigma), rel=1e-4)


def test_weights_are_measured_as_committed_even_if_a_controller_looked_at_them_before() -> None:
    run = Run(model=Linear)
    before = run.parameters["weight"]

    def look(step: Step) -> Iterable[Scale]:
        step.weight_spectra(1e-6)
        return []

    with run.attach(scaling(0.0), Joint(look), monitors=[redline.WeightSpectrum(1)]) as session:
        run.step(1)
        sigma = session.latest.value("redline_weight_spectral_norm", layer="weight")
    assert sigma == pytest.approx(float(torch.linalg.matrix_norm(before.double(), 2)), rel=1e-4)


def test_weights_are_measured_as_committed_even_if_a_controller_looked_at_them_ahead_of_the_update() -> None:
    run = Run(model=Linear)

    class Looking(redline.Controller):
        def before_update(self, step: Step) -> None:
            step.weight_spectra(1e-6)

    with run.attach(Looking(), monitors=[redline.WeightSpectrum(1)]) as session:
        run.step(1)
        sigma = session.latest.value("redline_weight_spectral_norm", layer="weight")
    after = run.parameters["weight"]
    assert sigma == pytest.approx(float(torch.linalg.matrix_norm(after.double(), 2)), rel=1e-4)


@pytest.mark.parametrize(
    "controller",
    [
        pytest.param(lambda: Deciding(at(1, Scale(0.5, "as told.", "weight"))), id="scaled by parameter"),
        pytest.param(lambda: Deciding(withhold=withholding(1)), id="withheld"),
        pytest.param(lambda: Deciding(at(1, Reject("as told.")), snapshots_state=True), id="rejected"),
    ],
)
def test_committed_step_size_is_never_that_of_an_earlier_step(controller: Callable[[], Deciding]) -> None:
    """Where r of what was committed is not known it is absent; 0 would do for a step that was taken back."""
    run = Run(model=Linear)
    with run.attach(controller(), monitors=[redline.GhostRadius(1)]) as session:
        run.step(0)
        run.step(1)
        latest = session.latest
        committed = redline.Series("redline_committed_step_size")
        assert committed not in latest.values or latest.measured_at[committed] == 1


def test_committed_step_size_is_absent_where_a_parameter_was_scaled_and_nobody_measured_again() -> None:
    run = Run(model=Linear)
    scaling_one = Deciding(at(0, Scale(0.5, "as told.", "weight")))
    with run.attach(scaling_one, monitors=[redline.GhostRadius(1)]) as session:
        run.step(0)
        latest = session.latest
    assert latest.value("redline_normalized_step_size") > 0
    assert "redline_committed_step_size" not in latest


def test_committed_step_size_is_that_over_the_most_samples() -> None:
    """Of two who measured r, the one on more of the batch errs less."""
    run = Run(model=Linear)
    few, all_of_it = redline.GhostRadius(1, max_samples=1), redline.GhostRadius(1, max_samples=None)
    with run.attach(scaling(0.5), monitors=[few, all_of_it]) as session:
        run.step(0)
        latest = session.latest
    proposed = latest.value("redline_normalized_step_size")  # the last to measure is on all
    assert latest.value("redline_tangent_samples") == 16
    assert latest.value("redline_committed_step_size") == pytest.approx(0.5 * proposed)
