"""Calling a model once more without leaving a trace: no gradient, no dropout, no random number drawn, no mode changed.

The replayed function is deterministic and keeps every module's own mode. Dropout is switched off where it happens (the
functional calls), not in the modules: attention layers and bare ``F.dropout`` calls drop by themselves while in train
mode, and changing modes would change BatchNorm too. Other random draws of a forward (stochastic depth, noise layers)
see the same random numbers at every replay from the same state.
"""

from __future__ import annotations

import inspect
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from redline.numerics.sharded import device_of

_DROPOUTS = {
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
    torch.dropout, torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout, torch.native_dropout,
}  # fmt: skip
_TORCHS = set(vars(nn.Module()))  # the attributes torch itself gives a module: parameters, buffers, hooks, mode
_RECURRENT = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}
_ATTENTION_SIGNATURE = inspect.signature(F.multi_head_attention_forward)


class _NoDropout(TorchFunctionMode):
    """Within it every dropout is the identity, whatever mode its module is in."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.native_dropout:
            return args[0], torch.ones_like(args[0], dtype=torch.bool)
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            kwargs, args = _replace(kwargs, args, "dropout_p", 4, 0.0)
        elif func is F.multi_head_attention_forward:
            bound = _ATTENTION_SIGNATURE.bind(*args, **kwargs)
            bound.arguments["dropout_p"] = 0.0
            args, kwargs = bound.args, dict(bound.kwargs)
        elif func in _RECURRENT:
            # (input, hx, weights, bias, layers, dropout, train, ...), a packed input has batch_sizes before hx and
            # bias one place earlier from the end: either way dropout is the one float.
            args = tuple(0.0 if isinstance(value, float) else value for value in args)
        return func(*args, **kwargs)


def _replace(
    kwargs: dict[str, Any], args: tuple[Any, ...], name: str, position: int, value: Any
) -> tuple[dict[str, Any], tuple[Any, ...]]:
    if len(args) > position:
        return kwargs, (*args[:position], value, *args[position + 1 :])
    return {**kwargs, name: value}, args


@contextmanager
def replaying(model: nn.Module, *, plain_kernels: bool = False) -> Iterator[None]:
    """Everything that must hold while ``model`` is called again, put back as it was on the way out.

    Args:
        model: says on which devices random states have to be kept.
        plain_kernels: also run attention by its math backend and recurrent layers without oneDNN, the kernels that
            forward-mode AD can follow.
    """
    devices = {device for device in map(device_of, model.parameters()) if device.type not in ("cpu", "meta")}
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 the run's own stream, kept
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        # One entry a kind of device; a model on the CPU alone keeps the CPU's state only.
        for kind in {device.type for device in devices} or {"cuda"}:
            indices = [d.index or 0 for d in devices if d.type == kind]
            stack.enter_context(torch.random.fork_rng(devices=indices, device_type=kind))
        if plain_kernels:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(_without_onednn())
        stack.enter_context(_NoDropout())
        stack.enter_context(_without_reentrant_checkpoints())
        stack.enter_context(_attributes_kept(model))
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


@contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """Put back what a forward leaves in plain attributes: counters, caches, running metrics."""
    kept = [
        (
            vars(module),
            {name: (value, _shallow_copy(value)) for name, value in vars(module).items() if name not in _TORCHS},
        )
        for module in model.modules()
    ]
    try:
        yield
    finally:
        for attributes, values in kept:
            for name in [name for name in attributes if name not in values and name not in _TORCHS]:
                del attributes[name]
            for name, (value, before) in values.items():
                attributes[name] = value
                if isinstance(value, Tensor):
                    tensor, version = before
                    if _version(value) != version:  # else writing would break graphs that go through it
                        value.copy_(tensor)
                elif type(value) is list:
                    value[:] = before
                elif type(value) is dict:
                    value.clear()
                    value.update(before)


def _version(tensor: Tensor) -> int:
    """How often the tensor was written to; tensors of inference mode are not counted, nor written to by us."""
    return 0 if tensor.is_inference() else tensor._version


def _shallow_copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone(), _version(value)
    return value.copy() if type(value) in (list, dict) else value


@contextmanager
def _without_onednn() -> Iterator[None]:
    with warnings.catch_warnings():  # torch warns of Intel GPUs that nobody asked for
        warnings.simplefilter("ignore")
        flags = torch.backends.mkldnn.flags(enabled=False)
        flags.__enter__()
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            flags.__exit__(None, None, None)


@contextmanager
def _without_reentrant_checkpoints() -> Iterator[None]:
    """Call what is checkpointed directly: torch's function around it has no forward-mode rule, and drops tangents.

    Without gradients there is nothing to save, and nothing for it to warn of. For another thread that trains meanwhile
    it would cost memory, not correctness.
    """
    if "apply" in vars(CheckpointFunction):  # another thread replays
        yield
        return
    CheckpointFunction.apply = staticmethod(_call)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del CheckpointFunction.apply


def _call(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
    return function(*args)


def cloned_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the model's buffers, for a replay to write its running statistics into."""
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
