"""The Lightning callback: it watches any kind of fit, changes nothing about it, and leaves nothing behind."""

from __future__ import annotations

import copy
import csv
import math
import os
import pickle
import random
import signal
import socket
import threading
import typing
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

import redline
from redline.integrations.lightning import RedlineCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX`:UserWarning"),
]

R = "redline_normalized_step_size"
FEATURES, CLASSES = 6, 3


@pytest.fixture(autouse=True)
def seeded() -> None:
    seed(0)


def seed(value: int) -> None:
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002 the run's own stream
    torch.manual_seed(value)


# What is trained -----------------------------------------------------------------------------------------------------


class Task(pl.LightningModule):
    """Cross-entropy by automatic optimization; what ``training_step`` calls is left to subclasses."""

    def __init__(self, optimizer: Callable[[Any], Optimizer] | None = None) -> None:
        super().__init__()
        self.make_optimizer = optimizer or partial(torch.optim.SGD, lr=0.1)
        self.losses: list[float] = []

    def logits(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.logits(batch[0]), batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return self.make_optimizer([p for p in self.parameters() if p.requires_grad])


def plain_net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))


class CallsItself(Task):
    """``training_step`` calls ``self(x)``."""

    def __init__(self, net: nn.Module | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.net = net or plain_net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def logits(self, x: Tensor) -> Tensor:
        return self(x)


class CallsItsNet(Task):
    """``training_step`` calls ``self.net(x)``."""

    def __init__(self, net: nn.Module | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.net = net or plain_net()

    def logits(self, x: Tensor) -> Tensor:
        return self.net(x)


class EncoderAndHead(Task):
    """``training_step`` calls two children, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh())
        self.head = nn.Linear(8, CLASSES)

    def logits(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


class Delicate(nn.Module):
    """All that a careless observer disturbs: noise, dropout, BatchNorm in training, a frozen submodule in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.norm, self.drop = nn.Linear(FEATURES, 16), nn.BatchNorm1d(16), nn.Dropout(0.2)
        self.frozen = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(0.5)).requires_grad_(False)
        self.frozen.eval()
        self.outputs = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.01 * torch.randn_like(x) if self.training else x
        hidden = self.drop(F.relu(self.norm(self.inputs(x))))
        return self.outputs(F.dropout(hidden + self.frozen(hidden), 0.1, self.training))


class TwoOptimizers(CallsItself):
    """Manual optimization: Muon for the matrices and AdamW for the rest, stepped together."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__(net)
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.losses.append(loss.item())
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self) -> list[Optimizer]:
        trained = [p for p in self.parameters() if p.requires_grad]
        return [
            torch.optim.Muon([p for p in trained if p.dim() == 2], lr=0.02),
            torch.optim.AdamW([p for p in trained if p.dim() != 2], lr=0.01),
        ]


def data(batches: int = 20, size: int = 8, *, same: bool = False) -> DataLoader[Any]:
    """``batches`` batches of random samples, or of always the same ones."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batches * size, FEATURES, generator=generator)
    y = torch.randint(CLASSES, (batches * size,), generator=generator)
    if same:
        x, y = x[:size].repeat(batches, 1), y[:size].repeat(batches)
    return DataLoader(TensorDataset(x, y), batch_size=size)


def trainer(*callbacks: pl.Callback, **arguments: Any) -> pl.Trainer:
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**quiet, **arguments})


class Keep(redline.Sink):
    """Keeps every snapshot."""

    def __init__(self, every: int = 1) -> None:
        super().__init__(every)
        self.snapshots: list[redline.Snapshot] = []

    def emit(self, snapshot: redline.Snapshot) -> None:
        self.snapshots.append(snapshot)

    def values(self, metric: str, **labels: str) -> list[float]:
        return [snapshot.value(metric, **labels) for snapshot in self.snapshots]


def measuring_r(**arguments: Any) -> tuple[RedlineCallback, Keep]:
    """A callback that measures r and health at every step, and what it showed."""
    keep = Keep()
    monitors = [redline.GhostRadius(every=1, max_samples=None), redline.StepHealth()]
    return RedlineCallback(monitors=monitors, sinks=[keep], **arguments), keep


# Observing changes nothing -------------------------------------------------------------------------------------------


class Record(pl.Callback):
    """Everything there is to know of a fit, after every batch, in bytes."""

    def __init__(self) -> None:
        self.batches: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        named = list(pl_module.named_parameters())
        self.batches.append(
            {
                "parameters": {name: _bytes(parameter) for name, parameter in named},
                "buffers": {name: _bytes(buffer) for name, buffer in pl_module.named_buffers()},
                "gradients": {name: None if p.grad is None else _bytes(p.grad) for name, p in named},
                "requires_grad": [parameter.requires_grad for _, parameter in named],
                "optimizers": [_plain(optimizer.state_dict()) for optimizer in trainer.optimizers],
                "logged": _plain({**trainer.callback_metrics}),
                "modes": [module.training for module in pl_module.modules()],
                "random": [
                    _bytes(torch.get_rng_state()),
                    random.getstate(),
                    np.random.get_state()[1].tobytes(),  # noqa: NPY002 the run's own stream
                ],
                "global_step": trainer.global_step,
            }
        )


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _bytes(value)
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


class WithValidation(CallsItself):
    """A delicate net whose fit validates every 25 batches and skips batch 7."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx == 7 else loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


def fit_recorded(
    task: Callable[[nn.Module], pl.LightningModule], arguments: dict[str, Any], *callbacks: pl.Callback
) -> list[dict[str, Any]]:
    record = Record()
    seed(3)
    module = task(Delicate())
    loader = data(100)
    trainer(*callbacks, record, max_epochs=1, num_sanity_val_steps=1, **arguments).fit(
        module, loader, data(2) if isinstance(module, WithValidation) else None
    )
    return record.batches


def by(optimizer: type[Optimizer], **settings: Any) -> Callable[[nn.Module], pl.LightningModule]:
    return lambda net: CallsItself(net, optimizer=lambda parameters: optimizer(parameters, **settings))


ADAMW = by(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
FITS: dict[str, tuple[Callable[[nn.Module], pl.LightningModule], dict[str, Any]]] = {
    "momentum": (by(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01), {}),
    "adam": (by(torch.optim.Adam, lr=0.01), {}),
    "adamw foreach": (by(torch.optim.AdamW, lr=0.01, weight_decay=0.1, foreach=True), {}),
    "adamw fused": (by(torch.optim.AdamW, lr=0.01, weight_decay=0.1, fused=True), {}),
    "manual muon and adamw": (TwoOptimizers, {}),
    "bf16-mixed": (ADAMW, {"precision": "bf16-mixed"}),
    "accumulation": (ADAMW, {"accumulate_grad_batches": 4}),
    "clipping": (ADAMW, {"gradient_clip_val": 0.1}),
    "validation and a skipped batch": (lambda net: WithValidation(net), {"val_check_interval": 25}),
}


@pytest.mark.parametrize("name", FITS)
def test_a_watched_fit_is_bit_identical_to_one_that_is_not(name: str):
    task, arguments = FITS[name]
    keep = Keep()
    callback = RedlineCallback(
        monitors=[
            redline.WeightSpectrum(every=7),
            redline.UpdateSpectrum(every=5),
            redline.GhostRadius(every=2),
            redline.StepHealth(),
        ],
        sinks=[redline.ConsoleReport(every=10), redline.PrometheusExporter(port=0, every=3), keep],
    )
    watched = fit_recorded(task, arguments, callback)
    alone = fit_recorded(task, arguments)

    assert len(watched) == len(alone) == 100
    for batch, (one, other) in enumerate(zip(watched, alone, strict=True)):
        for what in other:
            assert one[what] == other[what], f"{what} differ after batch {batch}"

    # ... and it was really watched.
    assert callback.session is not None
    assert callback.session.notes == ()
    steps = 25 if name == "accumulation" else 100
    assert [snapshot.step for snapshot in keep.snapshots] == list(range(steps))
    latest = callback.session.latest
    assert latest.value("redline_measurements_total", monitor="GhostRadius") == math.ceil(steps / 2)
    assert set(latest.layers("redline_weight_spectral_norm")) == {
        "net.inputs.weight",
        "net.frozen.0.weight",
        "net.outputs.weight",
    }
    assert latest.value(R) > 0


class LogsInForward(CallsItself):
    """Logs norms of activations from within ``forward``."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        self.log("inputs", x.norm(), on_step=True, on_epoch=True)
        self.log_dict({"logits": logits.norm()}, on_step=True, on_epoch=True)
        return logits


def test_what_forward_logs_is_not_changed_by_calling_it_again():
    def fit(*callbacks: pl.Callback) -> dict[str, float]:
        seed(0)
        one = trainer(*callbacks, max_epochs=1)
        one.fit(LogsInForward(), data(5))
        return {name: float(value) for name, value in one.callback_metrics.items()}

    assert fit(RedlineCallback(monitors=[redline.GhostRadius(every=1, max_samples=3)])) == fit()


class MetersInForward(CallsItself):
    """Keeps a metric of torchmetrics, updated from within ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.meter = torchmetrics.MeanMetric()

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        self.meter.update(logits.detach().norm())
        return logits


def test_a_metric_kept_in_forward_is_not_changed_by_calling_it_again():
    def fit(*callbacks: pl.Callback) -> float:
        seed(0)
        module = MetersInForward()
        trainer(*callbacks, max_epochs=1).fit(module, data(5))
        return float(module.meter.compute())

    assert fit(RedlineCallback(monitors=[redline.GhostRadius(every=1, max_samples=3)])) == fit()


# What is read --------------------------------------------------------------------------------------------------------


class Proposal(pl.Callback):
    """r of every step, computed anew from the parameters before and after it, in float64."""

    def __init__(self) -> None:
        self.expected: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before = copy.deepcopy(pl_module.net).double()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        ends = []
        for sign in (1, -1):
            net = copy.deepcopy(self.before)
            with torch.no_grad():
                for moved, after in zip(net.parameters(), pl_module.net.parameters(), strict=True):
                    moved += sign * 1e-4 * (after.double() - moved)
                ends.append(net(batch[0].double()))
        tangent = (ends[0] - ends[1]) / 2e-4
        self.expected.append(float((tangent.amax(-1) - tangent.amin(-1)).max()) / math.pi)


@pytest.mark.parametrize("arguments", [{}, {"module": "net"}])
@pytest.mark.parametrize("task", [CallsItself, CallsItsNet])
def test_r_is_measured_however_the_net_is_called(task: type[Task], arguments: dict[str, Any]):
    callback, keep = measuring_r(**arguments)
    proposal = Proposal()
    trainer(callback, proposal, max_epochs=1).fit(task(), data(8))
    assert keep.values(R) == pytest.approx(proposal.expected, rel=1e-3)
    assert len(proposal.expected) == 8


def test_r_in_manual_optimization_is_of_both_optimizers_together():
    callback, keep = measuring_r()
    proposal = Proposal()
    module = TwoOptimizers()
    one = trainer(callback, proposal, max_epochs=1)
    one.fit(module, data(8))
    assert keep.values(R) == pytest.approx(proposal.expected, rel=1e-3)
    assert one.global_step == 16  # Lightning counts each optimizer's step
    assert callback.session is not None
    assert callback.session.latest.value("redline_steps_total") == 8
    assert keep.values("redline_loss") == pytest.approx(module.losses)
    assert keep.values("redline_learning_rate", optimizer="Muon", group="0") == [0.02] * 8
    assert keep.values("redline_learning_rate", optimizer="AdamW", group="0") == [0.01] * 8


def test_an_overhead_budget_reaches_the_session():
    callback, _ = measuring_r(overhead_budget=0.02)
    trainer(callback, max_epochs=1).fit(CallsItself(), data(2))
    assert callback.session.report().overhead_budget == 0.02
    assert typing.get_type_hints(RedlineCallback.__init__)["overhead_budget"] == float | None


def test_the_loss_is_that_of_each_step():
    callback, keep = measuring_r()
    module = CallsItself()
    trainer(callback, max_epochs=1).fit(module, data(10))
    assert keep.values("redline_loss") == pytest.approx(module.losses)


def test_the_loss_is_not_divided_by_gradient_accumulation():
    callback, keep = measuring_r()
    module = CallsItself()
    trainer(callback, max_epochs=1, accumulate_grad_batches=4).fit(module, data(8, same=True))
    assert keep.values("redline_loss") == pytest.approx([module.losses[0], module.losses[4]])
    assert module.losses[0] != pytest.approx(module.losses[4])


def test_the_loss_of_an_accumulated_step_is_of_its_own_batches():
    callback, keep = measuring_r()
    module = CallsItself()
    trainer(callback, max_epochs=1, accumulate_grad_batches=4).fit(module, data(20))
    for step, loss in enumerate(keep.values("redline_loss")):
        own = module.losses[4 * step : 4 * step + 4]
        assert min(own) - 1e-6 <= loss <= max(own) + 1e-6
    assert len(keep.snapshots) == 5


def half_precision(scale: float) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=scale))


def test_loss_and_gradients_are_read_without_the_loss_scale():
    def fit(**arguments: Any) -> Keep:
        seed(0)
        callback, keep = measuring_r()
        trainer(callback, max_epochs=1, **arguments).fit(CallsItself(), data(5))
        return keep

    scaled, plain = fit(plugins=[half_precision(1024.0)]), fit()
    for metric in ("redline_loss", "redline_gradient_norm", R):
        assert scaled.values(metric) == pytest.approx(plain.values(metric), rel=0.02)


def test_a_step_that_loss_scaling_skips_is_no_step():
    callback, keep = measuring_r()
    module = CallsItself()
    one = trainer(callback, max_epochs=1, plugins=[half_precision(2.0**40)])
    one.fit(module, data(1))
    assert one.global_step == 1  # Lightning counts it all the same
    assert keep.snapshots == []
    assert callback.session is not None
    assert callback.session.latest.value("redline_steps_total") == 0


class Norms(pl.Callback):
    """The norm of the gradients before clipping, of every step."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
        self.norms.append(float(torch.nn.utils.get_total_norm(gradients)))


def test_the_gradient_norm_is_that_before_the_step():
    callback, keep = measuring_r()
    norms = Norms()
    trainer(callback, norms, max_epochs=1).fit(CallsItself(), data(6))
    assert keep.values("redline_gradient_norm") == pytest.approx(norms.norms)


def test_the_gradient_norm_is_read_after_clipping():
    callback, keep = measuring_r()
    norms = Norms()
    trainer(callback, norms, max_epochs=1, gradient_clip_val=0.01).fit(CallsItself(), data(6))
    assert min(norms.norms) > 0.02
    assert keep.values("redline_gradient_norm") == pytest.approx([0.01] * 6, rel=1e-3)


class TakesTurns(TwoOptimizers):
    """Steps Muon on even batches and AdamW on odd ones."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        self.optimizers()[batch_idx % 2].step()


def test_a_step_that_one_of_two_optimizers_sits_out_is_a_step_all_the_same():
    callback, keep = measuring_r()
    proposal = Proposal()
    trainer(callback, proposal, max_epochs=1).fit(TakesTurns(), data(6))
    assert [snapshot.step for snapshot in keep.snapshots] == list(range(6))
    assert keep.values(R) == pytest.approx(proposal.expected, rel=1e-3)


class Scheduled(CallsItself):
    """Halves its rate after every step."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.4, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_the_learning_rate_is_the_one_that_the_step_was_taken_with():
    callback, keep = measuring_r()
    trainer(callback, max_epochs=1).fit(Scheduled(), data(4))
    assert keep.values("redline_learning_rate", optimizer="SGD", group="0") == pytest.approx([0.4, 0.2, 0.1, 0.05])
    assert keep.values("redline_weight_decay", optimizer="SGD", group="0") == pytest.approx([0.01] * 4)


# Whose forward gives the logits --------------------------------------------------------------------------------------


def test_two_children_that_are_called_need_a_choice():
    callback, _ = measuring_r()
    with pytest.raises(redline.ConfigurationError, match=r"encoder, head.*pass module=, such as module='head'"):
        trainer(callback, max_epochs=1).fit(EncoderAndHead(), data(2))


def test_one_of_two_children_can_be_chosen():
    callback, keep = measuring_r(module="head")
    trainer(callback, max_epochs=1).fit(EncoderAndHead(), data(2))
    assert min(keep.values(R)) > 0


def test_an_unknown_module_is_refused_with_candidates():
    callback, _ = measuring_r(module="nett")
    with pytest.raises(redline.ConfigurationError, match=r"module='nett'.*of CallsItself, such as 'net', 'net.0'"):
        trainer(callback, max_epochs=1).fit(CallsItself(), data(2))


class GivesMore(CallsItself):
    """``forward`` gives its logits among other things."""

    def forward(self, x: Tensor) -> tuple[Tensor, str, Tensor]:
        return x, "logits follow", self.net(x)

    def logits(self, x: Tensor) -> Tensor:
        return self(x)[2]


def test_logits_are_taken_out_of_a_tuple():
    callback, keep = measuring_r(logits=lambda output: output[2])
    proposal = Proposal()
    trainer(callback, proposal, max_epochs=1).fit(GivesMore(), data(4))
    assert keep.values(R) == pytest.approx(proposal.expected, rel=1e-3)


def test_a_tuple_without_a_choice_is_refused():
    callback, _ = measuring_r()
    with pytest.raises(redline.ConfigurationError, match=r"got a tuple as logits.*`logits="):
        trainer(callback, max_epochs=1).fit(GivesMore(), data(2))


# Kinds of fit --------------------------------------------------------------------------------------------------------


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


# The trainer's own loggers -------------------------------------------------------------------------------------------


def test_readings_reach_the_trainers_loggers(tmp_path: Path):
    module = CallsItself()
    callback = RedlineCallback()
    trainer(callback, max_epochs=1, logger=CSVLogger(tmp_path), log_every_n_steps=4).fit(module, data(10))
    (file,) = tmp_path.rglob("metrics.csv")
    with file.open() as lines:
        rows = [row for row in csv.DictReader(lines) if row.get("redline_loss")]
    assert [int(row["step"]) for row in rows] == [0, 4, 8]
    assert [float(row["redline_loss"]) for row in rows] == pytest.approx([module.losses[step] for step in (0, 4, 8)])
    first = rows[0]
    for metric in ("redline_weight_spectral_norm", "redline_update_spectral_norm", "redline_update_to_weight_ratio"):
        assert float(first[f"{metric}/net.0.weight"]) > 0
        assert float(first[f"{metric}/net.2.weight"]) > 0
    for name in (R, "redline_ghost_radius", "redline_gradient_norm", "redline_update_norm"):
        assert float(first[name]) > 0
    assert float(first["redline_learning_rate/SGD/0"]) == pytest.approx(0.1)
    assert [float(row["redline_steps_total"]) for row in rows] == [1, 5, 9]
    assert float(rows[-1]["redline_nonfinite_total/loss"]) == 0


def test_what_was_not_measured_is_not_logged(tmp_path: Path):
    callback = RedlineCallback(monitors=[redline.StepHealth()])
    trainer(callback, max_epochs=1, logger=CSVLogger(tmp_path), log_every_n_steps=1).fit(CallsItself(), data(2))
    (file,) = tmp_path.rglob("metrics.csv")
    header = file.read_text().splitlines()[0].split(",")
    assert "redline_loss" in header
    assert not [name for name in header if name.startswith((R, "redline_weight_spectral", "redline_ghost"))]


# Checkpoints ---------------------------------------------------------------------------------------------------------


class ScaleOnce(redline.Controller):
    """Halves step 2, and remembers that it did."""

    def __init__(self) -> None:
        self.done = 0

    def inspect(self, step: redline.Step) -> list[redline.Scale]:
        if step.index != 2:
            return []
        self.done += 1
        return [redline.Scale(0.5, "to see it", saw={"tau": 1.0})]

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state: Any) -> None:
        self.done = state["done"]


def every_third(keep: Keep, controller: ScaleOnce | None = None) -> RedlineCallback:
    monitors = [
        redline.GhostRadius(every=3),
        redline.WeightSpectrum(every=4),
        redline.UpdateSpectrum(every=4),
        redline.StepHealth(),
    ]
    return RedlineCallback(monitors=monitors, controllers=[controller or ScaleOnce()], sinks=[keep], run="resumed")


@pytest.fixture
def halfway(tmp_path: Path) -> Path:
    """The checkpoint after 7 of 12 steps, one of them scaled."""
    seed(0)
    saving = ModelCheckpoint(tmp_path, filename="halfway", every_n_train_steps=7, save_top_k=-1)
    trainer(every_third(Keep()), saving, max_epochs=1, enable_checkpointing=True).fit(
        CallsItself(), data(12, same=True)
    )
    return tmp_path / "halfway.ckpt"


def test_a_resumed_fit_goes_on_counting(halfway: Path):
    seed(0)
    through = every_third(through_keep := Keep())
    trainer(through, max_epochs=1).fit(CallsItself(), data(12, same=True))

    controller = ScaleOnce()
    resumed = every_third(resumed_keep := Keep(), controller)
    trainer(resumed, max_epochs=1).fit(CallsItself(), data(12, same=True), ckpt_path=halfway)

    assert [snapshot.step for snapshot in resumed_keep.snapshots] == [7, 8, 9, 10, 11]
    assert controller.done == 1
    assert through.session is not None
    assert resumed.session is not None
    for metric in ("redline_steps_total", "redline_measurements_total", "redline_interventions_total"):
        assert resumed.session.latest.series(metric) == through.session.latest.series(metric)
    assert resumed.session.latest.value("redline_steps_total") == 12
    assert resumed.session.interventions == through.session.interventions
    assert [one.step for one in resumed.session.interventions] == [2]
    # r is due at 0, 3, 6, 9: the resumed run measures at 9 what the other one does.
    assert resumed_keep.snapshots[-1].value(R) == pytest.approx(through_keep.snapshots[-1].value(R), rel=1e-5)
    ours, theirs = resumed.session.report().step_sizes, through.session.report().step_sizes
    assert ours is not None
    assert theirs is not None
    assert ours.measured == theirs.measured == 4
    assert ours.median == pytest.approx(theirs.median, rel=1e-5)
    assert resumed.session.report().first_loss == pytest.approx(through.session.report().first_loss)


def test_a_checkpoint_is_plain_data(halfway: Path):
    saved = torch.load(halfway, weights_only=True)
    (state,) = [value for key, value in saved["callbacks"].items() if key.startswith("RedlineCallback")]
    assert state["control"]["controllers"] == {"ScaleOnce": {"done": 1}}


@pytest.mark.parametrize("weights_only", [None, True, False])
def test_a_fit_resumes_with_any_way_of_loading(halfway: Path, weights_only: bool | None):
    callback = every_third(keep := Keep())
    trainer(callback, max_epochs=1).fit(
        CallsItself(), data(12, same=True), ckpt_path=halfway, weights_only=weights_only
    )
    assert [snapshot.step for snapshot in keep.snapshots] == [7, 8, 9, 10, 11]


def test_a_checkpoint_resumes_with_other_monitors_and_no_controller(halfway: Path):
    callback = RedlineCallback(monitors=[redline.StepHealth()], sinks=[keep := Keep()], run="resumed")
    trainer(callback, max_epochs=1).fit(CallsItself(), data(12, same=True), ckpt_path=halfway)
    assert [snapshot.step for snapshot in keep.snapshots] == [7, 8, 9, 10, 11]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
def test_a_checkpoint_resumes_without_redline(halfway: Path):
    module = CallsItself()
    trainer(max_epochs=1).fit(module, data(12, same=True), ckpt_path=halfway)
    assert len(module.losses) == 5


def test_a_checkpoint_of_a_run_without_redline_is_fine(tmp_path: Path):
    saving = ModelCheckpoint(tmp_path, filename="plain", every_n_train_steps=7, save_top_k=-1)
    trainer(saving, max_epochs=1, enable_checkpointing=True).fit(CallsItself(), data(12, same=True))
    callback = every_third(keep := Keep())
    trainer(callback, max_epochs=1).fit(CallsItself(), data(12, same=True), ckpt_path=tmp_path / "plain.ckpt")
    assert len(keep.snapshots) == 5


class Validates(CallsItself):
    """Has a validation loop."""

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


def test_a_checkpoint_that_was_only_validated_is_not_where_the_next_fit_goes_on(halfway: Path):
    callback = every_third(keep := Keep())
    trainer(callback).validate(Validates(), data(2), ckpt_path=halfway, verbose=False)
    trainer(callback, max_epochs=1).fit(CallsItself(), data(3))
    assert [snapshot.step for snapshot in keep.snapshots] == [0, 1, 2]


# Nothing stays behind ------------------------------------------------------------------------------------------------


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
