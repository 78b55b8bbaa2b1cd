"""Sizes of attention and activations over the samples of all ranks, against those of one process."""

from __future__ import annotations

import pytest
import torch
from processes import on_ranks
from rank_layers import CASES, drawn, joined, together, told

from redline.layer_sizes import layer_sizes
from redline.ranks import Ranks


@pytest.mark.parametrize("size", [2, 3])
def test_they_are_those_of_one_process(size: int):
    (first, nothing), *others = on_ranks(together, size)
    assert nothing, "where one rank has seen nothing, none is told anything"
    assert str(others) == str([(first, nothing)] * (size - 1))
    for case in range(CASES):
        quantile, ranks = drawn(case, size)
        sizes = layer_sizes(joined(ranks), quantile, Ranks(), torch.zeros(()))
        assert sizes is not None
        for found, expected in zip(first[case], told(sizes), strict=True):
            assert found == pytest.approx(expected, rel=1e-6, nan_ok=True)
