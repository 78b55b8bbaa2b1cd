"""Which layer of one run is which of another."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Matching:
    """The layers of two runs.

    Attributes:
        pairs: name in the first, name in the second; in the first's order.
        only_first, only_second: what has no counterpart.
    """

    pairs: tuple[tuple[str, str], ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]


def match_layers(first: Sequence[str], second: Sequence[str]) -> Matching:
    """Match layers by name, then by the name without what all names of a run begin with, then by order of kind.

    The kind is what stands behind the last number in a name: ``qkv.weight`` of ``blocks.3.qkv.weight``; of a name
    without a number, all of it.
    """
    pairs: dict[str, str] = {}
    free_first, free_second = list(first), list(second)
    shorter = _without_prefix(first), _without_prefix(second)
    for names in (
        ({name: name for name in first}, {name: name for name in second}),
        shorter,
    ):
        places = {names[1][name]: name for name in reversed(free_second)}
        for name in list(free_first):
            other = places.get(names[0][name])
            if other is not None and other in free_second:
                pairs[name] = other
                free_first.remove(name)
                free_second.remove(other)
    for name in list(free_first):
        other = next((one for one in free_second if _kind(shorter[1][one]) == _kind(shorter[0][name])), None)
        if other is not None:
            pairs[name] = other
            free_first.remove(name)
            free_second.remove(other)
    return Matching(
        tuple((name, pairs[name]) for name in first if name in pairs), tuple(free_first), tuple(free_second)
    )


def _without_prefix(names: Sequence[str]) -> dict[str, str]:
    """Each name, and what it is without the modules that all of them lie in, such as ``net.``."""
    split = [name.split(".") for name in names]
    common = 0
    while split and all(len(parts) > common + 2 and parts[common] == split[0][common] for parts in split):
        common += 1
    return {name: ".".join(parts[common:]) for name, parts in zip(names, split, strict=True)}


def _kind(name: str) -> str:
    return re.split(r"(?:^|\.)\d+\.", name)[-1].partition("[")[0]
