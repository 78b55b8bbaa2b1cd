"""Lightning's strategies over several processes, with the callback attached."""

from __future__ import annotations

import os
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from rank_training import batches, model, whole
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from redline import GhostRadius, StepClamp, StepHealth, UpdateSpectrum, WeightSpectrum
from redline.integrations.lightning import RedlineCallback


class Task(pl.LightningModule):
    """The tiny language model; its rate is 300 times too high at one step."""

    def __init__(self, sharded: bool) -> None:
        super().__init__()
        self.net, self.sharded = model(), sharded

    def configure_model(self) -> None:
        if self.sharded:
            mesh = self.device_mesh["data_parallel"]
            for block in self.net.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self.net, mesh=mesh)
            self.sharded = False

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        tokens, targets = batch
        self.optimizers().param_groups[0]["lr"] = 3.0 if index == 3 else 0.01
        return F.cross_entropy(self.net(tokens).flatten(0, 1), targets.flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 0.01, weight_decay=0.1)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(list(batches(6, dist.get_rank(), dist.get_world_size())), batch_size=None)


def fitted(rank: int, strategy: str) -> dict[str, Any]:
    """A fit of six steps under a strategy; what it came to, or what the callback had against it."""
    size = dist.get_world_size()
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size), GROUP_RANK="0",
        MASTER_ADDR="127.0.0.1", MASTER_PORT="0", TORCHELASTIC_RUN_ID="test",
    )  # fmt: skip
    made: dict[str, Any] = {
        "ddp": lambda: DDPStrategy(process_group_backend="gloo", cluster_environment=TorchElasticEnvironment()),
        "model_parallel": lambda: ModelParallelStrategy(data_parallel_size=size, tensor_parallel_size=1),
    }
    callback = RedlineCallback(
        monitors=[WeightSpectrum(1), UpdateSpectrum(1), GhostRadius(1, max_samples=None), StepHealth()],
        controllers=[StepClamp(0.5, max_samples=None)],
        module="net",
    )
    task = Task(strategy == "model_parallel")
    trainer = pl.Trainer(
        strategy=made[strategy](), accelerator="cpu", devices=size, max_epochs=1, logger=False, callbacks=[callback],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, barebones=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    try:
        trainer.fit(task)
    except Exception as error:  # noqa: BLE001 the test looks at what was said
        return {"refused": f"{type(error).__name__}: {error}"}
    session = callback.session
    assert session is not None
    return {
        "weights": whole(task.net),
        "interventions": [(one.controller, one.step, one.action, dict(one.saw)) for one in session.interventions],
        "r": session.latest.value("redline_normalized_step_size"),
        "notes": session.notes,
        "run": vars(session.latest.run) if hasattr(session.latest.run, "__dict__") else session.latest.run._asdict(),
    }
