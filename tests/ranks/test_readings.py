"""What is read on several ranks is what one process reads of the same global batch."""

from __future__ import annotations

import pytest
from processes import on_ranks
from rank_training import readings

OF_THE_MACHINE = ("redline_run_info", "redline_last_step_timestamp_seconds", "redline_overhead_ratio")


@pytest.fixture(scope="module")
def alone() -> dict[tuple[str, ...], float]:
    found = readings(0, "alone")
    assert len(found) > 100
    return found


@pytest.mark.parametrize(("how", "size"), [("ddp", 2), ("ddp", 4), ("fsdp", 2), ("fsdp", 4), ("hsdp", 4), ("tp", 2)])
def test_every_reading_of_the_first_step_is_that_of_a_single_process(
    alone: dict[tuple[str, ...], float], how: str, size: int
):
    for told in on_ranks(readings, size, how):
        assert told.keys() >= alone.keys()
        for key, value in alone.items():
            if key[0] == "redline_batch_samples" or key[0] == "redline_tangent_samples":
                assert told[key] == value * (size if how == "tp" else 1), "counted on each rank"
            elif key[0] not in OF_THE_MACHINE:
                # A residual tells how far the iteration went, from vectors of its own: nothing of the model.
                bounds = {"abs": 2e-3} if key[0].endswith("_residual") else {"rel": 1e-4}
                assert told[key] == pytest.approx(value, **bounds), key
