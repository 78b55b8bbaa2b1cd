"""Several sessions: two on one model, and two runs side by side."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from observed_runs import (
    Attention,
    Convolutional,
    Run,
    assert_really_measured,
    attach,
    differences,
    muon_and_adamw,
    often,
    plain,
    seed,
    sgd,
    train,
)
from torch import nn
from torch.optim import Optimizer

import redline


@pytest.mark.parametrize("optimizers", [sgd, muon_and_adamw])
def test_two_sessions_on_one_model_change_nothing(optimizers: Callable[[nn.Module], list[Optimizer]]) -> None:
    unwatched = train(optimizers=optimizers, sessions=0, steps=30)
    watched = train(optimizers=optimizers, sessions=2, steps=30)
    assert_really_measured(watched, 30)
    assert differences(watched, unwatched) == []
    one, other = (session.latest for session in watched.sessions)
    timed = {"redline_overhead_ratio", "redline_monitoring_ratio", "redline_last_step_timestamp_seconds"}
    assert {series: value for series, value in one.values.items() if series.metric not in timed} == {
        series: value for series, value in other.values.items() if series.metric not in timed
    }


def test_two_runs_side_by_side_are_unchanged() -> None:
    def side_by_side(sessions: bool) -> list[Run]:
        seed()
        runs = [Run(Convolutional, sgd, plain), Run(Attention, muon_and_adamw, plain)]
        if sessions:
            for run in runs:
                exporter = redline.PrometheusExporter(port=0, every=3)
                run.sessions.append(attach(run, exporter, often()))
        for _ in range(30):
            for run in runs:
                run.step()
        for run in runs:
            for session in run.sessions:
                session.close()
        return runs

    for watched, unwatched in zip(side_by_side(True), side_by_side(False), strict=True):
        assert differences(watched, unwatched) == []
        (session,) = watched.sessions
        assert session.notes == ()
        assert session.latest.value("redline_steps_total") == 30
        assert session.latest.value("redline_measurements_total", monitor="GhostRadius") == 30
        assert set(session.latest.layers("redline_weight_spectral_norm")) == {
            name for name, parameter in watched.model.named_parameters() if parameter.dim() > 1
        }
