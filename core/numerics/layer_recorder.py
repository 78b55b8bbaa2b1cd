"""Seeing attention and activations during a forward-mode pass, wherever in the model they are called.

Calls are caught as functions, not as modules: ``F.silu`` in a hand-written forward counts as ``nn.SiLU`` does. What is
measured of a call comes from its inputs before it runs; the call itself is passed on as it was.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from redline.numerics.layer_radii import (
    QUANTILE,
    SINGULARITIES,
    activation_radius,
    activation_step_size,
    attention_scores,
    attention_step_size,
    thinned,
)
from redline.numerics.names import plain_name
from redline.numerics.sharded import class_name

_SOFTMAX = {F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax}
_MULTI_HEAD_SIGNATURE = inspect.signature(F.multi_head_attention_forward)
# An unrolled recurrence calls its activation at every time step.
_MOST_CALLS = 16


_Value = TypeVar("_Value")


@dataclass(frozen=True)
class LayerSteps:
    """How long a step is for each attention and each activation, in steps.

    A layer is named after the module in whose forward the call happened; further calls in the same module are
    ``name#2``, ``name#3`` and so on. The model itself goes by its class.

    Attributes:
        attention: by layer, the length of the step over attention's radius, 0-d, float32 or float64.
        activation_radii: by layer, the radii of the activation's inputs, ``(n,)``.
        failures: by layer, why it could not be measured, in words.
    """

    attention: dict[str, Tensor] = field(default_factory=dict)
    activation_radii: dict[str, Tensor] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def activation(self, quantile: float = QUANTILE) -> dict[str, Tensor]:
        """By layer, the length of the step over the activation's radius, 0-d; see ``activation_step_size``."""
        return {name: activation_step_size(radii, quantile) for name, radii in self.activation_radii.items()}

    def within(self, module: str) -> LayerSteps:
        """The same by the names that layers have in a larger model, of which this one is ``module``; "" for itself."""

        def renamed(of: dict[str, _Value]) -> dict[str, _Value]:
            return {f"{module}.{name}" if module else name: value for name, value in of.items()}

        return LayerSteps(renamed(self.attention), renamed(self.activation_radii), renamed(self.failures))


@contextmanager
def recording_layers(model: nn.Module, stretch: Tensor) -> Iterator[LayerSteps]:
    """Within it, a forward-mode pass of ``model`` is recorded; nothing stays behind on the modules.

    Args:
        model: the one that is called; its modules give the names.
        stretch: 0-d, so many times the step is what the duals carry.
    """
    recorder = _Recorder(model, stretch)
    # Torch's hooks on all modules at once, so that none of the model's own is touched.
    handles = [
        register_module_forward_pre_hook(recorder.enter),
        register_module_forward_hook(recorder.leave, always_call=True),
    ]
    try:
        with recorder:
            yield recorder.steps
    finally:
        for handle in handles:
            handle.remove()


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module, stretch: Tensor) -> None:
        super().__init__()
        self.steps = LayerSteps()
        self._stretch = stretch
        self._names = {module: plain_name(name) or class_name(model) for name, module in model.named_modules()}
        self._within = [class_name(model)]
        self._calls: dict[tuple[str, str], int] = {}

    def enter(self, module: nn.Module, inputs: Any) -> None:
        """A module of any model is called."""
        if module in self._names:
            self._within.append(self._names[module])

    def leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """It has returned, or raised."""
        if module in self._names:
            self._within.pop()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in SINGULARITIES:
            self._record("activation", lambda name: self._activation(name, func, *args, **kwargs))
        elif func in _SOFTMAX:
            self._record("attention", lambda name: self._softmax(name, *args, **kwargs))
        elif func is F.scaled_dot_product_attention:
            self._record("attention", lambda name: self._dot_product_attention(name, *args, **kwargs))
        elif func is F.multi_head_attention_forward:
            self._record("attention", lambda name: self._multi_head_attention(name, args, kwargs))
        return func(*args, **kwargs)

    def _record(self, kind: str, measure: Callable[[str], bool]) -> None:
        """Measure a call under its name; ``measure`` says whether there was anything to."""
        module = self._within[-1]
        call = self._calls.get((kind, module), 0) + 1
        if call > _MOST_CALLS:
            self.steps.failures[module] = f"called more than {_MOST_CALLS} times in one forward, the rest is left out"
            return
        name = module if call == 1 else f"{module}#{call}"
        try:
            with torch.autocast(self._stretch.device.type, enabled=False):  # in full precision, whatever the pass is in
                measured = measure(name)
        except Exception as error:  # noqa: BLE001 what fails here must not cost the logits their tangent
            self.steps.failures[name] = f"{type(error).__name__}: {error}"
            measured = True
        if measured:
            self._calls[kind, module] = call

    def _activation(self, name: str, func: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
        args, kwargs = _input_first(args, kwargs)
        singularities = SINGULARITIES[func](*args, **kwargs)
        if not singularities or not args[0].is_floating_point() or not args[0].numel():
            return False
        inputs, tangent = _unpacked(args[0])
        if func is F.glu:
            dim = args[1] if len(args) > 1 else kwargs.get("dim", -1)
            inputs, tangent = inputs.chunk(2, dim)[1], tangent.chunk(2, dim)[1]
        radii = activation_radius(thinned(inputs), thinned(tangent), singularities)
        self.steps.activation_radii[name] = radii * self._stretch
        return True

    def _softmax(self, name: str, *args: Any, **kwargs: Any) -> bool:
        args, kwargs = _input_first(args, kwargs)
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        if dim not in (-1, args[0].dim() - 1) or not args[0].is_floating_point() or not args[0].numel():
            return False
        return self._attention(name, *_unpacked(args[0]))

    def _dot_product_attention(
        self,
        name: str,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> bool:
        mask = None if attn_mask is None else _unpacked(attn_mask)
        return self._attention(
            name,
            *attention_scores(
                _unpacked(query), _unpacked(key), mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
            ),
        )

    def _multi_head_attention(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Its inner calls are hidden from a mode: it is asked for its weights ``A`` in a call of our own."""
        bound = _MULTI_HEAD_SIGNATURE.bind(*args, **kwargs)
        bound.arguments.update(need_weights=True, average_attn_weights=False, dropout_p=0.0)
        args, kwargs = tree_map(_widened, (bound.args, bound.kwargs))
        _, given = F.multi_head_attention_forward(*args, **kwargs)
        assert given is not None
        weights, tangent = _unpacked(given)
        return self._attention(name, weights.log(), tangent / weights)

    def _attention(self, name: str, scores: Tensor, tangent: Tensor) -> bool:
        self.steps.attention[name] = attention_step_size(scores, tangent) / self._stretch
        return True


def _input_first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    kwargs = dict(kwargs)
    return (args if args else (kwargs.pop("input"),)), kwargs


def _unpacked(dual: Tensor) -> tuple[Tensor, Tensor]:
    primal, tangent = forward_ad.unpack_dual(dual)
    return _widened(primal), torch.zeros_like(_widened(primal)) if tangent is None else _widened(tangent)


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16) else value
