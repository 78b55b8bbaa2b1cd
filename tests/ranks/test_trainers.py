"""Fabric, accelerate and Hugging Face's Trainer over several processes: their runs are those of a plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import on_ranks

pytest.importorskip("accelerate")
pytest.importorskip("transformers")
from rank_trainers import SPIKE, clamped


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(clamped, 2, "by hand", str(tmp_path_factory.mktemp("by_hand")))


@pytest.mark.parametrize(
    ("trainer", "strategy"),
    [("fabric", "DDPStrategy"), ("accelerate", "multi_cpu"), ("huggingface", "multi_cpu")],
)
def test_a_clamped_run_is_that_of_a_loop_by_hand(
    trainer: str, strategy: str, by_hand: list[dict[str, Any]], tmp_path: Path
):
    told = on_ranks(clamped, 2, trainer, str(tmp_path))
    first, second = told
    assert first["acted"] == second["acted"] == by_hand[0]["acted"]
    assert [step for _, step, _ in first["acted"]].count(SPIKE) == 1
    assert first["saw"] == second["saw"]
    assert all(torch.equal(second["weights"][name], one) for name, one in first["weights"].items())
    for name, one in by_hand[0]["weights"].items():
        torch.testing.assert_close(first["weights"][name], one, rtol=1e-4, atol=1e-6)
    for mine, theirs in zip(told, by_hand, strict=True):
        assert mine["r"] == pytest.approx(theirs["r"], rel=1e-4)
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert mine["notes"] == ()
        assert (mine["strategy"], mine["world_size"]) == (strategy, 2)
