"""The hooks Redline puts on modules and optimizers.

A hook object may be copied with its module (``copy.deepcopy`` for an EMA) or pickled (``torch.save(model)``): the copy
is inert and reports to nobody. Hook bodies run outside of any compiled graph.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

_replaying: ContextVar[bool] = ContextVar("redline_replaying", default=False)


@contextmanager
def hooks_silenced() -> Iterator[None]:
    """While it is open no forward hook of any session fires: Redline itself is calling the model."""
    token = _replaying.set(True)
    try:
        yield
    finally:
        _replaying.reset(token)


class _Hook:
    """Tells its owner of a module's calls; a copy of it tells nobody."""

    def __init__(self, tell: Callable[..., None] | None = None) -> None:
        self._tell = tell

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return type(self)()

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return type(self), ()


class ForwardHook(_Hook):
    """Forward pre-hook that tells its owner of a call: ``tell(module, args, kwargs)``."""

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A module is about to be called."""
        if self._tell is not None and not _replaying.get():
            self._tell(module, args, kwargs)


class OutputHook(_Hook):
    """Forward hook that tells its owner what a call gave: ``tell(module, kwargs, output)``."""

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A module was called."""
        if self._tell is not None and not _replaying.get():
            self._tell(module, kwargs, output)


class ReplayHook(_Hook):
    """Forward pre-hook that tells its owner with what Redline itself calls the module: ``tell(kwargs)``."""

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Redline is about to call a module again."""
        if self._tell is not None and _replaying.get():
            self._tell(kwargs)


class StepListener(Protocol):
    """What wants to know of an optimizer's steps."""

    def before_update(self, optimizer: Optimizer) -> None:
        """After backward, before the update."""

    def after_update(self, optimizer: Optimizer) -> None:
        """After the update, within ``optimizer.step()``."""


class OptimizerHooks:
    """Calls a listener after backward and before the update, and after the update, of each step of one optimizer.

    In a plain loop the optimizer's own pre-hook comes after backward. Where ``step`` is given a closure that runs
    forward and backward (Lightning, LBFGS) it comes before both, so the closure is wrapped, and its first return is
    the moment. A ``step`` that calls its base class's is hooked twice, and counts once.
    """

    def __init__(self, optimizer: Optimizer, listener: StepListener) -> None:
        self._listener = listener
        self._announced = False
        self._depth = 0  # of nested calls of step
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def remove(self) -> None:
        """Take both hooks off."""
        for handle in self._handles:
            handle.remove()

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._depth:
            self._depth = _calls_of_step(optimizer) - 1  # 0 if the last step raised, and left its count behind
        self._depth += 1
        if self._depth > 1:
            return None
        self._announced = False
        if callable(kwargs.get("closure")):
            return args, {**kwargs, "closure": self._wrapped(optimizer, kwargs["closure"])}
        # args[0] is the optimizer itself
        if len(args) > 1 and callable(args[1]):
            return (args[0], self._wrapped(optimizer, args[1]), *args[2:]), kwargs
        self._announce(optimizer)
        return None

    def _wrapped(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        def closure_then_announce() -> Any:
            result = closure()
            self._announce(optimizer)
            return result

        return closure_then_announce

    def _announce(self, optimizer: Optimizer) -> None:
        if not self._announced:  # LBFGS evaluates its closure many times
            self._announced = True
            self._listener.before_update(optimizer)

    @torch.compiler.disable  # type: ignore[untyped-decorator, unused-ignore]
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth -= 1
        if self._depth == 0 and self._announced:
            self._announced = False
            self._listener.after_update(optimizer)


def _calls_of_step(optimizer: Optimizer) -> int:
    """How many calls of this optimizer's hooked ``step`` are on the stack."""
    hooked = Optimizer.profile_hook_step(lambda self: None).__code__  # torch wraps every step in this one function
    frame, calls = sys._getframe(), 0
    while (caller := frame.f_back) is not None:
        frame = caller
        calls += frame.f_code is hooked and frame.f_locals["args"][0] is optimizer
    return calls
