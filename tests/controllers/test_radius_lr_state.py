"""RadiusLR: a run may be cut and resumed, and a controller used again."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from bits import frozen
from radius_lr_runs import EVERY_MODEL, Run, bare_sgd, unlimited
from step_lengths import CLASSES, FEATURES, plain
from torch import nn
from torch.optim import Optimizer
from torch_optimizers import adamw, adamw_fused, muon_and_adamw

from redline import RadiusLR


@pytest.mark.parametrize("optimizers", [bare_sgd, adamw_fused, muon_and_adamw], ids=lambda make: make.__name__)
@EVERY_MODEL
def test_a_run_may_be_cut_after_every_step(
    optimizers: Callable[[nn.Module], list[Optimizer]], model: Callable[[], nn.Module]
) -> None:
    through, run = Run(optimizers, model), Run(optimizers, model)

    def step(run: Run, seed: int) -> None:
        torch.manual_seed(seed)
        run.step(seed)

    with through.attach(unlimited(0.5)) as whole:
        for seed in range(8):
            step(through, seed)
    session = run.attach(unlimited(0.5))
    for seed in range(8):
        step(run, seed)
        file = io.BytesIO()
        torch.save([part.state_dict() for part in (run.model, *run.optimizers, session)], file)
        session.close()
        run = Run(optimizers, model)
        session = run.attach(unlimited(0.5))
        file.seek(0)
        for part, state in zip((run.model, *run.optimizers, session), torch.load(file, weights_only=True), strict=True):
            part.load_state_dict(state)
    assert run.everything == through.everything
    assert frozen([vars(one) for one in session.interventions]) == frozen([vars(one) for one in whole.interventions])
    assert frozen(session.state_dict()["control"]) == frozen(whole.state_dict()["control"])
    session.close()


def wide() -> nn.Module:
    """Wider than what is decomposed exactly, so that warm starts show."""
    return nn.Sequential(nn.Linear(FEATURES, 72), nn.Tanh(), nn.Linear(72, 80), nn.Tanh(), nn.Linear(80, CLASSES))


def test_a_run_whose_matrices_are_held_may_be_cut() -> None:
    through = Run(adamw, wide)
    with through.attach(RadiusLR(4.0)) as whole:
        through.steps_of(range(6))
    assert any("matrices" in one.saw for one in whole.interventions if one.step > 2)
    run = Run(adamw, wide)
    session = run.attach(RadiusLR(4.0))
    run.steps_of(range(3))
    states = copy.deepcopy([part.state_dict() for part in (run.model, *run.optimizers, session)])
    session.close()
    run = Run(adamw, wide)
    session = run.attach(RadiusLR(4.0))
    for part, state in zip((run.model, *run.optimizers, session), states, strict=True):
        part.load_state_dict(state)
    run.steps_of(range(3, 6))
    assert run.everything == through.everything
    assert frozen(session.state_dict()["control"]) == frozen(whole.state_dict()["control"])
    session.close()


@pytest.mark.parametrize("model", [plain, wide], ids=lambda make: make.__name__)
def test_it_can_be_used_in_one_session_after_another(model: Callable[[], nn.Module]) -> None:
    used, ends = RadiusLR(2.0), []
    for one, rate in ((used, 1000.0), (used, 1.0), (RadiusLR(2.0), 1.0)):
        run = Run(adamw, model).times_rate(rate)
        with run.attach(one) as session:
            run.steps_of(range(4))
        ends.append((run.everything, frozen(session.state_dict()["control"])))
    assert ends[1] == ends[2] != ends[0]
