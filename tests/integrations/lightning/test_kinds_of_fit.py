"""Kinds of fit: compiled, distributed, of several callbacks; and how a run is described."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning_runs import (
    FEATURES,
    QUIET,
    CallsItself,
    CallsItsNet,
    Proposal,
    R,
    Task,
    data,
    measuring_r,
    seed,
    trainer,
)
from torch import Tensor

import redline

pytestmark = QUIET


def test_fast_dev_run():
    callback, keep = measuring_r()
    trainer(callback, fast_dev_run=True).fit(CallsItself(), data(5))
    assert len(keep.snapshots) == 1
    assert keep.snapshots[0].value(R) > 0


class Silent(CallsItself):
    """Logs nothing, which is what torch 2.13 can compile of a ``training_step``."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"].item())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_lightning_module(backend: str):
    callback, keep = measuring_r()
    module = Silent()
    proposal = Proposal()
    trainer(callback, proposal, max_epochs=1).fit(torch.compile(module, backend=backend), data(4))
    assert len(module.losses) == 4
    assert keep.values("redline_loss") == pytest.approx(module.losses)
    assert keep.values(R) == pytest.approx(proposal.expected, rel=1e-3)


@pytest.mark.parametrize("name", [None, "net"])
@pytest.mark.parametrize("task", [CallsItself, CallsItsNet])
def test_a_compiled_net_inside(task: type[Task], name: str | None):
    callback, keep = measuring_r(module=name)
    module = task()
    module.net = torch.compile(module.net, backend="eager")
    trainer(callback, max_epochs=1).fit(module, data(4))
    assert keep.values("redline_loss") == pytest.approx(module.losses)
    assert min(keep.values(R)) > 0


@pytest.fixture
def own_process_group() -> Iterator[None]:
    """Whatever a distributed strategy sets up in this process is taken down again."""
    environment = dict(os.environ)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(environment)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("task", [CallsItself, CallsItsNet])
def test_under_ddp(task: type[Task], own_process_group: None):
    callback, keep = measuring_r()
    proposal = Proposal()
    module = task()
    trainer(callback, proposal, max_epochs=1, strategy="ddp", devices=1, use_distributed_sampler=False).fit(
        module, data(6)
    )
    assert keep.values("redline_loss") == pytest.approx(module.losses)
    assert keep.values(R) == pytest.approx(proposal.expected, rel=1e-3)
    assert keep.snapshots[-1].run.strategy == "DDPStrategy"
    assert set(keep.snapshots[-1].series("redline_learning_rate")) == {("SGD", "0")}


def test_what_runs_is_described():
    callback, keep = measuring_r(run="trial-7")
    trainer(callback, max_epochs=1, precision="bf16-mixed").fit(CallsItself(), data(1))
    run = keep.snapshots[0].run
    assert (run.run, run.version, run.precision) == ("trial-7", redline.__version__, "bf16-mixed")
    assert (run.strategy, run.world_size) == ("SingleDeviceStrategy", 1)


def test_two_callbacks_of_one_trainer(tmp_path: Path):
    first, first_keep = measuring_r(run="first")
    second, second_keep = measuring_r(run="second", module="net")
    assert first.state_key != second.state_key
    one = trainer(first, second, max_epochs=1)
    one.fit(CallsItself(), data(5))
    assert first_keep.values(R) == pytest.approx(second_keep.values(R), rel=1e-5)
    assert first_keep.values("redline_loss") == second_keep.values("redline_loss")
    one.save_checkpoint(tmp_path / "both.ckpt")
    saved = torch.load(tmp_path / "both.ckpt", weights_only=True)["callbacks"]
    assert {first.state_key, second.state_key} <= set(saved)


class CallsACopy(pl.Callback):
    """Keeps a copy of the model, as weight averaging does, and calls it in training mode."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        copy.deepcopy(pl_module).train()(torch.zeros(3, FEATURES)).sum().backward()


def test_a_copy_of_the_model_reports_to_nobody():
    def fit(*callbacks: pl.Callback) -> list[float]:
        seed(0)
        callback, keep = measuring_r()
        trainer(callback, *callbacks, max_epochs=1).fit(CallsItself(), data(5))
        return keep.values(R)

    assert fit(CallsACopy()) == fit()
