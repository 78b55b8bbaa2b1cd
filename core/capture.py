"""The inputs of the model's last training-mode forward, taken from its own call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from redline.errors import ConfigurationError
from redline.hooks import ForwardHook


@dataclass(frozen=True)
class CapturedCall:
    """One call of the module whose output gives the logits.

    Attributes:
        module: eager and unwrapped.
        args: positional inputs, by reference.
        kwargs: keyword inputs, by reference.
        autocast: the autocast dtype in force on the module's device, or None.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: torch.dtype | None


class ForwardCapture:
    """Watches the model's calls in training mode with gradients enabled.

    Where the model itself is never called (a LightningModule whose ``training_step`` calls ``self.net``), the one child
    with trainable parameters that is called stands for it.
    """

    def __init__(self, model: nn.Module, module: str | None, before_forward: Callable[[], None]) -> None:
        """``before_forward`` comes ahead of each watched call; ``armed`` says whether to keep it."""
        self.armed = False
        self._before_forward = before_forward
        self._calls: dict[str, CapturedCall] = {}
        root = unwrapped(model)
        if module is None:
            self._watched = {"": root, **dict(_callable_children(root))}
        else:
            self._watched = {module: _submodule(root, module)}
        targets = list(self._watched.items())
        if module is None and model is not root:
            targets.append(("", model))  # the compiled wrapper may skip the hooks of what it wraps
        self._handles = [
            target.register_forward_pre_hook(ForwardHook(partial(self._on_call, name)), with_kwargs=True)
            for name, target in targets
        ]

    def call(self) -> CapturedCall | None:
        """The last call, or None if there was none.

        Raises:
            ConfigurationError: several children were called and none can be preferred.
        """
        if "" in self._calls or len(self._calls) < 2:
            return self._calls.get("", next(iter(self._calls.values()), None))
        names = list(self._calls)
        raise ConfigurationError(
            f"got a model that is not called itself, but {len(names)} of its children are: {', '.join(names)}. "
            f"Expected one whose output gives the logits: pass module=, such as module={names[-1]!r}, and logits= "
            "if its output is not the logits."
        )

    def forget(self) -> None:
        """Let go of the inputs."""
        self._calls.clear()

    def remove(self) -> None:
        """Take the hooks off."""
        self.forget()
        for handle in self._handles:
            handle.remove()

    def _on_call(self, name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        module = self._watched[name]
        if not (module.training and torch.is_grad_enabled()) or _is_redirected(module):
            return
        self._before_forward()
        if self.armed:
            self._calls[name] = CapturedCall(module, args, dict(kwargs), _autocast_dtype(module))


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module under DistributedDataParallel, DataParallel and ``torch.compile`` wrappers."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _callable_children(root: nn.Module) -> list[tuple[str, nn.Module]]:
    children: list[tuple[str, nn.Module]] = []
    for name, child in root.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):  # containers are not called themselves
            children += [(f"{name}.{inner}", module) for inner, module in _callable_children(child)]
        elif any(parameter.requires_grad for parameter in child.parameters()):
            children.append((name, unwrapped(child)))
    return children


def _submodule(root: nn.Module, name: str) -> nn.Module:
    modules = dict(root.named_modules())
    if name not in modules:
        raise ConfigurationError(
            f"got module={name!r}; expected the qualified name of a submodule of {type(root).__name__}, such as "
            f"{', '.join(repr(inner) for inner in list(modules)[1:9]) or 'none: it has no submodules'}."
        )
    return unwrapped(modules[name])


def _is_redirected(module: nn.Module) -> bool:
    """Whether Lightning is leading ``training_step`` through the module's ``forward``, as its DDP strategy does."""
    return "_ForwardRedirection" in getattr(vars(module).get("forward"), "__qualname__", "")


def _autocast_dtype(module: nn.Module) -> torch.dtype | None:
    parameter = next(module.parameters(), None)
    kind = "cpu" if parameter is None else parameter.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
