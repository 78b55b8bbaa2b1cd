"""Capture in a session: r is the same from whichever module gives the logits, or is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captured_models import Trainer
from torch import Tensor, nn

import redline
from redline import ConfigurationError


def step_size(model: nn.Module, forward: Callable[[Tensor], Tensor], **options: Any) -> float:
    """r of one step of a batch."""
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    with redline.attach(model, optimizer, monitors=[redline.GhostRadius(1)], **options) as session:
        F.cross_entropy(forward(x), torch.arange(6) % 3).backward()
        optimizer.step()
        return session.latest.value("redline_normalized_step_size")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def test_step_size_is_the_same_from_whichever_module_gives_the_logits() -> None:
    alone = net()
    expected = step_size(alone, alone)
    inside = Trainer(net=net())
    assert step_size(inside, inside.get_submodule("net")) == expected
    named = Trainer(net=net(), spare=nn.Linear(4, 4))
    assert step_size(named, named.get_submodule("net"), module="net") == expected


def test_step_size_of_a_tail_counts_its_own_parameters() -> None:
    """``module=`` names the head: its inputs are held, so r is that of the head's part of the step."""
    whole = net()
    assert 0 < step_size(whole, whole, module="2") < step_size(net_again := net(), net_again)


def test_two_children_end_a_run_that_cannot_be_measured_at_its_first_due_step() -> None:
    model = Trainer(encoder=nn.Linear(4, 4), head=nn.Linear(4, 3))
    encoder, head = model.get_submodule("encoder"), model.get_submodule("head")
    with pytest.raises(ConfigurationError, match="2 of its children are: encoder, head"):
        step_size(model, lambda x: head(encoder(x)))
    model = Trainer(encoder=nn.Linear(4, 4), head=nn.Linear(4, 3))
    encoder, head = model.get_submodule("encoder"), model.get_submodule("head")
    assert step_size(model, lambda x: head(encoder(x)), module="head") > 0


def test_users_own_hook_on_the_inputs_is_applied_once() -> None:
    alone, model = net(), net()
    model.register_forward_pre_hook(lambda _, args: (3 * args[0],))
    assert step_size(model, model) == pytest.approx(step_size(alone, lambda x: alone(3 * x)), rel=1e-5)


class WorkingInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.mul_(3))


@pytest.mark.filterwarnings("ignore::redline.RedlineWarning")
@pytest.mark.parametrize("by", ["the model", "the loop"])
def test_inputs_that_were_overwritten_are_not_taken_for_the_inputs(by: str) -> None:
    """A model that works in place, a loop that fills one buffer again and again: r is right, or it is absent."""
    alone = net()
    expected = step_size(alone, lambda x: alone(3 * x))
    model = WorkingInPlace() if by == "the model" else net()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)) * (1 if by == "the model" else 3)
    with redline.attach(model, optimizer, monitors=[redline.GhostRadius(1)]) as session:
        F.cross_entropy(model(x), torch.arange(6) % 3).backward()
        if by == "the loop":
            x.fill_(100.0)
        optimizer.step()
        measured = session.latest.series("redline_normalized_step_size").get(())
    assert measured is None or measured == pytest.approx(expected, rel=1e-5)


class Predictor(Trainer):
    """Has a forward, for prediction, that the training loop does not call."""

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule("net")(x).argmax(-1)


@pytest.mark.parametrize("monitors", [[redline.GhostRadius(1)], [redline.StepHealth(1), redline.GhostRadius(2)]])
def test_model_whose_forward_is_not_called_is_measured_by_its_child_within_a_few_steps(
    monitors: list[redline.Monitor],
) -> None:
    model = Predictor(net=net())
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    with redline.attach(model, optimizer, monitors=monitors) as session:
        for _ in range(4):
            F.cross_entropy(model.get_submodule("net")(torch.randn(6, 4)), torch.arange(6) % 3).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert session.latest.value("redline_normalized_step_size") > 0
        assert session.notes == ()


def test_keyword_inputs_are_replayed() -> None:
    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, *, x: Tensor, scale: float) -> Tensor:
            return scale * self.net(x)

    alone, model = net(), ByKeyword()
    expected = step_size(alone, alone)
    assert step_size(model, lambda x: model(x=x, scale=1.0)) == pytest.approx(expected, rel=1e-5)
