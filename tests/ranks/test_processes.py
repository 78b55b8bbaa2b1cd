"""The tests' own way of running several ranks."""

from __future__ import annotations

import pytest
from processes import RankError, on_ranks
from rank_tries import fails, told


@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_rank_answers(size: int):
    assert on_ranks(told, size, 10) == [sum(range(size)) + 10] * size


@pytest.mark.parametrize(
    ("how", "said"),
    [("raise", "rank 1: (.|\n)*of rank 1"), ("die", "rank 1: died"), ("hang", "rank 1: had not ended")],
)
def test_a_rank_that_does_not_end_well_is_told_of(how: str, said: str):
    with pytest.raises(RankError, match=said):
        on_ranks(fails, 2, how, timeout=8)
