"""What is read of each step of a fit: r, loss, gradient norm, rates."""

from __future__ import annotations

import typing
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning_runs import (
    QUIET,
    CallsItself,
    CallsItsNet,
    Proposal,
    R,
    Task,
    TwoOptimizers,
    data,
    measuring_r,
    seed,
    trainer,
)
from sinks import Keep
from torch import Tensor

from redline.integrations.lightning import RedlineCallback

pytestmark = QUIET


@pytest.mark.parametrize("arguments", [{}, {"module": "net"}])
@pytest.mark.parametrize("task", [CallsItself, CallsItsNet])
def test_r_is_measured_however_the_net_is_called(task: type[Task], arguments: dict[str, Any]):
    callback, keep = measuring_r(**arguments)
    proposal = Proposal()
    trainer(callback, proposal, max_epochs=1).fit(task(), data(8))
    assert keep.values(R) == pytest.approx(proposal.expected, rel=1e-3)
    assert len(proposal.expected) == 8


def test_r_in_manual_optimization_is_of_both_optimizers_together():
    callback, keep = measuring_r()
    proposal = Proposal()
    module = TwoOptimizers()
    one = trainer(callback, proposal, max_epochs=1)
    one.fit(module, data(8))
    assert keep.values(R) == pytest.approx(proposal.expected, rel=1e-3)
    assert one.global_step == 16  # Lightning counts each optimizer's step
    assert callback.session is not None
    assert callback.session.latest.value("redline_steps_total") == 8
    assert keep.values("redline_loss") == pytest.approx(module.losses)
    assert keep.values("redline_learning_rate", optimizer="Muon", group="0") == [0.02] * 8
    assert keep.values("redline_learning_rate", optimizer="AdamW", group="0") == [0.01] * 8


def test_an_overhead_budget_reaches_the_session():
    callback, _ = measuring_r(overhead_budget=0.02)
    trainer(callback, max_epochs=1).fit(CallsItself(), data(2))
    assert callback.session.report().overhead_budget == 0.02
    assert typing.get_type_hints(RedlineCallback.__init__)["overhead_budget"] == float | None


def test_the_loss_is_that_of_each_step():
    callback, keep = measuring_r()
    module = CallsItself()
    trainer(callback, max_epochs=1).fit(module, data(10))
    assert keep.values("redline_loss") == pytest.approx(module.losses)


def test_the_loss_is_not_divided_by_gradient_accumulation():
    callback, keep = measuring_r()
    module = CallsItself()
    trainer(callback, max_epochs=1, accumulate_grad_batches=4).fit(module, data(8, same=True))
    assert keep.values("redline_loss") == pytest.approx([module.losses[0], module.losses[4]])
    assert module.losses[0] != pytest.approx(module.losses[4])


def test_the_loss_of_an_accumulated_step_is_of_its_own_batches():
    callback, keep = measuring_r()
    module = CallsItself()
    trainer(callback, max_epochs=1, accumulate_grad_batches=4).fit(module, data(20))
    for step, loss in enumerate(keep.values("redline_loss")):
        own = module.losses[4 * step : 4 * step + 4]
        assert min(own) - 1e-6 <= loss <= max(own) + 1e-6
    assert len(keep.snapshots) == 5


def half_precision(scale: float) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=scale))


def test_loss_and_gradients_are_read_without_the_loss_scale():
    def fit(**arguments: Any) -> Keep:
        seed(0)
        callback, keep = measuring_r()
        trainer(callback, max_epochs=1, **arguments).fit(CallsItself(), data(5))
        return keep

    scaled, plain = fit(plugins=[half_precision(1024.0)]), fit()
    for metric in ("redline_loss", "redline_gradient_norm", R):
        assert scaled.values(metric) == pytest.approx(plain.values(metric), rel=0.02)


def test_a_step_that_loss_scaling_skips_is_no_step():
    callback, keep = measuring_r()
    module = CallsItself()
    one = trainer(callback, max_epochs=1, plugins=[half_precision(2.0**40)])
    one.fit(module, data(1))
    assert one.global_step == 1  # Lightning counts it all the same
    assert keep.snapshots == []
    assert callback.session is not None
    assert callback.session.latest.value("redline_steps_total") == 0


class Norms(pl.Callback):
    """The norm of the gradients before clipping, of every step."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
        self.norms.append(float(torch.nn.utils.get_total_norm(gradients)))


def test_the_gradient_norm_is_that_before_the_step():
    callback, keep = measuring_r()
    norms = Norms()
    trainer(callback, norms, max_epochs=1).fit(CallsItself(), data(6))
    assert keep.values("redline_gradient_norm") == pytest.approx(norms.norms)


def test_the_gradient_norm_is_read_after_clipping():
    callback, keep = measuring_r()
    norms = Norms()
    trainer(callback, norms, max_epochs=1, gradient_clip_val=0.01).fit(CallsItself(), data(6))
    assert min(norms.norms) > 0.02
    assert keep.values("redline_gradient_norm") == pytest.approx([0.01] * 6, rel=1e-3)


class TakesTurns(TwoOptimizers):
    """Steps Muon on even batches and AdamW on odd ones."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        self.optimizers()[batch_idx % 2].step()


def test_a_step_that_one_of_two_optimizers_sits_out_is_a_step_all_the_same():
    callback, keep = measuring_r()
    proposal = Proposal()
    trainer(callback, proposal, max_epochs=1).fit(TakesTurns(), data(6))
    assert [snapshot.step for snapshot in keep.snapshots] == list(range(6))
    assert keep.values(R) == pytest.approx(proposal.expected, rel=1e-3)


class Scheduled(CallsItself):
    """Halves its rate after every step."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.4, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_the_learning_rate_is_the_one_that_the_step_was_taken_with():
    callback, keep = measuring_r()
    trainer(callback, max_epochs=1).fit(Scheduled(), data(4))
    assert keep.values("redline_learning_rate", optimizer="SGD", group="0") == pytest.approx([0.4, 0.2, 0.1, 0.05])
    assert keep.values("redline_weight_decay", optimizer="SGD", group="0") == pytest.approx([0.01] * 4)
