"""Lightning over several processes: its strategies are supported, or refused by name."""

from __future__ import annotations

import pytest
import torch
from processes import on_ranks
from rank_lightning import fitted


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


def test_flat_parameters_are_refused_by_name():
    for told in on_ranks(fitted, 2, "fsdp"):
        assert "ConfigurationError: got FullyShardedDataParallel" in told["refused"]
