"""Redline in Lightning: one callback."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import Tensor

from redline.controller import Controller
from redline.errors import ConfigurationError
from redline.integrations.attach import attach_as
from redline.integrations.trainer_logs import TrainerLogs
from redline.monitor import Monitor
from redline.monitors import default_monitors
from redline.optimizers import refuse_engine
from redline.overhead_budget import checked_share
from redline.session import Session
from redline.sink import Sink


class RedlineCallback(Callback):
    """Attaches Redline to a fit, from its first step to its last; readings go to the trainer's own loggers too.

    Works with automatic and manual optimization, gradient accumulation and several optimizers (one joint step). Its
    state travels in checkpoints.

    Attributes:
        session: of the fit in progress, or of the last one, closed; None before the first.
    """

    def __init__(
        self,
        monitors: list[Monitor] | None = None,
        controllers: list[Controller] | None = None,
        sinks: list[Sink] | None = None,
        module: str | None = None,
        logits: Callable[[Any], Any] | None = None,
        batch_dim: int = 0,
        run: str | None = None,
        overhead_budget: float | None = None,
    ) -> None:
        """Set up what ``redline.attach`` is to be called with.

        Args:
            monitors: what to measure; by default ``redline.default_monitors()``.
            controllers: what may change a step; none by default.
            sinks: where readings go, beside the trainer's loggers.
            module: qualified name of the submodule whose forward gives the logits, such as "net"; by default the
                LightningModule itself if ``training_step`` calls it, or its only child that is called.
            logits: callable ``output of that forward -> (..., classes)``; by default the output or its ``.logits``.
            batch_dim: dimension of the inputs that counts the samples.
            run: a name for the run; also tells several callbacks of one trainer apart in checkpoints.
            overhead_budget: the share of training time that monitoring may take, such as 0.02; by default no limit.

        Raises:
            ConfigurationError: the budget is no share.
        """
        super().__init__()
        self._arguments: dict[str, Any] = {
            "monitors": default_monitors() if monitors is None else monitors,
            "controllers": controllers or [],
            "logits": logits,
            "batch_dim": batch_dim,
            "module": module,
            "overhead_budget": checked_share(overhead_budget),
        }
        self._sinks = sinks or []
        self._run = run
        self._resumed: Mapping[str, Any] | None = None
        self.session: Session | None = None

    @property
    def state_key(self) -> str:
        """Distinct for callbacks that differ in ``run`` or ``module``."""
        return self._generate_state_key(run=self._run, module=self._arguments["module"])

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse strategies that leave nothing to measure, and forget a state loaded for another purpose than this fit.

        Raises:
            ConfigurationError: the strategy is one of these; it says why, and what to use.
        """
        if isinstance(trainer.strategy, DeepSpeedStrategy):
            refuse_engine("DeepSpeed")
        if isinstance(trainer.strategy, FSDPStrategy):
            raise ConfigurationError(
                "got Lightning's FSDPStrategy; expected one that keeps the parameters' shapes: it flattens those of a "
                "unit into one vector, of which no matrix is left to measure. Use ModelParallelStrategy, which shards "
                "each parameter by itself."
            )
        self._resumed = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Attach: models and optimizers are in place."""
        self._close()
        often: int = getattr(trainer, "log_every_n_steps", 0)
        loggers: list[Sink] = []
        if trainer.loggers and often:
            loggers = [TrainerLogs(partial(_log, trainer), often, lambda: trainer.global_step)]
        self.session = attach_as(
            pl_module,
            trainer.optimizers,
            sinks=[*self._sinks, *loggers],
            schedulers=[config.scheduler for config in trainer.lr_scheduler_configs],
            run=self._run,
            precision=str(trainer.precision),
            strategy=type(trainer.strategy).__name__,
            around_replay=partial(_nothing_logged, pl_module),
            **self._arguments,
        )
        if self._resumed is not None:
            self.session.load_state_dict(self._resumed)
            self._resumed = None

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Read the loss, before the division by accumulation and the loss scale that Lightning put on it."""
        if self.session is None:
            return
        if pl_module.automatic_optimization:
            loss = loss * trainer.accumulate_grad_batches
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            loss = loss / scaler.scale(torch.ones_like(loss))
        self.session.observe(loss=loss)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Detach."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Detach: nothing of Redline stays behind a fit that failed."""
        self._close(failed=True)

    def state_dict(self) -> dict[str, Any]:
        """The session's state."""
        return self.session.state_dict() if self.session else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until the session is there."""
        self._resumed = state_dict or None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "session": None}

    def _close(self, *, failed: bool = False) -> None:
        if self.session is not None:
            self.session.close(failed=failed)


@contextmanager
def _nothing_logged(pl_module: pl.LightningModule) -> Iterator[None]:
    """While it is open, ``self.log`` in the module's forward does nothing."""
    vars(pl_module)["log"] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        del vars(pl_module)["log"]


def _log(trainer: pl.Trainer, values: Mapping[str, float], step: int) -> None:
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=step)
