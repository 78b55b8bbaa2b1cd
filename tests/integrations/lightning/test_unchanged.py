"""A watched fit is bit for bit the one that is not watched."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from lightning_runs import CLASSES, FEATURES, QUIET, CallsItself, R, TwoOptimizers, data, seed, trainer
from sinks import Keep
from torch import Tensor, nn
from torch.optim import Optimizer

import redline
from redline.integrations.lightning import RedlineCallback

pytestmark = QUIET


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
