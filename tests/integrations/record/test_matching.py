"""Which layer is which: by name, by the name within the model, by order of kind; what has no counterpart is said."""

from __future__ import annotations

import pytest

from redline.integrations.record.matching import match_layers

BLOCKS = [f"blocks.{block}.{layer}.weight" for block in range(2) for layer in ("qkv", "out")]


@pytest.mark.parametrize(
    ("first", "second", "pairs", "only_first", "only_second"),
    [
        (BLOCKS, BLOCKS[::-1], [(name, name) for name in BLOCKS], [], []),
        (BLOCKS, [f"net.{name}" for name in BLOCKS], [(name, f"net.{name}") for name in BLOCKS], [], []),
        (
            ["head.weight", *BLOCKS],
            ["model.net.head.weight", *(f"model.net.{name}" for name in BLOCKS)],
            [(name, f"model.net.{name}") for name in ("head.weight", *BLOCKS)],
            [],
            [],
        ),
        (
            ["layers.0.qkv.weight", "layers.1.qkv.weight", "head.weight"],
            ["blocks.4.qkv.weight", "blocks.5.qkv.weight", "blocks.6.qkv.weight", "readout.weight"],
            [("layers.0.qkv.weight", "blocks.4.qkv.weight"), ("layers.1.qkv.weight", "blocks.5.qkv.weight")],
            ["head.weight"],
            ["blocks.6.qkv.weight", "readout.weight"],
        ),
        (
            ["0.weight", "2.weight"],
            ["0.weight", "3.weight"],
            [("0.weight", "0.weight"), ("2.weight", "3.weight")],
            [],
            [],
        ),
        (["a.weight[0]", "a.weight[1]"], ["a.weight[0]"], [("a.weight[0]", "a.weight[0]")], ["a.weight[1]"], []),
        ([], BLOCKS, [], [], BLOCKS),
        (["weight"], ["weight"], [("weight", "weight")], [], []),
    ],
)
def test_matching(
    first: list[str],
    second: list[str],
    pairs: list[tuple[str, str]],
    only_first: list[str],
    only_second: list[str],
):
    found = match_layers(first, second)
    assert list(found.pairs) == pairs
    assert list(found.only_first) == only_first
    assert list(found.only_second) == only_second


@pytest.mark.parametrize("blocks", [1, 3, 30])
def test_each_layer_is_used_once(blocks: int):
    first = [f"blocks.{block}.{layer}.weight" for block in range(blocks) for layer in ("qkv", "out", "up")]
    second = [f"net.layers.{block}.{layer}.weight" for block in range(2 * blocks) for layer in ("out", "up", "gate")]
    found = match_layers(first, second)
    assert len({one for one, _ in found.pairs}) == len(found.pairs) == 2 * blocks
    assert len({other for _, other in found.pairs}) == len(found.pairs)
    assert len(found.pairs) + len(found.only_first) == len(first)
    assert len(found.pairs) + len(found.only_second) == len(second)
    assert all(one.split(".")[-2] == other.split(".")[-2] for one, other in found.pairs)
