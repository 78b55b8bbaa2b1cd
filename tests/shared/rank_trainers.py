"""The training of ``rank_training`` over DDP, driven by Fabric, accelerate and Hugging Face's Trainer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rank_training import batches, model, optimizer_of, train, whole
from torch import Tensor, nn

import redline
from redline import GhostRadius, StepClamp, StepHealth

# Trainers are imported where they drive: each takes seconds, on every rank.

STEPS, SPIKE, RATE = 5, 3, 0.01


def clamped(rank: int, trainer: str, folder: str) -> dict[str, Any]:
    """A run of five steps, of which one is 300 times too long: what it came to."""
    size = dist.get_world_size()
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size), GROUP_RANK="0",
        MASTER_ADDR="127.0.0.1", MASTER_PORT="0", TORCHELASTIC_RUN_ID="test",
    )  # fmt: skip
    drivers: dict[str, Callable[[Path], tuple[redline.Session, nn.Module]]] = {
        "by hand": _by_hand,
        "fabric": _by_fabric,
        "accelerate": _by_accelerate,
        "huggingface": _by_trainer,
    }
    session, net = drivers[trainer](Path(folder))
    return {
        "weights": {name.removeprefix("net."): one for name, one in whole(net).items()},
        "acted": [(one.controller, one.step, one.action) for one in session.interventions],
        "saw": [dict(one.saw) for one in session.interventions],
        "r": session.latest.value("redline_normalized_step_size"),
        "loss": session.latest.value("redline_loss"),
        "strategy": session.latest.run.strategy,
        "world_size": session.latest.run.world_size,
        "notes": session.notes,
    }


def _watching() -> dict[str, Any]:
    return {
        "monitors": [GhostRadius(1, max_samples=None), StepHealth()],
        "controllers": [StepClamp(0.5, max_samples=None)],
    }


def _rate(step: int) -> float:
    return RATE * (300.0 if step == SPIKE else 1.0)


def _mine() -> Iterator[tuple[Tensor, Tensor]]:
    return batches(STEPS, dist.get_rank(), dist.get_world_size())


def _by_hand(folder: Path) -> tuple[redline.Session, nn.Module]:
    return train("ddp", STEPS, spike=lambda step: _rate(step) / RATE, **_watching())


def _loop(session: redline.Session, net: nn.Module, optimizer: Any, backward: Callable[[Tensor], None]) -> None:
    for step, (tokens, targets) in enumerate(_mine()):
        optimizer.param_groups[0]["lr"] = _rate(step)
        loss = F.cross_entropy(net(tokens).flatten(0, 1), targets.flatten())
        session.observe(loss=loss)
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()


def _by_fabric(folder: Path) -> tuple[redline.Session, nn.Module]:
    from lightning.fabric import Fabric
    from lightning.fabric.plugins.environments import TorchElasticEnvironment
    from lightning.fabric.strategies import DDPStrategy

    from redline.integrations.fabric import attach

    strategy = DDPStrategy(process_group_backend="gloo", cluster_environment=TorchElasticEnvironment())
    driver = Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy=strategy)
    driver.launch()
    raw = model()
    net, optimizer = driver.setup(raw, optimizer_of(raw))
    with attach(driver, net, optimizer, **_watching()) as session:
        _loop(session, net, optimizer, driver.backward)
    return session, raw


def _by_accelerate(folder: Path) -> tuple[redline.Session, nn.Module]:
    from accelerate import Accelerator

    from redline.integrations.accelerate import attach

    driver = Accelerator(cpu=True)
    raw = model()
    net, optimizer = driver.prepare(raw, optimizer_of(raw))
    with attach(driver, net, optimizer, **_watching()) as session:
        _loop(session, net, optimizer, driver.backward)
    return session, raw


class _Causal(nn.Module):
    """The model as the Trainer calls it: its loss comes with its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = model()

    def forward(self, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(tokens)
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def _by_trainer(folder: Path) -> tuple[redline.Session, nn.Module]:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from redline.integrations.huggingface import RedlineTrainerCallback

    class Rates(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, *, optimizer: Any, **kwargs: Any) -> None:
            optimizer.param_groups[0]["lr"] = _rate(state.global_step)

    class OwnBatches(Trainer):
        """Each rank's part as ``batches`` deals it, in place of the Trainer's own sampler."""

        def get_train_dataloader(self) -> Any:
            mine = [{"tokens": tokens, "labels": labels} for tokens, labels in _mine()]
            return torch.utils.data.DataLoader(mine, batch_size=None)

    raw = _Causal()
    watching = RedlineTrainerCallback(**_watching())
    arguments = TrainingArguments(
        str(folder), max_steps=STEPS, use_cpu=True, max_grad_norm=0.0, lr_scheduler_type="constant", report_to=[],
        save_strategy="no", disable_tqdm=True, logging_strategy="no", ddp_backend="gloo",
    )  # fmt: skip
    trainer = OwnBatches(
        raw, arguments, train_dataset=[0] * STEPS, callbacks=[Rates(), watching], optimizers=(optimizer_of(raw), None)
    )
    trainer.train()
    assert watching.session is not None
    return watching.session, raw
