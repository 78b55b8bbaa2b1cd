"""Lightning over several processes: its strategies are supported, or refused by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import FSDPStrategy
from processes import on_ranks
from rank_lightning import fitted

from redline import ConfigurationError
from redline.integrations.lightning import RedlineCallback


@pytest.mark.parametrize("strategy", ["ddp", "model_parallel"])
def test_its_strategies_clamp_alike(strategy: str):
    first, second = on_ranks(fitted, 2, strategy)
    assert "refused" not in first, first
    assert first["interventions"] == second["interventions"]
    assert [step for _, step, _, _ in first["interventions"]].count(3) == 1
    assert first["r"] == second["r"]
    assert first["notes"] == ()
    assert all(torch.equal(second["weights"][name], one) for name, one in first["weights"].items())
    assert first["run"]["world_size"] == 2


def test_strategies_that_leave_nothing_to_measure_are_refused_by_name():
    trainer: Any = SimpleNamespace(strategy=FSDPStrategy())
    with pytest.raises(ConfigurationError, match=r"got Lightning's FSDPStrategy; .*Use ModelParallelStrategy"):
        RedlineCallback().setup(trainer, LightningModule(), "fit")
