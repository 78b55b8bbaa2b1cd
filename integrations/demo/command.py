"""The demo itself: a transformer on digits, then a byte-level language model, watched by Redline."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import rich
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from redline.integrations.console import ConsoleReport
from redline.integrations.demo.data import byte_batch, digits, library_bytes
from redline.integrations.demo.models import ByteLM, DigitsTransformer
from redline.integrations.lightning import RedlineCallback
from redline.integrations.prometheus import PrometheusExporter
from redline.monitors import GhostRadius, StepHealth, UpdateSpectrum, WeightSpectrum
from redline.report import StabilityReport


def run_demo(*, port: int = 9108, short: bool = False, picture: Path | None = None) -> None:
    """Train both models, show their readings as they come, and serve them.

    Args:
        port: of the metrics, on this machine only; 0 picks a free one.
        short: a few steps of each, for a quick look.
        picture: write the last stability report to this SVG file.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # this process is the demo's own
    warnings.filterwarnings("ignore", module="lightning")
    train_x, train_y, _, _ = digits()
    _fit(
        "digits transformer",
        DigitsTransformer(),
        DataLoader(TensorDataset(train_x, train_y), batch_size=128, shuffle=True, drop_last=True),
        learning_rate=3e-3,
        steps=40 if short else 300,
        port=port,
    )
    report = _fit(
        "byte-level language model",
        ByteLM(),
        DataLoader(_Windows(batch=64, length=64), batch_size=None),
        learning_rate=3e-3,
        steps=20 if short else 300,
        port=port,
    )
    if picture:
        _draw(report, picture)


def _fit(
    title: str,
    model: nn.Module,
    data: DataLoader[Any],
    *,
    learning_rate: float,
    steps: int,
    port: int,
) -> StabilityReport:
    size = sum(parameter.numel() for parameter in model.parameters())
    rich.get_console().rule(f"[bold]{title}[/]: {size:,} parameters, {steps} steps")
    exporter = PrometheusExporter(port=port)
    redline = RedlineCallback(
        monitors=[WeightSpectrum(), UpdateSpectrum(), GhostRadius(every=10), StepHealth()],  # r often: a run this short
        sinks=[ConsoleReport(every=max(steps // 3, 1)), exporter],
        run=title.replace(" ", "-"),
    )
    pl.seed_everything(0, verbose=False)
    pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=[redline, _SayWhere(exporter), RichProgressBar()],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    ).fit(_Classifier(model, learning_rate, steps), data)
    assert redline.session is not None
    return redline.session.report()


class _Classifier(pl.LightningModule):
    """Cross-entropy of ``net``'s logits, AdamW, linear warm-up and cosine decay."""

    def __init__(self, net: nn.Module, learning_rate: float, steps: int) -> None:
        super().__init__()
        self.net, self.learning_rate, self.steps = net, learning_rate, steps

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, labels = batch
        loss = F.cross_entropy(self.net(inputs).flatten(0, -2), labels.flatten())
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.learning_rate, total_steps=self.steps + 1, pct_start=0.1, cycle_momentum=False
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class _Windows(IterableDataset[tuple[Tensor, Tensor]]):
    """Endless random windows of the standard library's sources."""

    def __init__(self, batch: int, length: int) -> None:
        self.batch, self.length, self.text = batch, length, library_bytes()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        while True:
            yield byte_batch(self.text, self.batch, self.length, generator)


class _SayWhere(pl.Callback):
    """Says where the metrics are served, once they are."""

    def __init__(self, exporter: PrometheusExporter) -> None:
        self._exporter = exporter

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._exporter.url:
            rich.print(f"Metrics are served while this runs: [link]curl {self._exporter.url}[/]")


def _draw(report: StabilityReport, picture: Path) -> None:
    console = Console(record=True, width=110, file=io.StringIO())
    console.print(report)
    console.save_svg(str(picture), title="redline")
