"""Hooks: when they fire, and that a copy of them is inert."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from redline.hooks import ForwardHook, OptimizerHooks, OutputHook, ReplayHook, hooks_silenced

# Forward hooks ----------------------------------------------------------------------------------------


def hooked() -> tuple[nn.Module, list[tuple[Any, ...]]]:
    calls: list[tuple[Any, ...]] = []
    model = nn.Bilinear(2, 3, 4)
    hook = ForwardHook(lambda module, args, kwargs: calls.append((module, args, kwargs)))
    model.register_forward_pre_hook(hook, with_kwargs=True)
    return model, calls


def test_forward_hook_hands_over_the_call_itself() -> None:
    model, calls = hooked()
    one, other = torch.zeros(5, 2), torch.zeros(5, 3)
    model(one, input2=other)
    ((module, args, kwargs),) = calls
    assert module is model
    assert args[0] is one
    assert kwargs["input2"] is other


def deep_copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [deep_copied, pickled, saved])
def test_copy_of_a_hooked_model_reports_to_nobody(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model, calls = hooked()
    twin = duplicate(model)
    twin(torch.zeros(5, 2), torch.zeros(5, 3))
    duplicate(twin)(torch.zeros(5, 2), torch.zeros(5, 3))
    assert calls == []
    model(torch.zeros(5, 2), torch.zeros(5, 3))
    assert len(calls) == 1


def test_hooks_on_outputs_and_on_replays_tell_of_their_own_calls_only() -> None:
    model, seen = nn.Bilinear(2, 3, 4), []
    model.register_forward_hook(OutputHook(lambda *call: seen.append(("output", call))), with_kwargs=True)
    model.register_forward_pre_hook(ReplayHook(lambda kwargs: seen.append(("replay", kwargs))), with_kwargs=True)
    one, other = torch.zeros(5, 2), torch.zeros(5, 3)
    output = model(one, input2=other)
    ((what, call),) = seen
    assert what == "output"
    assert call[0] is model
    assert call[1]["input2"] is other
    assert call[2] is output
    with hooks_silenced():
        model(one, input2=other)
    assert seen[1][0] == "replay"
    assert seen[1][1]["input2"] is other
    for twin in (deep_copied(model), pickled(model)):
        twin(one, other)
        with hooks_silenced():
            twin(one, other)
    assert len(seen) == 2


def test_hook_without_an_owner_does_nothing() -> None:
    assert ForwardHook()(nn.Identity(), (), {}) is None


def test_hooks_are_silent_while_redline_itself_calls_the_model() -> None:
    model, calls = hooked()
    one, other = torch.zeros(5, 2), torch.zeros(5, 3)
    with hooks_silenced():
        model(one, other)
        with hooks_silenced():
            model(one, other)
        model(one, other)
    assert calls == []
    model(one, other)
    assert len(calls) == 1


def test_hooks_speak_again_after_a_silence_that_ended_badly() -> None:
    model, calls = hooked()
    with pytest.raises(ZeroDivisionError), hooks_silenced():
        raise ZeroDivisionError
    model(torch.zeros(5, 2), torch.zeros(5, 3))
    assert len(calls) == 1


# Optimizer hooks --------------------------------------------------------------------------------------


class Log:
    """A listener that notes what it is told, beside what others note."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.parameter = nn.Parameter(torch.ones(3))

    def before_update(self, optimizer: Optimizer) -> None:
        self.lines.append(f"before, {self._position()}")

    def after_update(self, optimizer: Optimizer) -> None:
        self.lines.append(f"after, {self._position()}")

    def closure(self) -> Tensor:
        self.parameter.grad = torch.ones(3)
        self.lines.append("closure")
        return torch.tensor(4.5)

    def _position(self) -> str:
        return "moved" if (self.parameter != 1).any() else "not moved"


ONE_STEP = ["before, not moved", "after, moved"]


def test_plain_step_is_announced_before_and_after_the_update() -> None:
    log = Log()
    optimizer = torch.optim.SGD([log.parameter], 0.1)
    OptimizerHooks(optimizer, log)
    log.parameter.grad = torch.ones(3)
    optimizer.step()
    assert log.lines == ONE_STEP


@pytest.mark.parametrize("call", [lambda o: o.step(None), lambda o: o.step(closure=None)])
def test_no_closure_is_a_plain_step(call: Callable[[Optimizer], Any]) -> None:
    log = Log()
    optimizer = torch.optim.SGD([log.parameter], 0.1)
    OptimizerHooks(optimizer, log)
    log.parameter.grad = torch.ones(3)
    call(optimizer)
    assert log.lines == ONE_STEP


@pytest.mark.parametrize("call", [lambda o, c: o.step(c), lambda o, c: o.step(closure=c)])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_step_with_a_closure_is_announced_after_it(
    kind: type[Optimizer], call: Callable[[Optimizer, Any], Any]
) -> None:
    log = Log()
    optimizer = kind([log.parameter], 0.1)
    OptimizerHooks(optimizer, log)
    assert call(optimizer, log.closure) == 4.5, "what the closure returned comes through"
    assert log.lines == ["closure", *ONE_STEP]


def test_closure_called_many_times_is_announced_once() -> None:
    log = Log()
    optimizer = torch.optim.LBFGS([log.parameter], 0.1, max_iter=4, tolerance_grad=0, tolerance_change=0)
    OptimizerHooks(optimizer, log)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (log.parameter**4).sum()
        loss.backward()
        log.lines.append("closure")
        return loss

    optimizer.step(closure)
    assert log.lines == ["closure", "before, not moved", *["closure"] * 3, "after, moved"]


def test_closure_that_raises_announces_nothing_and_the_next_step_is_whole() -> None:
    log = Log()
    optimizer = torch.optim.SGD([log.parameter], 0.1)
    OptimizerHooks(optimizer, log)

    def fail() -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        optimizer.step(fail)
    assert log.lines == []
    optimizer.step(log.closure)
    assert log.lines == ["closure", *ONE_STEP]


def test_optimizer_that_ignores_its_closure_is_not_announced_half() -> None:
    class Ignoring(torch.optim.Optimizer):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            pass

    log = Log()
    optimizer = Ignoring([log.parameter], {})
    OptimizerHooks(optimizer, log)
    optimizer.step(log.closure)
    assert log.lines == []


def test_step_that_calls_its_base_class_is_announced_once() -> None:
    """The base class's step runs the hooks as well, once an optimizer of that class was made anywhere."""

    class Derived(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    torch.optim.SGD([torch.zeros(1)], 0.1)
    for closure in (False, True):
        log = Log()
        optimizer = Derived([log.parameter], 0.1)
        OptimizerHooks(optimizer, log)
        log.parameter.grad = torch.ones(3)
        optimizer.step(log.closure) if closure else optimizer.step()
        assert log.lines == ["closure"] * closure + ONE_STEP


def test_removed_hooks_say_nothing_and_leave_nothing_behind() -> None:
    log = Log()
    optimizer = torch.optim.SGD([log.parameter], 0.1)
    hooks = OptimizerHooks(optimizer, log)
    hooks.remove()
    log.parameter.grad = torch.ones(3)
    optimizer.step()
    assert log.lines == []
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_users_own_hooks_and_arguments_come_through() -> None:
    class Told(torch.optim.Optimizer):
        def step(self, closure: Any, *, note: str, more: int = 0) -> str:  # type: ignore[override]
            closure()
            return f"{note} {more}"

    log = Log()
    optimizer = Told([log.parameter], {})
    optimizer.register_step_pre_hook(lambda *_: log.lines.append("the user's"))
    OptimizerHooks(optimizer, log)
    assert optimizer.step(log.closure, note="told", more=2) == "told 2"
    assert log.lines == ["the user's", "closure", "before, not moved", "after, not moved"]


def test_copied_or_saved_optimizer_reports_to_nobody() -> None:
    log = Log()
    optimizer = torch.optim.SGD([log.parameter], 0.1)
    OptimizerHooks(optimizer, log)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        twin.param_groups[0]["params"][0].grad = torch.ones(3)
        twin.step()
    assert log.lines == []
