"""A model as ``fully_shard`` and tensor parallelism run it: called at other parameters, in place, and put back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from redline.numerics.sharded import fsdp_modules, local_part

_LOW_PRECISION = (torch.float16, torch.bfloat16)


def computing_dtype(model: nn.Module) -> torch.dtype | None:
    """What FSDP's mixed precision computes in, where it does: its ``param_dtype``."""
    return next((dtype for state in _states(model) if (dtype := state._mp_policy.param_dtype) is not None), None)


@contextmanager
def moved_in_place(
    model: nn.Module, point: Mapping[str, Tensor], direction: Mapping[str, Tensor], step: float
) -> Iterator[None]:
    """While it is open the model's own parameters are ``point + step * direction``; then what they were, bit for bit.

    Args:
        model: sharded over several ranks.
        point: by the name of the parameter, lying as it does.
        direction: for some of these, the same.
        step: how far along it.

    Raises:
        RuntimeError: it computes in half precision, where a small step is lost in rounding.
    """
    _refuse_half_precision(model, point)
    with _fsdp_at_rest(model):
        own = {name: local_part(parameter) for name, parameter in model.named_parameters() if name in point}
        kept = {name: part.clone() for name, part in own.items()}
        try:
            for name, part in own.items():
                part.copy_(local_part(point[name]))
                if name in direction:
                    part.add_(local_part(direction[name]), alpha=step)
            yield
        finally:
            for name, part in own.items():
                part.copy_(kept[name])


@contextmanager
def _fsdp_at_rest(model: nn.Module) -> Iterator[None]:
    """Ahead of it and behind it FSDP holds nothing but shards, and waits for no backward."""
    modules, states = fsdp_modules(model), _states(model)
    orders = [state._comm_ctx.post_forward_order for state in states if hasattr(state._comm_ctx, "post_forward_order")]
    orders += [group._post_forward_indices for group in _groups(states)]
    before = [list(order) for order in orders]
    for module in modules:
        module.reshard()
    try:
        yield
    except Exception:
        for root in {one for state in states for one in state._state_ctx.all_states if one._is_root}:
            root._reset_iter_state()
        raise
    finally:
        for module in modules:
            module.reshard()
        for order, entries in zip(orders, before, strict=True):
            order[:] = entries


def _states(model: nn.Module) -> list[Any]:
    return list(dict.fromkeys(module._get_fsdp_state() for module in fsdp_modules(model)))


def _groups(states: list[Any]) -> list[Any]:
    return [group for state in states for group in state._fsdp_param_groups]


def _refuse_half_precision(model: nn.Module, point: Mapping[str, Tensor]) -> None:
    dtype = computing_dtype(model)
    if dtype not in _LOW_PRECISION:
        dtype = next((tensor.dtype for tensor in point.values() if tensor.dtype in _LOW_PRECISION), None)
    if dtype is not None and dtype in _LOW_PRECISION:
        raise RuntimeError(
            f"a central difference through the sharded model would measure rounding: it computes in {dtype}. Expected "
            "a model that can be called whole, or one that computes in float32"
        )
