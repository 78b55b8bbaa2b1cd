"""What simulated ranks send one another for top singular values: how many messages, of how many numbers."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from simulated_ranks import Ranks, parts_of, the_same
from spectral_matrices import gaussian, watched_and_unwatched

from redline.numerics import sharded_spectra
from redline.numerics.sharded_spectra import MatrixShard

BLOCK = 6  # rank + 2


def formula(shards: Sequence[MatrixShard], rounds: Sequence[int], watched: bool) -> tuple[int, int]:
    """Messages and numbers sent, as the module's docstring says."""
    messages, numbers = 0, 0
    for one, r in zip(shards, rounds, strict=True):
        (m, n), both = one.shape, one.split == "both"
        told = max(1, r - 1) if watched else 1
        if not both and one.side <= 128:
            messages, numbers = max(messages, 2), numbers + one.side * (one.side + 1) // 2 + 4
            continue
        messages = max(messages, r * (1 + both) + told)
        numbers += min(r * BLOCK, one.side) * (m + n if both else one.side) + 4 * told
    return messages, numbers


@watched_and_unwatched
@pytest.mark.parametrize(
    ("ways", "dtype"),
    [
        (["rows"], torch.float32),
        (["rows", "blocks", "columns"], torch.float32),
        (["terms"], torch.float32),
        (["columns"], torch.float64),
        (["rows"], torch.bfloat16),
    ],
)
def test_what_is_sent_is_what_the_docstring_says(ways: list[str], dtype: torch.dtype, watched: bool) -> None:
    shapes = [(200, 150), (140, 300), (500, 40), (20, 160)]
    shards = [parts_of(gaussian(*shape, seed=k).to(dtype), how) for how in ways for k, shape in enumerate(shapes)]
    ranks = Ranks(4)
    estimates = ranks.measure(shards, watched=watched)
    rounds = [int(passes) // 2 for passes in the_same(estimates).passes]
    messages, numbers = formula([one[0] for one in shards], rounds, watched)
    assert len(ranks.messages) == messages
    assert sum(one.numel() for one in ranks.messages) == numbers
    assert {one.dtype for one in ranks.messages} == {torch.float64 if dtype == torch.float64 else torch.float32}
    if not watched:
        assert max(rounds) == 16
    warm = Ranks(4)
    warm.measure(shards, [one.state for one in estimates], watched=watched)
    assert len(warm.messages) < len(ranks.messages)


def test_small_matrices_alone_take_two_messages() -> None:
    ranks = Ranks(4)
    ranks.measure([parts_of(gaussian(500, 100), "rows"), parts_of(gaussian(20, 300), "columns")])
    assert [one.numel() for one in ranks.messages] == [100 * 101 // 2 + 20 * 21 // 2, 2 * 4]


def test_what_would_hold_too_much_at_once_takes_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    shards = [parts_of(gaussian(200, 140, k), "rows") for k in range(4)]
    at_once, in_turns = Ranks(4), Ranks(4)
    together = at_once.measure(shards, watched=False)
    monkeypatch.setattr(sharded_spectra, "_AT_ONCE", 2 * 2 * 140 * 16 * BLOCK)  # two of them
    apart = in_turns.measure(shards, watched=False)
    assert torch.equal(the_same(together).sigma, the_same(apart).sigma)
    assert len(in_turns.messages) == 2 * len(at_once.messages)
    assert max(one.numel() for one in in_turns.messages) == max(one.numel() for one in at_once.messages) / 2
