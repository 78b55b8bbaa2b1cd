"""Lightning over several processes: its strategies are supported, or refused by name."""

from __future__ import annotations

import torch
from processes import on_ranks
from rank_lightning import fitted


def test_ddp_clamps_alike():
    first, second = on_ranks(fitted, 2, "ddp")
    assert "refused" not in first, first
    assert first["interventions"] == second["interventions"]
    assert [step for _, step, _, _ in first["interventions"]].count(3) == 1
    assert first["r"] == second["r"]
    assert first["notes"] == ()
    assert all(torch.equal(second["weights"][name], one) for name, one in first["weights"].items())
    assert first["run"]["world_size"] == 2
