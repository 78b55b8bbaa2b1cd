"""Redline in Hugging Face's Trainer: one callback."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from redline import metrics
from redline.controller import Controller
from redline.errors import ConfigurationError, RedlineWarning
from redline.integrations.accelerate import own_forward, precision_label, strategy_label
from redline.integrations.attach import attach_as
from redline.integrations.huggingface_calls import LabelledLogits, StepLoss
from redline.integrations.trainer_logs import logged_values
from redline.monitor import Monitor
from redline.monitors import default_monitors
from redline.overhead_budget import checked_share
from redline.session import Session
from redline.sink import Sink

STATE_FILE = "redline_state.pt"  # in each checkpoint's folder
_TRAINERS_OWN = {metrics.LOSS.name, metrics.GRADIENT_NORM.name, metrics.LAST_STEP_TIMESTAMP.name}


class RedlineTrainerCallback(TrainerCallback):
    """Attaches Redline to a ``Trainer``'s training, from its first step to its last.

    What it measures of the whole step goes into the trainer's own logs too. Its state travels in checkpoints, as
    ``redline_state.pt`` beside the trainer's own.

    Attributes:
        session: of the training in progress, or of the last one, closed; None before the first.
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
            sinks: where readings go, beside the trainer's logs.
            module: qualified name of the submodule whose forward gives the logits; by default the model itself.
            logits: callable ``output of that forward -> (..., classes)`` or ``-> (logits, mask of positions that
                count)``; by default the output's ``.logits``, at the positions whose label is not -100.
            batch_dim: dimension of the inputs that counts the samples.
            run: a name for the run; by default that of the training arguments.
            overhead_budget: the share of training time that monitoring may take, such as 0.02; by default no limit.

        Raises:
            ConfigurationError: the budget is no share.
        """
        self._arguments: dict[str, Any] = {
            "monitors": default_monitors() if monitors is None else monitors,
            "controllers": controllers or [],
            "sinks": sinks or [],
            "batch_dim": batch_dim,
            "module": module,
            "overhead_budget": checked_share(overhead_budget),
        }
        self._logits, self._run = logits, run
        self._loss: StepLoss | None = None
        self._handles: list[Any] = []
        self.session: Session | None = None

    def on_train_begin(  # type: ignore[override]
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        lr_scheduler: Any,
        **kwargs: Any,
    ) -> None:
        """Attach: model and optimizer are prepared, and a checkpoint that training goes on from has been loaded."""
        self._close()
        if args.n_gpu > 1:
            raise ConfigurationError(
                f"got one process that trains on {args.n_gpu} GPUs (nn.DataParallel); expected one GPU a process: "
                "batches are split among threads there. Start it with `torchrun`, or show it one GPU by "
                "CUDA_VISIBLE_DEVICES=0."
            )
        logits = self._logits
        if logits is None and self._arguments["module"] is None:
            logits = LabelledLogits(model)
            self._handles.append(logits.handle)
        mixed = "bf16" if args.bf16 else "fp16" if args.fp16 else None
        session = self.session = attach_as(
            model,
            optimizer,
            schedulers=[lr_scheduler],
            logits=logits,
            run=self._run or args.run_name,
            precision=precision_label(mixed),
            strategy=strategy_label(args.distributed_state.distributed_type),
            around_replay=partial(own_forward, model, mixed),
            **self._arguments,
        )
        ranks = args.world_size if args.average_tokens_across_devices else 1
        self._loss = StepLoss(model, lambda loss: session.observe(loss=loss), ranks)
        self._handles.append(self._loss.handle)
        if state.global_step:
            self._resume(args, state)

    def on_step_begin(self, *_: Any, **kwargs: Any) -> None:
        """Another step's micro-batches follow."""
        if self._loss is not None:
            self._loss.begin()

    def on_log(  # type: ignore[override]
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Add what was measured of the whole step to what the trainer logs of it."""
        if self.session is None or "loss" not in logs:  # evaluation, and the summary at the end
            return
        values = {
            name: value
            for name, value in logged_values(self.session.latest).items()
            if name in metrics.METRICS and name not in _TRAINERS_OWN
        }
        logs.update(values)  # for the callbacks after this one
        if state.log_history:
            state.log_history[-1].update(values)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the session's state into the checkpoint that was just written."""
        folder = _checkpoint(args, state)
        if self.session is None or args.save_only_model:
            return
        kept = {"global_step": state.global_step, "session": self.session.state_dict()}
        if args.should_save and folder.is_dir():  # a hyperparameter search keeps its checkpoints elsewhere
            torch.save(kept, folder / STATE_FILE)

    def on_train_end(self, *_: Any, **kwargs: Any) -> None:
        """Detach."""
        self._close()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "session": None, "_loss": None, "_handles": []}

    def _resume(self, args: TrainingArguments, state: TrainerState) -> None:
        """Go on from the checkpoint. A callback is not told where it lies, but at which step it was taken."""
        folders = [_checkpoint(args, state)]
        if isinstance(args.resume_from_checkpoint, str):
            folders.insert(0, Path(args.resume_from_checkpoint))
        for folder in folders:
            if (folder / STATE_FILE).is_file():
                kept = torch.load(folder / STATE_FILE, map_location="cpu", weights_only=True)
                if kept["global_step"] == state.global_step and self.session is not None:
                    self.session.load_state_dict(kept["session"])
                    return
        warnings.warn(
            f"Training goes on from step {state.global_step}, but Redline starts afresh: there is no {STATE_FILE} of "
            f"that step in {' or '.join(map(str, folders))}. If the "
            "checkpoint lies elsewhere, name its folder: TrainingArguments(resume_from_checkpoint=...).",
            RedlineWarning,
            stacklevel=2,
        )

    def _close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self.session is not None:
            self.session.close()


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
