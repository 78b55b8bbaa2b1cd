"""StepClamp on an accelerator: the same run, and who waits for what."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bits import frozen
from runs import HostReads
from step_clamp_runs import EVERY_OPTIMIZER, Answering, Run, batch, overlong, prepared
from step_lengths import dropping, normalizing, plain
from torch import Tensor, nn
from torch.optim import Optimizer
from torch_optimizers import adamw, adamw_fused, muon_and_adamw, sgd

import redline
from redline import NonFiniteGuard, RunStoppedError, SpikeGuard, StepClamp


@pytest.fixture
def accelerated(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, tensors pass for those of an accelerator, whose values nobody on the host knows."""

    def begin() -> None:
        for module in ("interventions", "control"):
            monkeypatch.setattr(f"redline.{module}.is_on_host", lambda tensor: False)

    return begin


def all_three() -> list[redline.Controller]:
    return [NonFiniteGuard(), SpikeGuard(), StepClamp(0.1)]


def long_steps(run: Run, seeds: Sequence[int]) -> None:
    """Every third step is far too long, every seventh batch has a NaN in its gradients."""
    for seed in seeds:
        run.backward(seed)
        factor = 30 if seed % 3 == 0 else 1
        if seed % 7 == 0:
            next(run.model.parameters()).grad.view(-1)[0] = math.nan  # type: ignore[union-attr]
        for optimizer in run.optimizers:
            for group in optimizer.param_groups:
                group["lr"] *= factor
        run.update()
        for optimizer in run.optimizers:
            for group in optimizer.param_groups:
                group["lr"] /= factor


@EVERY_OPTIMIZER
@pytest.mark.parametrize("model", [plain, normalizing], ids=lambda make: make.__name__)
def test_on_an_accelerator_the_run_is_the_same(
    optimizers: Callable[[nn.Module], list[Optimizer]],
    model: Callable[[], nn.Module],
    accelerated: Callable[[], None],
) -> None:
    def run() -> tuple[Any, ...]:
        one = Run(optimizers, model)
        with one.attach(*all_three()) as session:
            long_steps(one, range(1, 16))
            gauges = {
                name: session.latest.value(name) for name in ("redline_step_scale", "redline_committed_step_size")
            }
            counters = {name: session.latest.series(f"redline_{name}_total") for name in ("interventions", "steps")}
        return one.everything, repr(session.interventions), counters, gauges, repr(session.report().to_dict()["notes"])

    on_host = run()
    accelerated()
    on_device = run()
    for what, host, device in zip(("run", "trace", "counters", "gauges", "notes"), on_host, on_device, strict=True):
        assert device == host, what
    assert "'scale'" in on_host[1]
    assert "'withhold'" in on_host[1]


def test_on_an_accelerator_an_infinite_r_commits_nothing(accelerated: Callable[[], None]) -> None:
    accelerated()
    run, step = overlong()
    before = frozen(run.parameters)
    with run.attach(StepClamp()) as session:
        step(run)
        assert frozen(run.parameters) == before
        assert session.latest.value("redline_committed_step_size") == 0
        assert session.latest.value("redline_step_scale") == 0
        assert [(one.action, one.saw["r"], one.saw["scale"]) for one in session.interventions] == [
            ("scale", math.inf, 0)
        ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_on_an_accelerator_the_run_is_the_same_in_other_precisions(
    dtype: torch.dtype, accelerated: Callable[[], None]
) -> None:
    def run() -> tuple[Any, str]:
        one = Run(sgd, lambda: Answering(Tensor.float if dtype is torch.bfloat16 else Tensor.clone).to(dtype))
        with one.attach(NonFiniteGuard(), StepClamp(0.1)) as session:
            for seed in range(6):
                one.optimizers[0].zero_grad()
                one.optimizers[0].param_groups[0]["lr"] = 3.0 if seed % 2 else 1e-2
                x, y = batch(seed)
                F.cross_entropy(one.model(x.to(dtype)), y).backward()
                one.update()
            assert 0 < len(session.interventions) < 6
            return one.everything, repr(session.interventions)

    on_host = run()
    accelerated()
    assert run() == on_host


@pytest.mark.parametrize("optimizers", [sgd, adamw_fused], ids=lambda make: make.__name__)
@pytest.mark.parametrize("model", [plain, dropping, normalizing], ids=lambda make: make.__name__)
def test_on_an_accelerator_nobody_waits_twice_a_step(
    optimizers: Callable[[nn.Module], list[Optimizer]],
    model: Callable[[], nn.Module],
    accelerated: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import redline.interventions
    import redline.readings

    def waits(**clamp: Any) -> list[int]:
        """At each step of a run with a step too long now and then; the first is left out."""
        copies: list[int] = []
        for module in (redline.interventions, redline.readings):
            bring = module.to_host
            monkeypatch.setattr(module, "to_host", lambda tensors, bring=bring: (copies.append(1), bring(tensors))[1])
        found = []
        run = Run(optimizers, model)
        with run.attach(NonFiniteGuard(), SpikeGuard(), StepClamp(0.1, **clamp)) as session:
            for seed in range(1, 9):
                run.backward(seed)
                for optimizer in run.optimizers:
                    optimizer.param_groups[0]["lr"] = 0.5 if seed % 3 == 0 else 1e-3
                copies.clear()
                with HostReads() as reads:
                    run.update()
                found.append(len(copies) + len(reads.seen))
            copies.clear()
            assert {one.action for one in session.interventions} == {"scale"}
            assert 1 < len(session.interventions) < 8
        return found[1:]

    bare = Run(optimizers, model)
    bare.step(1)
    bare.backward(2)
    with HostReads() as reads:
        bare.update()
    assert reads.seen == [], "the optimizer itself waits for nothing"
    assert min(waits()) > 1, "on the host it costs nothing to look"
    accelerated()
    assert waits() == [2] * 7, "once before the update, for the guards, and once after it, for the clamp"
    accelerated()
    assert waits(stale_after=1) == [1] * 7, "a clamp that measures every step need not ask"


@pytest.mark.parametrize(
    "controllers",
    [lambda: [NonFiniteGuard()], all_three, lambda: [StepClamp(), NonFiniteGuard()]],
    ids=["guard", "all three", "clamp and guard"],
)
@pytest.mark.parametrize("optimizers", [sgd, adamw, muon_and_adamw], ids=lambda make: make.__name__)
def test_on_an_accelerator_an_update_that_is_not_finite_is_taken_back_at_once_and_the_run_stops_before_its_next(
    optimizers: Callable[[nn.Module], list[Optimizer]],
    controllers: Callable[[], list[redline.Controller]],
    accelerated: Callable[[], None],
) -> None:
    accelerated()
    run = prepared(optimizers)
    with run.attach(*controllers()) as session:
        run.step(3)
        before = frozen(run.parameters)
        rates = [group["lr"] for optimizer in run.optimizers for group in optimizer.param_groups]
        for optimizer in run.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = math.nan
        run.step(4)
        assert frozen(run.parameters) == before
        state = run.everything
        for optimizer in run.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rates.pop(0)
        run.backward(5)
        with pytest.raises(RunStoppedError, match=r"rejected step 1: the update was not finite \(norm nan\)"):
            run.update()
        assert frozen(run.parameters) == before
        assert run.everything[1][0]["state"] == state[1][0]["state"]
    assert [(one.step, one.action) for one in session.interventions if one.step] == [(1, "reject")], "once"


def test_on_an_accelerator_the_clamp_alone_waits_for_nothing_and_the_run_stops_once_the_rejection_is_read(
    accelerated: Callable[[], None],
) -> None:
    accelerated()
    run = prepared(sgd)
    with run.attach(StepClamp()) as session:
        run.step(3)
        before = frozen(run.parameters)
        rate = run.optimizers[0].param_groups[0]["lr"]
        run.optimizers[0].param_groups[0]["lr"] = math.nan
        for seed in (4, 5):
            run.step(seed)
            assert frozen(run.parameters) == before
        run.optimizers[0].param_groups[0]["lr"] = rate
        assert [(one.step, one.action) for one in session.interventions] == [(1, "reject"), (2, "reject")]
        run.backward(6)
        with pytest.raises(RunStoppedError, match=r"StepClamp rejected step \d: the update was not finite"):
            run.update()
        assert frozen(run.parameters) == before


def test_on_an_accelerator_what_nobody_reads_is_read_in_the_end(accelerated: Callable[[], None]) -> None:
    accelerated()
    run = prepared(sgd)
    seeds = iter(range(100))
    with run.attach(StepClamp()):
        run.optimizers[0].param_groups[0]["lr"] = math.nan
        with pytest.raises(RunStoppedError, match="StepClamp rejected step"):
            run.steps_of(seeds)
    assert 30 < len(list(seeds)) < 99, "within 64 steps or so, and not at once"


def test_on_an_accelerator_a_checkpoint_that_is_loaded_ends_a_rejection_that_nobody_read(
    accelerated: Callable[[], None],
) -> None:
    accelerated()
    run = prepared(sgd)
    with run.attach(NonFiniteGuard()) as session:
        run.step(3)
        saved = copy.deepcopy((session.state_dict(), run.model.state_dict(), run.optimizers[0].state_dict()))
        run.optimizers[0].param_groups[0]["lr"] = math.nan
        run.step(4)
        session.load_state_dict(saved[0])
        run.model.load_state_dict(saved[1])
        run.optimizers[0].load_state_dict(saved[2])
        run.step(4)
    assert session.interventions == ()


def test_on_an_accelerator_a_restored_state_makes_a_rejected_step_no_step(accelerated: Callable[[], None]) -> None:
    accelerated()
    alone, run = prepared(adamw), prepared(adamw)
    with run.attach(NonFiniteGuard(restore_state=True), StepClamp(1e4)) as session:
        run.optimizers[0].param_groups[0]["lr"] = math.nan
        run.step(3)
        run.optimizers[0].param_groups[0]["lr"] = alone.optimizers[0].param_groups[0]["lr"]
        assert run.everything == alone.everything
        alone.step(4)
        run.step(4)
    assert run.everything == alone.everything
    assert [one.action for one in session.interventions] == ["reject"]


class Rejecting(redline.Controller):
    """Knows by itself that it rejects; only what it saw is still on the device."""

    def inspect(self, step: redline.Step) -> list[redline.Reject]:
        return [redline.Reject("tau = {tau:.3g}.", {"tau": step.update.norm})] if step.index == 1 else []


@pytest.mark.parametrize("on_accelerator", [False, True])
@pytest.mark.parametrize("restores", [False, True])
def test_on_an_accelerator_a_rejection_that_the_host_knows_of_is_carried_out_as_on_the_host(
    restores: bool, on_accelerator: bool, accelerated: Callable[[], None]
) -> None:
    if on_accelerator:
        accelerated()
    alone, run = prepared(adamw), prepared(adamw)
    controller = Rejecting()
    controller.snapshots_state = restores
    with run.attach(controller) as session:
        run.step(3)
        alone.step(3)
        before = run.everything
        if restores:
            run.step(4)
            assert run.everything == before
            run.step(5)
            alone.step(5)
            assert run.everything == alone.everything
        else:
            with pytest.raises(RunStoppedError, match=r"Rejecting rejected step 1: tau = 0\.\d+\."):
                run.step(4)
            assert frozen(run.parameters) == frozen(alone.parameters)
        assert [(one.step, one.action) for one in session.interventions] == [(1, "reject")]


@pytest.mark.parametrize("on_accelerator", [False, True])
@pytest.mark.parametrize("controllers", [[StepClamp], [NonFiniteGuard, StepClamp]], ids=["clamp", "guard and clamp"])
def test_the_clamp_and_the_monitor_of_the_radius_cost_one_tangent_together(
    controllers: list[Any], on_accelerator: bool, accelerated: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    import redline.tangent_probe

    taken = []
    take = redline.tangent_probe.logit_tangent
    monkeypatch.setattr(
        redline.tangent_probe, "logit_tangent", lambda *args, **kwargs: (taken.append(1), take(*args, **kwargs))[1]
    )
    if on_accelerator:
        accelerated()
    run = prepared()
    with run.attach(*(kind() for kind in controllers), monitors=[redline.GhostRadius(1)]):
        run.step(3)
        taken.clear()  # the first is checked
        run.step(4)
        assert len(taken) == 1
