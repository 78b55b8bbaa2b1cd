"""Redline in loops that Hugging Face's accelerate drives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.optim import Optimizer

from redline.capture import unwrapped
from redline.integrations.attach import attach_as
from redline.integrations.trainer_logs import TrainerLogs
from redline.session import Session
from redline.sink import Sink

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def attach(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    sinks: Sequence[Sink] = (),
    log_every: int = 50,
    **arguments: Any,
) -> Session:
    """Attach Redline to what ``accelerator.prepare`` returned; readings go to the accelerator's trackers too.

    ``accelerator.register_for_checkpointing(session)`` has the session's state saved and loaded with the rest.

    Args:
        accelerator: that prepared model and optimizer.
        model: that ``accelerator.prepare`` returned.
        optimizer: that ``accelerator.prepare`` returned; several make one joint step.
        sinks: where readings go, beside the trackers.
        log_every: optimizer steps between logs; 0 logs nothing.
        arguments: the others of ``redline.attach``, which says what they mean.

    Returns:
        A session, to be used as a context manager or closed by ``session.close()``.

    Raises:
        ConfigurationError: the arguments cannot work together, or an engine takes the steps.
    """

    def log(values: Mapping[str, float], step: int) -> None:
        accelerator.log(dict(values), step=step)  # to the trackers there are by then

    return attach_as(
        model,
        optimizer,
        sinks=[*sinks, TrainerLogs(log, log_every)] if log_every else sinks,
        precision=precision_label(accelerator.mixed_precision),
        strategy=strategy_label(accelerator.distributed_type),
        around_replay=partial(own_forward, model, accelerator.mixed_precision),
        **arguments,
    )


def precision_label(mixed_precision: str | None) -> str | None:
    """How the label ``precision`` names accelerate's mixed precision; None where the parameters' dtype says it."""
    return None if mixed_precision in (None, "no") else f"{mixed_precision}-mixed"


def strategy_label(distributed_type: DistributedType) -> str:
    """How the label ``strategy`` names what accelerate distributes a run by."""
    return "single" if distributed_type == DistributedType.NO else str(distributed_type.value).lower()


@contextmanager
def own_forward(model: nn.Module, mixed_precision: str | None) -> Iterator[torch.dtype | None]:
    """While it is open the model's forward is its own, without the autocast that accelerate puts into it.

    In there autocast could not be switched off, and a finite difference in half precision measures rounding.

    Args:
        model: prepared by accelerate.
        mixed_precision: accelerate's name for it.

    Yields:
        The dtype of the autocast that was taken out, or None if there was none.
    """
    attributes = vars(unwrapped(model))
    patched = attributes.get("forward")
    if "_original_forward" not in attributes or patched is None:
        yield None
        return
    attributes["forward"] = attributes["_original_forward"]
    try:
        yield _AUTOCAST.get(mixed_precision or "no")
    finally:
        attributes["forward"] = patched
