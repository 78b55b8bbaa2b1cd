"""A fit resumed from a Lightning checkpoint equals one that was not cut, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from bits import frozen
from lightning.pytorch.callbacks import ModelCheckpoint
from resume_runs import (
    STEPS,
    Did,
    Incidents,
    Made,
    Net,
    all_three,
    assert_sessions_agree,
    clamp,
    guards_did,
    loss_of,
    non_finite,
    spike,
)
from torch import Tensor
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader, TensorDataset
from torch_optimizers import muon_and_adamw

import redline
from redline.integrations.lightning import RedlineCallback


class Task(pl.LightningModule):
    """The same task by automatic optimization; the batch is that of the global step."""

    def __init__(self, incidents: Incidents, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = Net()
        self.incidents = incidents

    def training_step(self, _: Any) -> Tensor:
        index = self.trainer.global_step
        return loss_of(self.net, index, self.incidents.get(index, ""))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
        return [optimizer], [{"scheduler": ExponentialLR(optimizer, 0.99), "interval": "step"}]


class Manual(Task):
    """Muon beside AdamW, by manual optimization: a joint step is two of Lightning's global steps."""

    def __init__(self, incidents: Incidents, seed: int = 0) -> None:
        super().__init__(incidents, seed)
        self.automatic_optimization = False

    def training_step(self, _: Any) -> None:
        index = self.trainer.global_step // 2
        loss = loss_of(self.net, index, self.incidents.get(index, ""))
        self.manual_backward(loss)
        for optimizer, scheduler in zip(self.optimizers(), self.lr_schedulers(), strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()

    def configure_optimizers(self) -> Any:
        optimizers = muon_and_adamw(self)
        return optimizers, [ExponentialLR(optimizer, 0.99) for optimizer in optimizers]


class Fit:
    """A fit with Redline, as it stood at its end."""

    def __init__(
        self,
        task: type[Task],
        controllers: Made,
        incidents: Incidents,
        last: int,
        *,
        save_in: Path | None = None,
        resume_from: Path | None = None,
    ) -> None:
        self.module = task(incidents, seed=0 if resume_from is None else 1)
        callback = RedlineCallback(monitors=[redline.StepHealth()], controllers=controllers(), run="resumed")
        per_step = 2 if task is Manual else 1
        saving = [] if save_in is None else [ModelCheckpoint(save_in, "cut", every_n_train_steps=last * per_step)]
        self.trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=last * per_step,
            callbacks=[callback, *saving],
            logger=False,
            enable_checkpointing=save_in is not None,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        self.trainer.fit(
            self.module,
            DataLoader(TensorDataset(torch.zeros(STEPS, 1))),
            ckpt_path=resume_from,
            weights_only=True if resume_from else None,
        )
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        self.training = frozen(
            [part.state_dict() for part in (self.module, *self.trainer.optimizers, *schedulers)],
        )
        self.rates_set = [scheduler.last_epoch for scheduler in schedulers]
        assert callback.session is not None
        self.session = callback.session


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX`:UserWarning")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization:UserWarning")
@pytest.mark.parametrize(
    ("task", "controllers", "incidents", "cut", "did"),
    [
        (Task, clamp, {25: "batch"}, 24, {}),
        (Task, non_finite, {20: "nan", 21: "nan", 22: "nan"}, 21, {"withhold": [20, 21, 22]}),
        (Task, spike, {20: "batch", 24: "parameters"}, 22, {"withhold": [20, 24], "rollback": [25]}),
        (Task, spike, {24: "parameters", 30: "batch"}, 25, {"withhold": [24, 30], "rollback": [25]}),
        (
            Task,
            all_three,
            {20: "nan", 24: "parameters", 30: "batch"},
            22,
            {"withhold": [20, 24, 30], "rollback": [25]},
        ),
        (
            Manual,
            all_three,
            {20: "batch", 24: "parameters", 30: "nan"},
            25,
            {"withhold": [20, 24, 30], "rollback": [25]},
        ),
    ],
    ids=["clamp", "non-finite", "spike and roll-back", "cut amid jumps", "all three", "all three, two optimizers"],
)
def test_a_fit_resumed_from_a_checkpoint_equals_one_that_was_not_cut(
    tmp_path: Path, task: type[Task], controllers: Made, incidents: Incidents, cut: int, did: Did
) -> None:
    through = Fit(task, controllers, incidents, STEPS)
    assert guards_did(through.session) == did
    # A roll-back from step 25 to 18 takes the schedulers back with it.
    assert set(through.rates_set) == {STEPS - 7 if "rollback" in did else STEPS}
    first = Fit(task, controllers, incidents, cut, save_in=tmp_path)
    second = Fit(task, controllers, incidents, STEPS, resume_from=tmp_path / "cut.ckpt")
    assert first.session.latest.value("redline_steps_total") == cut
    assert second.session.latest.value("redline_steps_total") == STEPS
    assert second.training == through.training
    assert_sessions_agree(second.session, through.session)
    if controllers in (clamp, all_three):
        assert "scale" in [one.action for one in through.session.interventions]
