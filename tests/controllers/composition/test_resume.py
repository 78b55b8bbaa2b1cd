"""A run under all controllers together goes on from its state."""

from __future__ import annotations

import io
from collections.abc import Callable

import torch
from bits import frozen
from composition_runs import EVERY_OPTIMIZER, FIVE, Run
from torch import nn
from torch.optim import Optimizer

import redline
from redline import RadiusLR, SpikeGuard


@EVERY_OPTIMIZER
def test_a_run_under_all_of_them_may_be_cut_after_every_step(
    optimizers: Callable[[nn.Module], list[Optimizer]],
) -> None:
    def controllers() -> list[redline.Controller]:
        return [*(one() for one in FIVE.values()), SpikeGuard(window=16, every=4), RadiusLR(0.9)]

    through, run = Run(optimizers), Run(optimizers)
    with through.attach(*controllers()) as whole:
        for seed in range(10):
            through.step(seed, broken=seed in (3, 6))
    session = run.attach(*controllers())
    for seed in range(10):
        run.step(seed, broken=seed in (3, 6))
        file = io.BytesIO()
        torch.save([part.state_dict() for part in (run.model, *run.optimizers, session)], file)
        session.close()
        run = Run(optimizers)
        session = run.attach(*controllers())
        file.seek(0)
        for part, state in zip((run.model, *run.optimizers, session), torch.load(file, weights_only=True), strict=True):
            part.load_state_dict(state)
    assert run.everything == through.everything
    assert frozen([vars(one) for one in session.interventions]) == frozen([vars(one) for one in whole.interventions])
    session.close()
