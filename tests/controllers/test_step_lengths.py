"""What StepClamp and RadiusLR do alike where the length of a step is not known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from radius_lr_runs import Run, unlimited

import redline
from redline import RedlineWarning, StepClamp


@pytest.mark.parametrize("controller", [lambda: StepClamp(1e-3), unlimited], ids=["StepClamp", "RadiusLR"])
def test_a_step_without_a_forward_is_left_alone_once_one_was_measured(
    controller: Callable[[], redline.Controller],
) -> None:
    run = Run()
    with run.attach(controller()) as session:
        run.step(1)
        assert len(session.interventions) == 1
        alone = run.uncontrolled()
        for seed in (2, 3):
            for one in (alone, run):
                for k, parameter in enumerate(one.model.parameters()):
                    generator = torch.Generator().manual_seed(10 * seed + k)
                    parameter.grad = torch.randn(parameter.shape, generator=generator)
            alone.update()
            if seed == 2:
                with pytest.warns(RedlineWarning, match="was not called in training mode"):
                    run.update()
            else:
                run.update()  # said once; again would be an error here
        assert run.everything == alone.everything
        assert session.latest.measured_at[redline.Series("redline_committed_step_size")] == 0
        assert session.latest.value("redline_step_scale") == 1
    assert len(session.interventions) == 1
