"""Checkpoints: a resumed fit goes on as if it had not stopped, with Redline or without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_runs import QUIET, CallsItself, R, data, seed, trainer
from sinks import Keep
from torch import Tensor

import redline
from redline.integrations.lightning import RedlineCallback

pytestmark = QUIET


class ScaleOnce(redline.Controller):
    """Halves step 2, and remembers that it did."""

    def __init__(self) -> None:
        self.done = 0

    def inspect(self, step: redline.Step) -> list[redline.Scale]:
        if step.index != 2:
            return []
        self.done += 1
        return [redline.Scale(0.5, "to see it", saw={"tau": 1.0})]

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state: Any) -> None:
        self.done = state["done"]


def every_third(keep: Keep, controller: ScaleOnce | None = None) -> RedlineCallback:
    monitors = [
        redline.GhostRadius(every=3),
        redline.WeightSpectrum(every=4),
        redline.UpdateSpectrum(every=4),
        redline.StepHealth(),
    ]
    return RedlineCallback(monitors=monitors, controllers=[controller or ScaleOnce()], sinks=[keep], run="resumed")


@pytest.fixture
def halfway(tmp_path: Path) -> Path:
    """The checkpoint after 7 of 12 steps, one of them scaled."""
    seed(0)
    saving = ModelCheckpoint(tmp_path, filename="halfway", every_n_train_steps=7, save_top_k=-1)
    trainer(every_third(Keep()), saving, max_epochs=1, enable_checkpointing=True).fit(
        CallsItself(), data(12, same=True)
    )
    return tmp_path / "halfway.ckpt"


def test_a_resumed_fit_goes_on_counting(halfway: Path):
    seed(0)
    through = every_third(through_keep := Keep())
    trainer(through, max_epochs=1).fit(CallsItself(), data(12, same=True))

    controller = ScaleOnce()
    resumed = every_third(resumed_keep := Keep(), controller)
    trainer(resumed, max_epochs=1).fit(CallsItself(), data(12, same=True), ckpt_path=halfway)

    assert [snapshot.step for snapshot in resumed_keep.snapshots] == [7, 8, 9, 10, 11]
    assert controller.done == 1
    assert through.session is not None
    assert resumed.session is not None
    for metric in ("redline_steps_total", "redline_measurements_total", "redline_interventions_total"):
        assert resumed.session.latest.series(metric) == through.session.latest.series(metric)
    assert resumed.session.latest.value("redline_steps_total") == 12
    assert resumed.session.interventions == through.session.interventions
    assert [one.step for one in resumed.session.interventions] == [2]
    # r is due at 0, 3, 6, 9: the resumed run measures at 9 what the other one does.
    assert resumed_keep.snapshots[-1].value(R) == pytest.approx(through_keep.snapshots[-1].value(R), rel=1e-5)
    ours, theirs = resumed.session.report().step_sizes, through.session.report().step_sizes
    assert ours is not None
    assert theirs is not None
    assert ours.measured == theirs.measured == 4
    assert ours.median == pytest.approx(theirs.median, rel=1e-5)
    assert resumed.session.report().first_loss == pytest.approx(through.session.report().first_loss)


def test_a_checkpoint_is_plain_data(halfway: Path):
    saved = torch.load(halfway, weights_only=True)
    (state,) = [value for key, value in saved["callbacks"].items() if key.startswith("RedlineCallback")]
    assert state["control"]["controllers"] == {"ScaleOnce": {"done": 1}}


@pytest.mark.parametrize("weights_only", [None, True, False])
def test_a_fit_resumes_with_any_way_of_loading(halfway: Path, weights_only: bool | None):
    callback = every_third(keep := Keep())
    trainer(callback, max_epochs=1).fit(
        CallsItself(), data(12, same=True), ckpt_path=halfway, weights_only=weights_only
    )
    assert [snapshot.step for snapshot in keep.snapshots] == [7, 8, 9, 10, 11]


def test_a_checkpoint_resumes_with_other_monitors_and_no_controller(halfway: Path):
    callback = RedlineCallback(monitors=[redline.StepHealth()], sinks=[keep := Keep()], run="resumed")
    trainer(callback, max_epochs=1).fit(CallsItself(), data(12, same=True), ckpt_path=halfway)
    assert [snapshot.step for snapshot in keep.snapshots] == [7, 8, 9, 10, 11]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
def test_a_checkpoint_resumes_without_redline(halfway: Path):
    module = CallsItself()
    trainer(max_epochs=1).fit(module, data(12, same=True), ckpt_path=halfway)
    assert len(module.losses) == 5


def test_a_checkpoint_of_a_run_without_redline_is_fine(tmp_path: Path):
    saving = ModelCheckpoint(tmp_path, filename="plain", every_n_train_steps=7, save_top_k=-1)
    trainer(saving, max_epochs=1, enable_checkpointing=True).fit(CallsItself(), data(12, same=True))
    callback = every_third(keep := Keep())
    trainer(callback, max_epochs=1).fit(CallsItself(), data(12, same=True), ckpt_path=tmp_path / "plain.ckpt")
    assert len(keep.snapshots) == 5


class Validates(CallsItself):
    """Has a validation loop."""

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


def test_a_checkpoint_that_was_only_validated_is_not_where_the_next_fit_goes_on(halfway: Path):
    callback = every_third(keep := Keep())
    trainer(callback).validate(Validates(), data(2), ckpt_path=halfway, verbose=False)
    trainer(callback, max_epochs=1).fit(CallsItself(), data(3))
    assert [snapshot.step for snapshot in keep.snapshots] == [0, 1, 2]
