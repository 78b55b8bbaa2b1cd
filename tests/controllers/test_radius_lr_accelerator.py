"""RadiusLR on an accelerator: the same run, and it waits for nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from radius_lr_runs import COMMITTED, EVERY_MODEL, EVERY_OPTIMIZER, SCALE, Run, unlimited
from runs import HostReads
from torch import nn
from torch.optim import Optimizer
from torch_optimizers import adamw_fused


@pytest.fixture
def accelerated(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, tensors pass for those of an accelerator, whose values nobody on the host knows."""

    def begin() -> None:
        for module in ("interventions", "control", "parameters", "update_limits"):
            monkeypatch.setattr(f"redline.{module}.is_on_host", lambda tensor: False)

    return begin


@EVERY_OPTIMIZER
@EVERY_MODEL
def test_on_an_accelerator_the_run_is_the_same(
    optimizers: Callable[[nn.Module], list[Optimizer]],
    model: Callable[[], nn.Module],
    accelerated: Callable[[], None],
) -> None:
    def run() -> tuple[Any, ...]:
        one = Run(optimizers, model)
        torch.manual_seed(5)
        with one.attach(unlimited(0.3)) as session:
            for seed in range(6):
                one.times_rate(0 if seed == 3 else 1).step(seed)
                for optimizer in one.optimizers if seed == 3 else ():
                    for group in optimizer.param_groups:
                        group["lr"] = 1e-2
            read = [session.latest.value(name) for name in (SCALE, COMMITTED)]
            counted = session.latest.series("redline_interventions_total")
        return one.everything, repr(session.interventions), read, counted

    on_host = run()
    accelerated()
    on_device = run()
    for what, host, device in zip(("run", "trace", "gauges", "counters"), on_host, on_device, strict=True):
        assert device == host, what


@EVERY_MODEL
def test_on_an_accelerator_it_waits_for_nothing(
    model: Callable[[], nn.Module], accelerated: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    import redline.interventions
    import redline.readings

    accelerated()
    copies: list[int] = []
    for module in (redline.interventions, redline.readings):
        bring = module.to_host
        monkeypatch.setattr(module, "to_host", lambda tensors, bring=bring: (copies.append(1), bring(tensors))[1])
    run = Run(adamw_fused, model)
    with run.attach(unlimited(0.5)) as session:
        run.step(0)  # the first tangent is checked once
        for seed in range(1, 6):
            run.backward(seed)
            copies.clear()
            with HostReads() as reads:
                run.update()
            assert (reads.seen, copies) == ([], [])
        assert [one.step for one in session.interventions] == list(range(6))
