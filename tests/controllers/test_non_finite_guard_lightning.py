"""NonFiniteGuard in a Lightning fit."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from bits import frozen
from non_finite_guard_runs import Net, actions, adamw, bad_batch, batch
from torch import Tensor
from torch.utils.data import DataLoader
from torch_optimizers import muon_and_adamw

from redline import NonFiniteGuard, RunStoppedError
from redline.integrations.lightning import RedlineCallback


class Task(pl.LightningModule):
    """Automatic optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, data: tuple[Tensor, Tensor], index: int) -> Tensor:
        return F.cross_entropy(self(data[0]), data[1])

    def configure_optimizers(self) -> Any:
        return adamw(self)[0]


class Manual(Task):
    """Muon and AdamW, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, data: tuple[Tensor, Tensor], index: int) -> None:  # type: ignore[override]
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(data[0]), data[1]))
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return muon_and_adamw(self)


def fitted(task: type[Task], batches: list[tuple[Tensor, Tensor]], *callbacks: pl.Callback, **arguments: Any) -> Any:
    torch.manual_seed(0)
    module = task()
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        precision="32-true",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return frozen(module.state_dict()), [frozen(optimizer.state_dict()) for optimizer in trainer.optimizers]


LIGHTNING = pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning", "ignore::FutureWarning"
)


@LIGHTNING
@pytest.mark.parametrize(
    ("task", "arguments"), [(Task, {}), (Task, {"accumulate_grad_batches": 2}), (Manual, {})], ids=str
)
def test_a_fit_that_meets_a_bad_batch_equals_one_that_does_not(task: type[Task], arguments: dict[str, Any]) -> None:
    bad = [bad_batch(5)] if not arguments else [batch(5), bad_batch(6)]
    start, end = [batch(seed) for seed in range(4)], [batch(seed) for seed in range(7, 11)]
    callback = RedlineCallback(monitors=[], controllers=[NonFiniteGuard()])
    guarded = fitted(task, [*start, *bad, *end], callback, **arguments)
    assert guarded == fitted(task, [*start, *end], **arguments)
    assert callback.session is not None
    assert actions(callback.session) == [(2 if arguments else 4, "withhold")]
    assert "the first net.body.weight, the last net.head.bias" in callback.session.interventions[0].reason


@LIGHTNING
@pytest.mark.parametrize("task", [Task, Manual])
def test_a_fit_is_stopped_by_n_bad_batches_in_a_row(task: type[Task]) -> None:
    callback = RedlineCallback(monitors=[], controllers=[NonFiniteGuard(stop_after=2)])
    with pytest.raises(RunStoppedError, match=r"at step 2: .*the first net\.body\.weight"):
        fitted(task, [batch(1), bad_batch(2), bad_batch(3), batch(4)], callback)
