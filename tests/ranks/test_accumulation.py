"""``no_sync`` on two ranks."""

from __future__ import annotations

import pytest
import torch
from processes import on_ranks
from rank_accumulation import accumulated


def test_ranks_that_accumulate_agree_and_r_is_of_their_last_micro_batches() -> None:
    alone = on_ranks(accumulated, 2, False)
    watched = on_ranks(accumulated, 2, True)
    for (parameters, _, _), (unwatched, _, _) in zip(watched, alone, strict=True):
        assert all(torch.equal(*pair) for pair in zip(parameters, unwatched, strict=True))
        assert all(torch.equal(*pair) for pair in zip(parameters, watched[0][0], strict=True))
    measured = [max(of_step) for of_step in zip(*(r for _, r, _ in watched), strict=True)]
    expected = [max(of_step) for of_step in zip(*(r for _, _, r in watched), strict=True)]
    assert measured == pytest.approx(expected, rel=1e-4)
