"""Capture: the inputs of the model's last forward in training, from whichever module gives the logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from captured_models import Pair, Trainer
from torch import Tensor, nn

from redline import ConfigurationError
from redline.capture import ForwardCapture, unwrapped


def capture(model: nn.Module, module: str | None = None, armed: bool = True) -> tuple[ForwardCapture, list[str]]:
    calls: list[str] = []
    found = ForwardCapture(model, module, lambda: calls.append("forward"))
    found.armed = armed
    return found, calls


# Inputs -----------------------------------------------------------------------------------------------


def test_inputs_are_kept_as_they_were_given() -> None:
    model = Pair()
    watch, calls = capture(model)
    x, other = torch.randn(5, 4), torch.randn(5, 2)
    model(x, other=other)
    call = watch.call()
    assert call is not None
    assert call.module is model
    assert len(call.args) == 1
    assert torch.equal(call.args[0], x)
    assert list(call.kwargs) == ["other"]
    assert torch.equal(call.kwargs["other"], other)
    assert call.args[0] is not x, "copies: the model or the loop may overwrite its inputs"
    assert call.autocast is None
    assert calls, "and its owner heard of it"


def test_last_call_counts() -> None:
    model = Pair()
    watch, _ = capture(model)
    first, last = torch.randn(5, 4), torch.randn(5, 4)
    model(first)
    model(last)
    call = watch.call()
    assert call is not None
    assert torch.equal(call.args[0], last)


def test_nothing_is_there_before_the_first_call_or_once_forgotten() -> None:
    model = Pair()
    watch, _ = capture(model)
    assert watch.call() is None
    model(torch.randn(5, 4))
    assert watch.call() is not None
    watch.forget()
    assert watch.call() is None


def test_unarmed_it_hears_of_calls_and_keeps_nothing() -> None:
    model = Pair()
    watch, calls = capture(model, armed=False)
    model(torch.randn(5, 4))
    assert calls
    assert watch.call() is None


def test_removed_it_hears_of_nothing() -> None:
    model = Pair()
    watch, calls = capture(model)
    model(torch.randn(5, 4))
    calls.clear()
    watch.remove()
    assert watch.call() is None
    model(torch.randn(5, 4))
    assert calls == []
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    "how",
    [
        lambda model, x: model.eval()(x),
        torch.no_grad()(lambda model, x: model(x)),
        torch.inference_mode()(lambda model, x: model(x)),
    ],
    ids=["in eval mode", "without gradients", "in inference mode"],
)
def test_forward_outside_of_training_is_none(how: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model = Pair()
    watch, calls = capture(model)
    how(model, torch.randn(5, 4))
    assert watch.call() is None
    assert calls == []


def test_evaluation_between_forward_and_step_does_not_replace_the_inputs() -> None:
    model = Pair()
    watch, _ = capture(model)
    x = torch.randn(5, 4)
    model(x)
    model.eval()
    model(torch.randn(7, 4))
    model.train()
    with torch.no_grad():
        model(torch.randn(7, 4))
    call = watch.call()
    assert call is not None
    assert torch.equal(call.args[0], x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_in_force_is_kept(dtype: torch.dtype) -> None:
    model = Pair()
    watch, _ = capture(model)
    with torch.autocast("cpu", dtype=dtype):
        model(torch.randn(5, 4))
    call = watch.call()
    assert call is not None
    assert call.autocast is dtype


# Which module -----------------------------------------------------------------------------------------


def test_model_that_is_called_itself_is_preferred_to_its_children() -> None:
    model = Pair()
    watch, _ = capture(model)
    model(torch.randn(5, 4), other=torch.randn(5, 2))
    call = watch.call()
    assert call is not None
    assert call.module is model


@pytest.mark.parametrize("name", ["left", "left.1", "left.1.1"])
def test_module_can_be_named_however_deep(name: str) -> None:
    model = Pair()
    watch, _ = capture(model, name)
    model(torch.randn(5, 4))
    call = watch.call()
    assert call is not None
    assert call.module is model.get_submodule(name)
    assert call.args[0].shape == (5, 4)


def test_unknown_module_is_refused_with_candidates() -> None:
    with pytest.raises(
        ConfigurationError,
        match=r"got module='net'; expected the qualified name of a submodule of Pair, such as 'left', 'left\.0'",
    ):
        capture(Pair(), "net")


def test_unknown_module_of_a_model_without_submodules() -> None:
    with pytest.raises(ConfigurationError, match=r"expected the .* of Linear, such as none: it has no"):
        capture(nn.Linear(2, 2), "net")


@pytest.mark.parametrize(
    ("trainer", "name"),
    [
        (lambda: Trainer(net=nn.Linear(4, 3)), "net"),
        (lambda: Trainer(net=nn.Linear(4, 3), metric=nn.Softmax(-1), loss=nn.CrossEntropyLoss()), "net"),
        (lambda: Trainer(net=nn.Linear(4, 3), teacher=nn.Linear(4, 3).requires_grad_(False)), "net"),
        (lambda: Trainer(parts=nn.ModuleList([nn.Linear(4, 3)])), "parts.0"),
        (lambda: Trainer(parts=nn.ModuleDict({"a": nn.ModuleList([nn.Linear(4, 3)])})), "parts.a.0"),
    ],
)
def test_only_child_with_trainable_parameters_stands_for_a_model_that_is_not_called(
    trainer: Callable[[], Trainer], name: str
) -> None:
    model = trainer()
    watch, _ = capture(model)
    for child in (model.get_submodule(name), *model.children()):
        if not isinstance(child, (nn.ModuleList, nn.ModuleDict, nn.CrossEntropyLoss)):
            child(torch.randn(5, 4))
    call = watch.call()
    assert call is not None
    assert call.module is model.get_submodule(name)


def test_child_that_is_not_called_does_not_count() -> None:
    model = Trainer(net=nn.Linear(4, 3), spare=nn.Linear(4, 3))
    watch, _ = capture(model)
    model.get_submodule("net")(torch.randn(5, 4))
    call = watch.call()
    assert call is not None
    assert call.module is model.get_submodule("net")


def test_two_children_that_are_called_are_refused_by_name() -> None:
    model = Trainer(encoder=nn.Linear(4, 4), head=nn.Linear(4, 3))
    watch, _ = capture(model)
    model.get_submodule("head")(model.get_submodule("encoder")(torch.randn(5, 4)))
    with pytest.raises(
        ConfigurationError,
        match=r"not called itself, but 2 of its children are: encoder, head\. .* pass module=, such as module='head'",
    ):
        watch.call()


def test_no_child_with_trainable_parameters_leaves_nothing() -> None:
    model = Trainer(teacher=nn.Linear(4, 3).requires_grad_(False), softmax=nn.Softmax(-1))
    watch, _ = capture(model)
    for child in model.children():
        child(torch.randn(5, 4))
    assert watch.call() is None


def test_child_in_eval_mode_is_not_captured() -> None:
    model = Trainer(net=nn.Linear(4, 3))
    model.get_submodule("net").eval()
    watch, _ = capture(model)
    model.get_submodule("net")(torch.randn(5, 4))
    assert watch.call() is None


# Wrappers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: model,
        nn.DataParallel,
        lambda model: torch.compile(model, backend="eager"),
        lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
        lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
    ],
    ids=["bare", "parallel", "compiled", "parallel of compiled", "compiled of parallel"],
)
def test_wrappers_come_off(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = Pair()
    assert unwrapped(wrap(model)) is model


class Adapter(nn.Module):
    """A part of the model around another, of which it hands on the attributes, as adapters for fine-tuning do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.scale = nn.Parameter(torch.ones(3))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.inner(x)


def test_adapter_around_a_compiled_model_does_not_come_off() -> None:
    model = Adapter(torch.compile(Pair(), backend="eager"))
    assert unwrapped(model) is model


@pytest.mark.parametrize("attached", ["model", "wrapper"])
@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, lambda model: torch.compile(model, backend="eager")],
    ids=["parallel", "compiled"],
)
def test_call_through_a_wrapper_is_captured(wrap: Callable[[nn.Module], nn.Module], attached: str) -> None:
    torch.compiler.reset()
    model = Pair()
    wrapper = wrap(model)
    watch, _ = capture(model if attached == "model" else wrapper)
    x = torch.randn(5, 4)
    wrapper(x)
    call = watch.call()
    assert call is not None
    assert call.module is model
    assert torch.equal(call.args[0], x)


class _FabricModule(nn.Module):
    """As Fabric's wrapper does: it converts inputs and opens autocast on the way in."""

    def __init__(self, forward_module: nn.Module) -> None:
        super().__init__()
        self._forward_module = forward_module

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self._forward_module(x.float())


@pytest.mark.parametrize("inner", [lambda model: model, nn.DataParallel], ids=["bare", "parallel"])
def test_fabrics_wrapper_is_watched_from_within(inner: Callable[[nn.Module], nn.Module]) -> None:
    model = Pair()
    wrapper = _FabricModule(inner(model))
    assert unwrapped(wrapper) is model
    watch, _ = capture(wrapper)
    x = torch.randn(5, 4).double()
    wrapper(x)
    call = watch.call()
    assert call is not None
    assert (call.module, call.autocast, call.args[0].dtype) == (model, torch.bfloat16, torch.float32)
