"""``no_sync`` on two ranks."""

from __future__ import annotations

import pytest
from processes import on_ranks
from rank_accumulation import accumulated


def test_ranks_that_accumulate_agree_and_r_is_of_their_last_micro_batches() -> None:
    answers = on_ranks(accumulated, 2)
    for watched, alone, _, _ in answers:
        assert watched == alone
        assert watched == answers[0][0], "on every rank"
    # The largest: it is the same whether each rank tells its own r, or all tell that of all.
    measured, expected = (
        [max(of_step) for of_step in zip(*(answer[place] for answer in answers), strict=True)] for place in (2, 3)
    )
    assert measured == pytest.approx(expected, rel=1e-4)
