"""Controllers together in Lightning, made by hand or built from a configuration's plain values."""

from __future__ import annotations

import importlib
import inspect
import json
import typing
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from bits import frozen
from composition_runs import Run, batch
from lightning_runs import QUIET
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset
from weight_decay_runs import BODY, HEAD, IN_FORCE, Net, adamw, muon_and_adamw

import redline
from redline import RadiusLR, StepClamp, UpdateClamp, WeightDecayControl
from redline.integrations.lightning import RedlineCallback

pytestmark = QUIET


class Task(pl.LightningModule):
    """The same by automatic optimization; the batch is that of the global step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Net()

    def training_step(self, _: Any) -> Tensor:
        x, y = batch(self.trainer.global_step)
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return adamw(self.net)[0]


class Manual(Task):
    """Muon beside AdamW, by manual optimization: a joint step is two of Lightning's."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, _: Any) -> None:
        x, y = batch(self.trainer.global_step // 2)
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self.net(x), y))
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return muon_and_adamw(self.net)


def in_lightning() -> list[redline.Controller]:
    """With the layers' names in a LightningModule."""
    target = {f"net.{BODY}": 1.3, f"net.{HEAD}": 0.8}
    return [UpdateClamp(0.02), WeightDecayControl(target, every=2, horizon=20), RadiusLR(0.5), StepClamp(0.02)]


def fit(task: Task, callback: RedlineCallback, steps: int) -> None:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps * (2 if isinstance(task, Manual) else 1),
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, DataLoader(TensorDataset(torch.zeros(steps, 1))))


@pytest.mark.parametrize(("task", "optimizers"), [(Task, adamw), (Manual, muon_and_adamw)])
def test_a_fit_is_the_plain_loop_to_the_bit(
    task: type[Task], optimizers: Callable[[nn.Module], list[Optimizer]]
) -> None:
    run = Run(optimizers)
    plain = [UpdateClamp(0.02), WeightDecayControl({BODY: 1.3, HEAD: 0.8}, every=2, horizon=20)]
    with run.attach(*plain, RadiusLR(0.5), StepClamp(0.02)) as session:
        run.steps(0, 7)
    module, callback = task(), RedlineCallback(monitors=[], controllers=in_lightning())
    fit(module, callback, 7)
    assert frozen(dict(module.net.state_dict())) == frozen(dict(run.model.state_dict()))
    assert callback.session is not None
    assert {one.controller for one in callback.session.interventions} == {
        "UpdateClamp",
        "WeightDecayControl",
        "RadiusLR",
        "StepClamp",
    }
    assert [(one.step, one.controller, frozen(dict(one.saw))) for one in callback.session.interventions] == [
        (one.step, one.controller, frozen(dict(one.saw))) for one in session.interventions
    ]
    found = callback.session.latest.layers(IN_FORCE)
    assert {name.removeprefix("net."): value for name, value in found.items()} == session.latest.layers(IN_FORCE)


CONFIG = """
{"class_path": "redline.integrations.lightning.RedlineCallback", "init_args": {"monitors": [], "controllers": [
  {"class_path": "redline.UpdateClamp", "init_args": {"limit": 0.02, "relative_to": "weight"}},
  {"class_path": "redline.WeightDecayControl", "init_args":
      {"target": {"net.body.weight": 1.3, "net.head.weight": 0.8}, "freeze_at": 0, "every": 2, "horizon": 20,
       "bounds": [0, 10]}},
  {"class_path": "redline.RadiusLR", "init_args":
      {"r": 0.5, "max_update_to_weight": 0.3, "max_growth": 1.02, "reduction": "max", "max_samples": 32}},
  {"class_path": "redline.StepClamp", "init_args": {"max_r": 0.02, "reduction": 1, "max_samples": null}}]}}
"""


def built(config: Any) -> Any:
    """As LightningCLI does it: plain values all the way down, classes by path."""
    if isinstance(config, list):
        return [built(one) for one in config]
    if isinstance(config, dict) and "class_path" in config:
        module, _, name = config["class_path"].rpartition(".")
        arguments = {key: built(value) for key, value in config.get("init_args", {}).items()}
        return getattr(importlib.import_module(module), name)(**arguments)
    return config


def test_they_can_be_built_from_plain_values() -> None:
    by_hand, by_config = Task(), Task()
    fit(by_hand, RedlineCallback(monitors=[], controllers=in_lightning()), 5)
    fit(by_config, built(json.loads(CONFIG)), 5)
    assert frozen(dict(by_config.state_dict())) == frozen(dict(by_hand.state_dict()))


PLAIN = {int, float, bool, str, type(None)}


def is_plain(hint: Any) -> bool:
    """Whether a configuration file can hold a value of this type."""
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return all(type(value) in PLAIN for value in typing.get_args(hint))
    return hint in PLAIN if origin is None else all(is_plain(one) for one in typing.get_args(hint))


@pytest.mark.parametrize("kind", [UpdateClamp, WeightDecayControl, RadiusLR, StepClamp])
def test_their_arguments_are_typed_and_plain(kind: type) -> None:
    hints = typing.get_type_hints(kind.__init__)
    hints.pop("return")
    assert hints.keys() == inspect.signature(kind).parameters.keys()
    assert all(is_plain(hint) for hint in hints.values()), hints
