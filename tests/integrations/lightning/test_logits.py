"""Whose forward gives the logits: which module is chosen, and what is taken of its output."""

from __future__ import annotations

import pytest
from lightning_runs import CLASSES, FEATURES, QUIET, CallsItself, Proposal, R, Task, data, measuring_r, trainer
from torch import Tensor, nn

import redline

pytestmark = QUIET


class EncoderAndHead(Task):
    """``training_step`` calls two children, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh())
        self.head = nn.Linear(8, CLASSES)

    def logits(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


def test_two_children_that_are_called_need_a_choice():
    callback, _ = measuring_r()
    with pytest.raises(redline.ConfigurationError, match=r"encoder, head.*pass module=, such as module='head'"):
        trainer(callback, max_epochs=1).fit(EncoderAndHead(), data(2))


def test_one_of_two_children_can_be_chosen():
    callback, keep = measuring_r(module="head")
    trainer(callback, max_epochs=1).fit(EncoderAndHead(), data(2))
    assert min(keep.values(R)) > 0


def test_an_unknown_module_is_refused_with_candidates():
    callback, _ = measuring_r(module="nett")
    with pytest.raises(redline.ConfigurationError, match=r"module='nett'.*of CallsItself, such as 'net', 'net.0'"):
        trainer(callback, max_epochs=1).fit(CallsItself(), data(2))


class GivesMore(CallsItself):
    """``forward`` gives its logits among other things."""

    def forward(self, x: Tensor) -> tuple[Tensor, str, Tensor]:
        return x, "logits follow", self.net(x)

    def logits(self, x: Tensor) -> Tensor:
        return self(x)[2]


def test_logits_are_taken_out_of_a_tuple():
    callback, keep = measuring_r(logits=lambda output: output[2])
    proposal = Proposal()
    trainer(callback, proposal, max_epochs=1).fit(GivesMore(), data(4))
    assert keep.values(R) == pytest.approx(proposal.expected, rel=1e-3)


def test_a_tuple_without_a_choice_is_refused():
    callback, _ = measuring_r()
    with pytest.raises(redline.ConfigurationError, match=r"got a tuple as logits.*`logits="):
        trainer(callback, max_epochs=1).fit(GivesMore(), data(2))
