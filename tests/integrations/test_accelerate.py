"""accelerate: a loop that is watched goes as one that is not, and is measured where its steps really happen."""

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
from redline.numerics import logit_tangent
from redline.optimizers import raw_optimizers

pytest.importorskip("accelerate")
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import GeneralTracker
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper, DummyOptim

from redline.integrations.accelerate import attach, own_forward

METHODS = "redline_tangent_fallbacks_total"


ADAMW = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)


class Loop:
    """A loop that accelerate drives: gradients clipped, a scheduler, micro-batches if told so."""

    def __init__(
        self,
        net: Callable[[], nn.Module] = plain_net,
        precision: str = "no",
        optimizer: Callable[..., Optimizer] = ADAMW,
        accumulate: int = 1,
        **arguments: Any,
    ) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        seed()
        self.accelerator = Accelerator(
            cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulate, **arguments
        )
        self.accumulate = accumulate
        raw = net()
        self.raw_model, self.raw_optimizer = raw, optimizer([p for p in raw.parameters() if p.requires_grad])
        scheduler = torch.optim.lr_scheduler.StepLR(self.raw_optimizer, 3, 0.9)
        self.model, self.optimizer, self.scheduler = self.accelerator.prepare(raw, self.raw_optimizer, scheduler)
        self.trace: list[Any] = []
        self.steps: list[tuple[dict[str, Tensor], dict[str, Tensor], Tensor]] = []
        self.losses: list[float] = []

    def attach(self, **arguments: Any) -> redline.Session:
        return attach(self.accelerator, self.model, self.optimizer, schedulers=[self.scheduler], **arguments)

    def run(self, steps: int, session: redline.Session | None = None, *, spike: int | None = None) -> Loop:
        for x, y in batches(steps * self.accumulate):
            with self.accelerator.accumulate(self.model):
                loss = F.cross_entropy(self.model(x), y)
                if session is not None:
                    session.observe(loss=loss)
                self.losses.append(loss.item())
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                rate = 3000 if len(self.steps) == spike else 1
                self.raw_optimizer.param_groups[0]["lr"] *= rate
                before = parameters_of(self.raw_model)
                self.optimizer.step()
                if self.accelerator.sync_gradients:
                    self.steps.append((before, parameters_of(self.raw_model), x))
                self.raw_optimizer.param_groups[0]["lr"] /= rate
                self.scheduler.step()
                self.optimizer.zero_grad()
            self.trace.append(in_bits(self.raw_model, self.raw_optimizer))
        return self

    def expected_r(self) -> list[float]:
        return [
            reference_r(plain_net(), before, after, lambda net, x=x: net(x.double())) for before, after, x in self.steps
        ]


# What is observed ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_watched_loop_is_bit_identical_to_one_that_is_not(precision: str, accumulate: int) -> None:
    watched = Loop(Delicate, precision, accumulate=accumulate)
    with watched.attach(monitors=every_step(), sinks=[Keep()]) as session:
        watched.run(8, session)
    alone = Loop(Delicate, precision, accumulate=accumulate).run(8)

    assert watched.trace == alone.trace
    assert watched.losses == alone.losses
    assert session.notes == ()
    assert session.latest.value("redline_steps_total") == 8 == len(watched.steps)
    assert session.latest.value("redline_loss") == watched.losses[-1]
    assert math.isfinite(session.latest.value(R))
    assert session.latest.value(METHODS, method="finite_difference") == 0


@pytest.mark.parametrize("accumulate", [1, 2])
def test_r_is_that_of_the_applied_step_on_its_last_micro_batch(accumulate: int) -> None:
    loop, keep = Loop(accumulate=accumulate), Keep()
    with loop.attach(monitors=[redline.GhostRadius(every=1, max_samples=None)], sinks=[keep]):
        loop.run(4)
    assert keep.values(R) == pytest.approx(loop.expected_r(), rel=1e-3)


class WithoutForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Opaque(nn.Module):
    """The plain net behind a kernel that forward-mode AD cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.net = plain_net()

    def forward(self, x: Tensor) -> Tensor:
        return WithoutForwardMode.apply(self.net(x))


@pytest.mark.parametrize("net", [plain_net, Opaque])
def test_r_under_autocast_is_measured_in_full_precision(net: Callable[[], nn.Module]) -> None:
    """Autocast is within the prepared model's forward, where a finite difference would measure rounding."""
    loop, keep = Loop(net, "bf16"), Keep()
    with loop.attach(monitors=[redline.GhostRadius(every=1, max_samples=None)], sinks=[keep]) as session:
        loop.run(4)
    expected = [
        reference_r(net(), before, after, lambda wide, x=x: wide(x.double())) for before, after, x in loop.steps
    ]
    assert keep.values(R) == pytest.approx(expected, rel=1e-3)
    assert session.latest.value(METHODS, method="finite_difference") == (4 if net is Opaque else 0)
    assert session.notes == ()


def test_the_models_own_forward_is_put_back() -> None:
    loop = Loop(precision="bf16")
    (x, _) = batches(1)[0]
    patched = vars(loop.model)["forward"]
    with own_forward(loop.model, "bf16") as taken:
        assert taken is torch.bfloat16
        assert torch.equal(loop.model(x), plain_net()(x))
    assert vars(loop.model)["forward"] is patched

    def fails() -> None:
        with own_forward(loop.model, "bf16"):
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fails()
    assert vars(loop.model)["forward"] is patched
    assert not torch.equal(loop.model(x), plain_net()(x))
    bare = plain_net()
    with own_forward(bare, "bf16") as taken:
        assert taken is None
        assert "forward" not in vars(bare)
    assert "forward" not in vars(bare)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_tangent_knows_of_the_autocast_that_the_run_is_in(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it saves much, on an accelerator, the tangent is taken in it."""
    seen = []

    def looked_at(*args: Any, **kwargs: Any) -> Any:
        seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        return logit_tangent(*args, **kwargs)

    monkeypatch.setattr("redline.tangent_probe.logit_tangent", looked_at)
    loop = Loop(precision=precision)
    with loop.attach(monitors=[redline.GhostRadius(every=1)]):
        loop.run(2)
    assert set(seen) == {torch.bfloat16 if precision == "bf16" else None}


@pytest.mark.parametrize(("precision", "label"), [("no", "float32"), ("bf16", "bf16-mixed")])
def test_the_run_is_described(precision: str, label: str) -> None:
    loop = Loop(precision=precision)
    with loop.attach(run="mine") as session:
        run = session.latest.run
    assert (run.run, run.precision, run.strategy, run.world_size) == ("mine", label, "single", 1)


# What is handed on ---------------------------------------------------------------------------------------------------


class Tracker(GeneralTracker):
    name = "kept"
    requires_logging_directory = False

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[dict[str, float], int]] = []

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        pass

    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        assert step is not None
        self.logged.append((values, step))


def test_readings_go_to_the_trackers() -> None:
    tracker, keep = Tracker(), Keep(2)
    loop = Loop(log_with=tracker)
    with loop.attach(monitors=every_step(), sinks=[keep], log_every=2) as session:
        loop.accelerator.init_trackers("run")  # after attaching, as it may be
        loop.run(5, session)
    assert [step for _, step in tracker.logged] == [0, 2, 4]
    assert [values[R] for values, _ in tracker.logged] == keep.values(R)
    assert tracker.logged[-1][0]["redline_loss"] == loop.losses[4]
    assert tracker.logged[-1][0]["redline_weight_spectral_norm/0.weight"] > 0


def test_nothing_is_logged_where_nobody_asks() -> None:
    tracker = Tracker()
    loop = Loop(log_with=tracker)
    loop.accelerator.init_trackers("run")
    with loop.attach(log_every=0) as session:
        loop.run(2, session)
    assert tracker.logged == []


# State ---------------------------------------------------------------------------------------------------------------


def test_the_session_goes_with_accelerates_checkpoints(tmp_path: Path) -> None:
    first = Loop()
    session = first.attach(controllers=[Counting()])
    first.accelerator.register_for_checkpointing(session)
    first.run(3, session)
    first.accelerator.save_state(str(tmp_path))
    first.run(3, session)
    session.close()
    expected = in_bits(first.raw_model, first.raw_optimizer)

    second = Loop()
    session = second.attach(controllers=[Counting()])
    second.accelerator.register_for_checkpointing(session)
    second.accelerator.load_state(str(tmp_path))
    second.run(3, session)
    session.close()

    assert session.latest.value("redline_steps_total") == 6
    assert [one.step for one in session.interventions] == [1, 2, 3, 4, 5]
    assert in_bits(second.raw_model, second.raw_optimizer)[:3] == expected[:3]


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


@pytest.mark.parametrize("engine", [DeepSpeedOptimizerWrapper, DummyOptim])
def test_deepspeed_is_refused_by_name(engine: Any) -> None:
    net = plain_net()
    optimizer = engine.__new__(engine)  # DeepSpeed itself is not here
    optimizer.optimizer = SimpleNamespace()
    with pytest.raises(redline.ConfigurationError, match=r"DeepSpeed trains; expected .* from within its own engine"):
        attach(Accelerator(cpu=True), net, optimizer)
    assert raw_optimizers(Loop().optimizer)[0].__class__ is torch.optim.AdamW
