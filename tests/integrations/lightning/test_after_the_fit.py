"""What is left after a fit, however it ends: no hook, no thread, no port; and the callback serves again."""

from __future__ import annotations

import pickle
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning_runs import QUIET, CallsItself, data, measuring_r, trainer
from torch import Tensor, nn
from torch.optim import Optimizer

import redline
from redline.integrations.lightning import RedlineCallback

pytestmark = QUIET


def hooks_on(module: nn.Module, optimizers: list[Optimizer]) -> int:
    """How many hooks of any kind there are."""
    found = 0
    for owner in (*module.modules(), *optimizers):
        for name, value in vars(owner).items():
            if name.endswith("_hooks") and isinstance(value, dict):
                found += len(value)
    return found


class KeepOptimizers(CallsItself):
    """Remembers its optimizers, which Lightning lets go of after a fit."""

    def __init__(self, fails: BaseException | None = None, at: int = 3) -> None:
        super().__init__()
        self.fails, self.at = fails, at
        self.made: list[Optimizer] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.fails is not None and batch_idx == self.at:
            raise self.fails
        return loss

    def configure_optimizers(self) -> Optimizer:
        self.made.append(torch.optim.SGD(self.parameters(), lr=0.1))
        return self.made[-1]


@pytest.fixture
def interrupts_restored() -> Iterator[None]:
    """Lightning stops listening to Ctrl-C for good once it was pressed."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


class Object(redline.Controller):
    """Raises at step 2, or rejects it."""

    def __init__(self, *, rejects: bool) -> None:
        self.rejects = rejects

    def inspect(self, step: redline.Step) -> list[redline.Reject]:
        if step.index == 2 and not self.rejects:
            raise RuntimeError("a mistake of its own")
        return [redline.Reject("seen enough.")] if step.index == 2 else []


def watched_completely(**arguments: Any) -> tuple[RedlineCallback, redline.PrometheusExporter]:
    exporter = redline.PrometheusExporter(port=0)
    return RedlineCallback(sinks=[exporter], **arguments), exporter


def assert_nothing_is_left(
    module: KeepOptimizers, exporter: redline.PrometheusExporter, threads: set[threading.Thread]
) -> None:
    assert hooks_on(module, module.made) == 0
    assert set(threading.enumerate()) <= threads
    assert exporter.url is None
    with pytest.raises(ConnectionRefusedError), socket.create_connection(("127.0.0.1", exporter.port), timeout=5):
        pass
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_a_fit_that_ends_leaves_nothing():
    threads = set(threading.enumerate())
    callback, exporter = watched_completely()
    module = KeepOptimizers()
    trainer(callback, max_epochs=1).fit(module, data(5))
    assert_nothing_is_left(module, exporter, threads)


@pytest.mark.parametrize("at", [0, 3])
def test_a_fit_that_fails_leaves_nothing(at: int):
    threads = set(threading.enumerate())
    callback, exporter = watched_completely()
    module = KeepOptimizers(ValueError("bad batch"), at)
    with pytest.raises(ValueError, match="bad batch"):
        trainer(callback, max_epochs=1).fit(module, data(5))
    assert_nothing_is_left(module, exporter, threads)
    assert callback.session is not None
    assert callback.session.latest.value("redline_steps_total") == at


def test_a_fit_that_is_interrupted_leaves_nothing(interrupts_restored: None):
    threads = set(threading.enumerate())
    callback, exporter = watched_completely()
    module = KeepOptimizers(KeyboardInterrupt())
    with pytest.raises(SystemExit):
        trainer(callback, max_epochs=1).fit(module, data(5))
    assert_nothing_is_left(module, exporter, threads)


@pytest.mark.parametrize(
    ("rejects", "error", "message"),
    [
        (True, redline.RunStoppedError, "Object rejected step 2: seen enough"),
        (False, redline.ControllerError, "Object failed at step 2 with RuntimeError: a mistake of its own"),
    ],
)
def test_a_fit_that_a_controller_stops_leaves_nothing(rejects: bool, error: type[Exception], message: str):
    threads = set(threading.enumerate())
    callback, exporter = watched_completely(controllers=[Object(rejects=rejects)])
    module = KeepOptimizers()
    with pytest.raises(error, match=message):
        trainer(callback, max_epochs=1).fit(module, data(5))
    assert_nothing_is_left(module, exporter, threads)


def test_a_configuration_error_leaves_nothing():
    threads = set(threading.enumerate())
    callback, exporter = watched_completely(logits=lambda output: "no logits")
    module = KeepOptimizers()
    with pytest.raises(redline.ConfigurationError, match="got a str as logits"):
        trainer(callback, max_epochs=1).fit(module, data(5))
    assert_nothing_is_left(module, exporter, threads)


def test_the_report_and_the_readings_outlive_the_fit():
    callback, _ = measuring_r()
    trainer(callback, max_epochs=1).fit(CallsItself(), data(5))
    assert callback.session is not None
    assert callback.session.report().steps == 5
    assert callback.session.latest.step == 4


def test_one_callback_serves_two_fits():
    callback, keep = measuring_r()
    exporter = redline.PrometheusExporter(port=0)
    callback = RedlineCallback(monitors=[redline.GhostRadius(every=1), redline.StepHealth()], sinks=[keep, exporter])
    served: list[str | None] = []

    class WhereServed(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            served.append(exporter.url)

    for _ in range(2):
        module = KeepOptimizers()
        trainer(callback, WhereServed(), max_epochs=1).fit(module, data(3))
        assert hooks_on(module, module.made) == 0
        assert callback.session is not None
        assert callback.session.report().steps == 3
        assert len(callback.session.report().notes) == 0
    assert [snapshot.step for snapshot in keep.snapshots] == [0, 1, 2] * 2
    assert len(served) == 6
    assert None not in served


def test_a_fit_after_one_that_failed_is_measured():
    callback, keep = measuring_r()
    with pytest.raises(ValueError, match="bad batch"):
        trainer(callback, max_epochs=1).fit(KeepOptimizers(ValueError("bad batch"), 2), data(5))
    trainer(callback, max_epochs=1).fit(KeepOptimizers(), data(3))
    assert [snapshot.step for snapshot in keep.snapshots] == [0, 1, 0, 1, 2]


@pytest.mark.parametrize("when", ["before a fit", "after a fit"])
def test_the_callback_can_be_pickled(when: str):
    callback = RedlineCallback(run="pickled", module="net")
    if when == "after a fit":
        trainer(callback, max_epochs=1).fit(CallsItself(), data(2))
    copied = pickle.loads(pickle.dumps(callback))
    assert copied.state_key == callback.state_key
    trainer(copied, max_epochs=1).fit(CallsItself(), data(2))
    assert copied.session.report().steps == 2
