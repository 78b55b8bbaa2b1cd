"""The inputs of the model's last training-mode forward, taken from its own call."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from redline.errors import ConfigurationError
from redline.hooks import ForwardHook
from redline.numerics.names import plain_name

_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")  # what is inside a compiled module, and a checkpointed one


@dataclass(frozen=True)
class CapturedCall:
    """One call of the module whose output gives the logits.

    Attributes:
        module: eager and unwrapped.
        args: positional inputs, copied: the model or the loop may go on to overwrite them.
        kwargs: keyword inputs, copied.
        autocast: the autocast dtype in force on the module's device, or None.
        name: the module's qualified name in the model; "" for the model itself.
        again: made within a backward pass, to compute activations once more.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: torch.dtype | None
    name: str = ""
    again: bool = False


class ForwardCapture:
    """Watches the model's calls in training mode with gradients enabled.

    Where the model itself is never called (a LightningModule whose ``training_step`` calls ``self.net``), the one child
    with trainable parameters that is called stands for it. Once the model itself is called its children are no longer
    watched: a hook on a child would split a compiled model's graph.

    Activation checkpointing calls modules again within backward. That is no forward of the step's: nobody is told of
    it, and it is kept only where the first call ran without gradients, as ``use_reentrant=True`` has it.

    Attributes:
        armed: whether to keep the inputs of the next call.
    """

    def __init__(
        self,
        model: nn.Module,
        module: str | None,
        before_forward: Callable[[], None],
        at_work: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """``before_forward`` is called ahead of each watched call; ``at_work`` is open while inputs are copied."""
        self.armed = False
        self._at_work = at_work
        self._before_forward = before_forward
        self._calls: dict[str, CapturedCall] = {}
        self._handles: list[RemovableHandle] = []
        model = _within_fabric(model)  # whose wrapper converts the inputs, and opens autocast, on the way in
        self._root = unwrapped(model)
        self._of_children: list[RemovableHandle] = []
        if module is not None:
            self._handles.append(self._watch(plain_name(module), _submodule(self._root, module)))
            if module and _has_forward(self._root):
                hook = ForwardHook(self._on_outer_call)
                self._handles.append(model.register_forward_pre_hook(hook, with_kwargs=True, prepend=True))
            return
        if _has_forward(self._root):
            self._handles.append(self._watch("", model))
        self._of_children = [self._watch(name, child) for name, child in _callable_children(self._root)]

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
        for handle in (*self._handles, *self._of_children):
            handle.remove()

    def _watch(self, name: str, target: nn.Module) -> RemovableHandle:
        # Ahead of the user's own hooks on the inputs: calling the module again runs those again.
        hook = ForwardHook(partial(self._on_call, name, unwrapped(target)))
        return target.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)

    def _on_outer_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model is called around the watched submodule: what comes ahead of that belongs to the step, too."""
        if _is_training(module) and not _in_backward():
            self._before_forward()

    def _on_call(
        self, name: str, module: nn.Module, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if not _is_training(module):
            return
        again = _in_backward()
        if again and name in self._calls and not self._calls[name].again:
            return
        if name == "" and self._of_children:
            for handle in self._of_children:
                handle.remove()
            self._of_children = []
        if not again:
            self._before_forward()
        if self.armed:
            with self._at_work():
                args, kwargs = tree_map(_copied, (args, dict(kwargs)))
            self._calls[name] = CapturedCall(module, args, kwargs, _autocast_dtype(module), name, again)


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module, without the wrappers of data parallelism, Fabric, ``torch.compile`` and checkpointing."""
    while True:
        model = _within_fabric(model)
        # Not by attribute: a part of the model may hand on the attributes of what it wraps.
        inner = next((model._modules[name] for name in _WRAPPED if model._modules.get(name) is not None), None)
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif inner is not None:
            model = inner
        else:
            return model


def _within_fabric(model: nn.Module) -> nn.Module:
    """What Fabric's wrapper calls; any other module is itself."""
    inner = getattr(model, "_forward_module", None) if type(model).__name__ == "_FabricModule" else None
    return inner if isinstance(inner, nn.Module) else model


def _has_forward(module: nn.Module) -> bool:
    """Whether the module's class has a forward of its own: not the one that only raises."""
    return getattr(type(module).forward, "__qualname__", "") not in (
        "_forward_unimplemented",
        "LightningModule.forward",
    )


def _callable_children(root: nn.Module) -> list[tuple[str, nn.Module]]:
    children: list[tuple[str, nn.Module]] = []
    for name, child in root.named_children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):  # containers are not called themselves
            children += [(f"{name}.{inner}", module) for inner, module in _callable_children(child)]
        elif any(parameter.requires_grad for parameter in child.parameters()):
            children.append((name, child))
    return children


def _submodule(root: nn.Module, name: str) -> nn.Module:
    modules: dict[str, nn.Module] = {}
    for inner, found in root.named_modules():
        modules.setdefault(plain_name(inner), found)  # the outermost by this name: the one that is called
    if (plain := plain_name(name)) not in modules:
        raise ConfigurationError(
            f"got module={name!r}; expected the qualified name of a submodule of {type(root).__name__}, such as "
            f"{', '.join(repr(inner) for inner in list(modules)[1:9]) or 'none: it has no submodules'}."
        )
    return modules[plain]


def _is_training(module: nn.Module) -> bool:
    return module.training and torch.is_grad_enabled() and not _is_redirected(module)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1  # as torch's own module tracker asks


def _is_redirected(module: nn.Module) -> bool:
    """Whether Lightning or Fabric is leading ``training_step`` through the module's ``forward``, as for DDP."""
    name = getattr(vars(module).get("forward"), "__qualname__", "")
    return "_ForwardRedirection" in name or "_redirection_through_forward" in name


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _autocast_dtype(module: nn.Module) -> torch.dtype | None:
    parameter = next(module.parameters(), None)
    kind = "cpu" if parameter is None else parameter.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
