"""Fabric: a loop that is watched goes as one that is not, and is measured where its steps really happen."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sinks import Keep
from torch import Tensor, nn
from torch.optim import Optimizer
from trainer_runs import (
    CLASSES,
    FEATURES,
    Counting,
    Delicate,
    R,
    batches,
    every_step,
    in_bits,
    parameters_of,
    plain_net,
    reference_r,
    seed,
)

import redline

pytest.importorskip("lightning")
from lightning.fabric import Fabric
from lightning.fabric.wrappers import _FabricModule

from redline.integrations.fabric import RedlineFabricCallback, attach

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


ADAMW = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)


class Loop:
    """A loop that Fabric drives: two micro-batches a step, gradients clipped."""

    def __init__(
        self,
        net: Callable[[], nn.Module] = plain_net,
        precision: Any = "32-true",
        loggers: Any = (),
        optimizer: Callable[..., Optimizer] = ADAMW,
        accumulate: int = 1,
    ) -> None:
        seed()
        self.fabric = Fabric(accelerator="cpu", devices=1, precision=precision, loggers=list(loggers))
        self.accumulate = accumulate
        raw = net()
        self.raw_model, self.raw_optimizer = raw, optimizer([p for p in raw.parameters() if p.requires_grad])
        self.model, self.optimizer = self.fabric.setup(raw, self.raw_optimizer)
        self.trace: list[Any] = []
        self.steps: list[tuple[dict[str, Tensor], dict[str, Tensor], Tensor]] = []
        self.losses: list[float] = []

    def attach(self, **arguments: Any) -> redline.Session:
        return attach(self.fabric, self.model, self.optimizer, **arguments)

    def run(self, steps: int, session: redline.Session | None = None, *, spike: int | None = None) -> Loop:
        for index, (x, y) in enumerate(batches(steps * self.accumulate)):
            last = (index + 1) % self.accumulate == 0
            with self.fabric.no_backward_sync(self.model, enabled=not last):
                loss = F.cross_entropy(self.model(x).float(), y)
                if session is not None:
                    session.observe(loss=loss)
                self.fabric.backward(loss / self.accumulate)
            self.losses.append(loss.item())
            if last:
                self.fabric.clip_gradients(self.model, self.optimizer, max_norm=1.0)
                self.raw_optimizer.param_groups[0]["lr"] *= 3000 if len(self.steps) == spike else 1
                before = parameters_of(self.raw_model)
                self.optimizer.step()
                self.steps.append((before, parameters_of(self.raw_model), x))
                self.raw_optimizer.param_groups[0]["lr"] /= 3000 if len(self.steps) - 1 == spike else 1
                self.optimizer.zero_grad()
            self.trace.append(in_bits(self.raw_model, self.raw_optimizer))
        return self


# What is observed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_a_watched_loop_is_bit_identical_to_one_that_is_not(precision: str, accumulate: int) -> None:
    watched = Loop(Delicate, precision, accumulate=accumulate)
    with watched.attach(monitors=every_step(), sinks=[Keep()]) as session:
        watched.run(8, session)
    alone = Loop(Delicate, precision, accumulate=accumulate).run(8)

    assert watched.trace == alone.trace
    assert watched.losses == alone.losses
    assert session.notes == ()
    assert session.latest.value("redline_steps_total") == 8
    assert math.isfinite(session.latest.value(R))
    assert set(session.latest.layers("redline_weight_spectral_norm")) == {
        "inputs.weight", "frozen.0.weight", "outputs.weight",
    }  # fmt: skip


@pytest.mark.parametrize("accumulate", [1, 2])
def test_r_is_that_of_the_applied_step_on_its_last_micro_batch(accumulate: int) -> None:
    loop, keep = Loop(accumulate=accumulate), Keep()
    with loop.attach(monitors=[redline.GhostRadius(every=1, max_samples=None)], sinks=[keep]):
        loop.run(4)
    expected = [
        reference_r(plain_net(), before, after, lambda net, x=x: net(x.double())) for before, after, x in loop.steps
    ]
    assert keep.values(R) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_r_in_half_precision_is_measured_with_the_inputs_that_the_model_is_given(precision: str) -> None:
    loop, keep = Loop(precision=precision), Keep()
    with loop.attach(monitors=[redline.GhostRadius(every=1, max_samples=None)], sinks=[keep]) as session:
        loop.run(4)
    expected = [
        reference_r(plain_net(), before, after, lambda net, x=x: net(x.double())) for before, after, x in loop.steps
    ]
    assert keep.values(R) == pytest.approx(expected, rel=0.02)
    assert session.notes == ()
    assert session.latest.value("redline_tangent_fallbacks_total", method="finite_difference") == 0


def test_the_run_is_described() -> None:
    loop = Loop(precision="bf16-mixed")
    with loop.attach(run="mine") as session:
        run = session.latest.run
    assert (run.run, run.precision, run.strategy, run.world_size) == ("mine", "bf16-mixed", "SingleDeviceStrategy", 1)


def test_plain_attach_works_on_what_fabric_set_up() -> None:
    loop = Loop(precision="bf16-mixed")
    with redline.attach(loop.model, loop.optimizer, monitors=every_step()) as session:
        loop.run(2, session)
    assert session.notes == ()
    assert session.latest.value("redline_steps_total") == 2
    assert session.latest.value("redline_loss") == loop.losses[-1]
    assert session.latest.value(R) > 0


class WithStep(nn.Module):
    """A module with a ``training_step``, as Fabric leads it through ``forward`` where a strategy wraps the module."""

    def __init__(self) -> None:
        super().__init__()
        self.net = plain_net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])


def test_a_training_step_that_is_led_through_forward_is_not_taken_for_it() -> None:
    loop = Loop(WithStep)
    model = _FabricModule(nn.DataParallel(loop.raw_model), loop.fabric.strategy, original_module=loop.raw_model)
    (batch,) = batches(1)
    with attach(loop.fabric, model, loop.optimizer, monitors=[redline.GhostRadius(1, max_samples=None)]) as session:
        loop.fabric.backward(model.training_step(batch))
        before = parameters_of(loop.raw_model)
        loop.optimizer.step()
    expected = reference_r(WithStep(), before, parameters_of(loop.raw_model), lambda net: net(batch[0].double()))
    assert session.latest.value(R) == pytest.approx(expected, rel=1e-3)
    assert session.notes == ()


# What is handed on ---------------------------------------------------------------------------------------------------


def test_readings_go_to_fabrics_loggers() -> None:
    logged: list[tuple[dict[str, float], int]] = []
    logger = SimpleNamespace(log_metrics=lambda metrics, step: logged.append((metrics, step)))
    loop, keep = Loop(loggers=[logger]), Keep(2)
    with loop.attach(monitors=every_step(), sinks=[keep], log_every=2) as session:
        loop.run(5, session)
    assert [step for _, step in logged] == [0, 2, 4]
    assert [values[R] for values, _ in logged] == keep.values(R)
    assert logged[-1][0]["redline_loss"] == loop.losses[4]
    assert logged[-1][0]["redline_weight_spectral_norm/0.weight"] > 0


def test_nothing_is_logged_where_nobody_asks() -> None:
    logger = SimpleNamespace(log_metrics=lambda metrics, step: pytest.fail("logged"))
    loop = Loop(loggers=[logger])
    with loop.attach(log_every=0) as session:
        loop.run(2, session)


# State ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_callback", [False, True])
def test_the_session_goes_with_fabrics_checkpoints(by_callback: bool, tmp_path: Path) -> None:
    def started(loop: Loop) -> tuple[Any, redline.Session]:
        if not by_callback:
            session = loop.attach(controllers=[Counting()])
            return session, session
        callback = RedlineFabricCallback(controllers=[Counting()])
        callback.on_train_start(loop.fabric, loop.model, loop.optimizer)
        assert callback.session is not None
        return callback, callback.session

    first = Loop()
    kept, session = started(first)
    first.run(3, session)
    first.fabric.save(
        tmp_path / "run.ckpt", {"model": first.model, "optimizer": first.optimizer, "redline": kept, "step": 3}
    )
    first.run(3, session)
    session.close()

    second = Loop(plain_net)
    kept, session = started(second)
    left = second.fabric.load(
        tmp_path / "run.ckpt", {"model": second.model, "optimizer": second.optimizer, "redline": kept}
    )
    assert left == {"step": 3}
    second.run(3, session)
    session.close()

    assert session.latest.value("redline_steps_total") == 6
    assert [one.step for one in session.interventions] == [1, 2, 3, 4, 5]
    assert in_bits(second.raw_model, second.raw_optimizer) == in_bits(first.raw_model, first.raw_optimizer)


def test_a_state_loaded_ahead_of_training_waits_for_the_session() -> None:
    first = Loop()
    callback = RedlineFabricCallback()
    assert callback.state_dict() == {}
    callback.load_state_dict({})
    callback.on_train_start(first.fabric, first.model, first.optimizer)
    first.run(2, callback.session)
    state = callback.state_dict()
    callback.on_train_end()

    other, second = RedlineFabricCallback(), Loop()
    other.load_state_dict(state)
    other.on_train_start(second.fabric, second.model, second.optimizer)
    assert other.session is not None
    assert other.session.latest.value("redline_steps_total") == 2
    other.on_train_end()


# By fabric.call ------------------------------------------------------------------------------------------------------


def test_the_callback_follows_what_the_trainer_calls() -> None:
    keep = Keep()
    callback = RedlineFabricCallback(monitors=every_step(), sinks=[keep], run="called")
    seed()
    fabric = Fabric(accelerator="cpu", devices=1, callbacks=[callback])
    net = plain_net()
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), 0.1))
    losses = []
    for _ in range(2):  # trained twice: a session each
        fabric.call("on_train_start", fabric=fabric, model=model, optimizer=optimizer, unknown=3)
        session = callback.session
        assert session is not None
        for x, y in batches(3):
            loss = F.cross_entropy(model(x), y)
            losses.append(loss.item())
            fabric.call("on_before_backward", loss)
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        fabric.call("on_train_end")
        assert session.latest.value("redline_steps_total") == 3
        assert session.latest.run.run == "called"
        assert session.notes == ()
    assert keep.values("redline_loss") == losses
    assert not net._forward_pre_hooks


# Controlling, and refusing -------------------------------------------------------------------------------------------


def test_the_clamp_saves_a_loop_with_a_spike() -> None:
    sgd = partial(torch.optim.SGD, lr=0.3)
    alone = Loop(optimizer=sgd).run(30, spike=10)
    held = Loop(optimizer=sgd)
    with held.attach(controllers=[redline.StepClamp()]) as session:
        held.run(30, session, spike=10)
    assert [one.step for one in session.interventions if one.step >= 10][:1] == [10]
    assert max(alone.losses[11:]) > 10 * max(held.losses[11:])
    assert held.losses[-1] < 1.0 < math.log(CLASSES)


def test_deepspeed_is_refused_by_name() -> None:
    class DeepSpeedStrategy:
        pass

    net = nn.Linear(FEATURES, CLASSES)
    fabric = SimpleNamespace(strategy=DeepSpeedStrategy(), loggers=[])
    with pytest.raises(redline.ConfigurationError, match=r"DeepSpeed trains; expected .* from within its own engine"):
        attach(fabric, net, torch.optim.SGD(net.parameters(), 0.1))  # type: ignore[arg-type]
    with pytest.raises(redline.ConfigurationError, match="got a str as model"):
        attach(Fabric(accelerator="cpu"), "net", torch.optim.SGD(net.parameters(), 0.1))  # type: ignore[arg-type]
    with pytest.raises(redline.ConfigurationError, match="got batch_dim=-1"):
        attach(Fabric(accelerator="cpu"), net, torch.optim.SGD(net.parameters(), 0.1), batch_dim=-1)
