"""What the tests of PrometheusExporter share: a fit to look in on, and snapshots made by hand."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from scraping import RUN, TIMEOUT
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import redline
from redline.integrations.lightning import RedlineCallback
from redline.readings import Series, Snapshot

PER_LAYER = (
    "redline_weight_spectral_norm",
    "redline_weight_spectral_residual",
    "redline_weight_stable_rank",
    "redline_weight_spectral_condition",
    "redline_update_spectral_norm",
    "redline_update_spectral_condition",
    "redline_update_to_weight_ratio",
)
OF_THE_STEP = (
    "redline_update_norm",
    "redline_ghost_radius",
    "redline_normalized_step_size",
    "redline_committed_step_size",
    "redline_step_scale",
    "redline_loss",
    "redline_gradient_norm",
    "redline_overhead_ratio",
    "redline_last_step_timestamp_seconds",
)


def refused(port: int, address: str = "127.0.0.1") -> bool:
    try:
        socket.create_connection((address, port), timeout=TIMEOUT).close()
    except ConnectionRefusedError:
        return True
    return False


class Classifier(pl.LightningModule):
    """Two layers, called as ``self.net``."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)


class At(pl.Callback):
    """Calls somebody at a moment of a fit: "start" for before the first step, or a number of steps taken."""

    def __init__(self, moments: Mapping[str | int, Callable[[], None]]) -> None:
        self.moments = moments

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 0:
            self.moments.get("start", lambda: None)()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.moments.get(trainer.global_step, lambda: None)()


def fit(callback: RedlineCallback, moments: Mapping[str | int, Callable[[], None]], steps: int = 6) -> Classifier:
    """Fit with something called at moments, after the callback."""
    module = Classifier()
    x, y = torch.randn(8 * steps, 6), torch.randint(3, (8 * steps,))
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback, At(moments)],
    )
    trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=8))
    return module


def every_step() -> list[redline.Monitor]:
    return [
        redline.WeightSpectrum(every=1),
        redline.UpdateSpectrum(every=1),
        redline.GhostRadius(every=1),
        redline.StepHealth(),
    ]


def snapshot_of(value: float, layers: int = 200) -> Snapshot:
    """All gauges at one value."""
    values = {Series(name, (f"layer.{k}",)): value for name in PER_LAYER for k in range(layers)}
    values |= {Series(name): value for name in OF_THE_STEP}
    return Snapshot(int(value), 0.0, RUN, MappingProxyType(values), MappingProxyType({}))


def report_nothing(exporter: redline.PrometheusExporter) -> None:
    """Close an exporter that no session drives."""
    model = nn.Linear(2, 2)
    session = redline.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), monitors=[])
    exporter.close(session.report())
    session.close()
