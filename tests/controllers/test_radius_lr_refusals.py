"""RadiusLR: arguments, outputs and losses that are refused."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch.nn.functional as F
from radius_lr_runs import Run, batch, unlimited
from step_lengths import CLASSES, plain
from torch import Tensor, nn
from torch_optimizers import sgd

from redline import ConfigurationError, NonFiniteGuard, RadiusLR, RedlineWarning


@pytest.mark.parametrize("r", [0, 0.0, -1.0, math.nan, math.inf, -math.inf])
def test_a_length_that_is_not_positive_is_refused(r: float) -> None:
    with pytest.raises(ConfigurationError, match=rf"got r={r}; expected a positive number of radii, such as 1\."):
        RadiusLR(r)


@pytest.mark.parametrize("reduction", [0, 0.0, -0.1, 1.0001, 2, math.nan, "min", "0.5", None])
def test_a_quantile_outside_0_to_1_is_refused(reduction: Any) -> None:
    with pytest.raises(
        ConfigurationError,
        match=rf"got reduction={reduction!r}; expected 'max' or a quantile in \(0, 1\], such as 0\.99\.",
    ):
        RadiusLR(reduction=reduction)


@pytest.mark.parametrize("most", [0, -0.3, math.nan, math.inf])
def test_a_limit_on_matrices_that_is_not_positive_is_refused(most: float) -> None:
    with pytest.raises(
        ConfigurationError,
        match=rf"got max_update_to_weight={most}; expected a positive number, such as 0\.3, or None\.",
    ):
        RadiusLR(max_update_to_weight=most)


@pytest.mark.parametrize("growth", [1, 1.0, 0.5, 0, -1.02, math.nan, math.inf])
def test_a_growth_of_one_or_less_is_refused(growth: float) -> None:
    with pytest.raises(
        ConfigurationError, match=rf"got max_growth={growth}; expected more than 1, such as 1\.02, or None\."
    ):
        RadiusLR(max_growth=growth)


@pytest.mark.parametrize("samples", [0, -1])
def test_fewer_than_one_sample_is_refused(samples: int) -> None:
    with pytest.raises(ConfigurationError, match=f"got max_samples={samples}; expected at least 1, or None"):
        RadiusLR(max_samples=samples)


def test_an_output_without_logits_is_refused_at_the_first_step_and_nothing_is_scaled() -> None:
    class Answering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = plain()

        def forward(self, x: Tensor) -> Any:
            return SimpleNamespace(scores=self.net(x))

    def step(run: Run) -> None:
        x, y = batch(1)
        F.cross_entropy(run.model(x).scores, y).backward()
        run.update()

    alone, run = Run(sgd, Answering), Run(sgd, Answering)
    step(alone)
    with run.attach(RadiusLR()) as session, pytest.raises(ConfigurationError, match=r"as logits; .*`logits=`"):
        step(run)
    assert run.everything == alone.everything, "the step is the optimizer's own"
    assert session.interventions == ()


@pytest.mark.parametrize("others", [[], [NonFiniteGuard()]], ids=["alone", "with a guard"])
def test_a_model_never_called_in_training_mode_is_refused_at_the_first_step(others: list[Any]) -> None:
    alone, run = Run(), Run()
    alone.model.eval()
    run.model.eval()
    alone.step(1)
    with (
        run.attach(*others, unlimited()) as session,
        pytest.warns(RedlineWarning, match="was not called in training mode"),
        pytest.raises(
            ConfigurationError,
            match=r"got no logits to measure the first step by .*Pass module= and logits= to attach, or leave RadiusLR "
            r"out if the loss is no cross-entropy\.",
        ),
    ):
        run.step(1)
    assert run.everything == alone.everything, "the step is the optimizer's own"
    assert session.interventions == ()


@pytest.mark.parametrize("resumed", [False, True])
def test_only_the_first_step_of_a_run_may_be_refused(resumed: bool) -> None:
    """Not that of a run which goes on, but that of the next run under the same controller."""
    control, run = unlimited(), Run()
    with run.attach(control) as session:
        run.step(1)
        state = session.state_dict()
    run.model.eval()
    with run.attach(control) as session:
        if resumed:
            session.load_state_dict(state)
            with pytest.warns(RedlineWarning, match="was not called in training mode"):
                run.step(2)
        else:
            with (
                pytest.warns(RedlineWarning, match="was not called in training mode"),
                pytest.raises(ConfigurationError, match="got no logits to measure the first step by"),
            ):
                run.step(2)


def test_a_loss_that_is_no_cross_entropy_is_refused_when_it_is_observed() -> None:
    run = Run()
    untouched = run.everything
    x, y = batch(1)
    with run.attach(unlimited()) as session:
        loss = F.mse_loss(run.model(x), F.one_hot(y, CLASSES).float())
        with pytest.raises(ConfigurationError, match=r"got a loss made by MseLoss; expected a cross-entropy"):
            session.observe(loss=loss)
    assert run.everything == untouched
