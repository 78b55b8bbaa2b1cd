"""Attaching Redline to a plain PyTorch loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from redline.capture import unwrapped
from redline.controller import Controller
from redline.errors import ConfigurationError
from redline.monitor import Monitor
from redline.monitors import default_monitors
from redline.optimizers import raw_optimizers
from redline.readings import RunInfo
from redline.session import Session
from redline.sharding import is_sharded
from redline.sink import Sink


def attach(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    monitors: Sequence[Monitor] | None = None,
    controllers: Sequence[Controller] = (),
    sinks: Sequence[Sink] = (),
    schedulers: Sequence[Any] = (),
    logits: Callable[[Any], Any] | None = None,
    batch_dim: int = 0,
    module: str | None = None,
    run: str | None = None,
    overhead_budget: float | None = None,
) -> Session:
    """Attach Redline to a model in training.

    Args:
        model: the model, before or after it is wrapped by DistributedDataParallel or ``torch.compile``.
        optimizer: that trains it; several make one joint step. Optimizers that take turns are attached separately.
        monitors: what to measure; by default ``redline.monitors.default_monitors()``.
        controllers: what may change a step; none by default.
        sinks: where readings go.
        schedulers: learning-rate schedulers of the run, or anything else with ``state_dict`` and ``load_state_dict``:
            what is to come back with the optimizer when a controller rolls the run back.
        logits: callable ``output -> (..., classes)`` or ``output -> (logits, mask of positions that count)``; by
            default the output, its ``.logits`` or its ``["logits"]``.
        batch_dim: dimension of the inputs that counts the samples.
        module: qualified name of the submodule whose forward gives the logits; by default the model itself, or its
            only child that is called in training.
        run: a name for this run; by default the model's class and the time.
        overhead_budget: the share of training time that monitoring may take, such as 0.02. What is due while it has
            taken more is put off: it happens once, at the first step that can afford it. Controllers are never put off.
            By default there is no limit, and schedules are kept as given.

    Returns:
        A session, to be used as a context manager or closed by ``session.close()``.

    Raises:
        ConfigurationError: the arguments cannot work together; says what was got, what was expected and what to do.
    """
    return attach_as(
        model,
        optimizer,
        monitors=monitors,
        controllers=controllers,
        sinks=sinks,
        schedulers=schedulers,
        logits=logits,
        batch_dim=batch_dim,
        module=module,
        run=run,
        overhead_budget=overhead_budget,
    )


def attach_as(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    monitors: Sequence[Monitor] | None = None,
    batch_dim: int = 0,
    run: str | None = None,
    precision: str | None = None,
    strategy: str | None = None,
    around_replay: Callable[[], AbstractContextManager[Any]] = nullcontext,
    **arguments: Any,
) -> Session:
    """``attach``, for a trainer that knows more of the run: ``precision`` and ``strategy`` as it names them."""
    refuse_unknown(arguments)
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"got a {type(model).__name__} as model; expected a torch.nn.Module.")
    if batch_dim < 0:
        raise ConfigurationError(f"got batch_dim={batch_dim}; expected 0 or more, counted from the front.")
    return Session(
        model,
        raw_optimizers(optimizer),
        monitors=default_monitors() if monitors is None else monitors,
        batch_dim=batch_dim,
        run=describe_run(model, run, precision=precision, strategy=strategy),
        around_replay=around_replay,
        **arguments,
    )


def refuse_unknown(arguments: Mapping[str, Any]) -> None:
    """Refuse what ``attach`` does not take.

    Raises:
        ConfigurationError: an argument has another name than any of ``attach``'s.
    """
    known = [name for name, one in signature(attach).parameters.items() if one.kind is one.KEYWORD_ONLY]
    if unknown := [name for name in arguments if name not in known]:
        raise ConfigurationError(f"got the argument {unknown[0]!r}; expected one of {', '.join(known)}.")


def describe_run(
    model: nn.Module, run: str | None = None, *, precision: str | None = None, strategy: str | None = None
) -> RunInfo:
    """The labels of ``redline_run_info``; by default the first parameter's precision, and the strategy as wrapped."""
    strategy, model = strategy or _strategy(model), unwrapped(model)
    dtype = next((str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()), "none")
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return RunInfo(
        run=run or f"{type(model).__name__}-{time.strftime('%Y%m%d-%H%M%S')}",
        version=version("redline"),
        precision=precision or dtype,
        strategy=strategy,
        world_size=torch.distributed.get_world_size() if distributed else 1,
    )


def _strategy(model: nn.Module) -> str:
    """How the model is spread over devices, for the label: "single", "dp", "ddp", "fsdp" or "tensor_parallel"."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return "ddp"
    if isinstance(model, nn.DataParallel):
        return "dp"
    if not any(map(is_sharded, model.parameters())):
        return "single"
    return "fsdp" if any(hasattr(module, "unshard") for module in model.modules()) else "tensor_parallel"
