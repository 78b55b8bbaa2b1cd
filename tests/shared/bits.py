"""Equality bit for bit, of tensors and of the containers they stand in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def frozen(value: Any) -> Any:
    """A copy that compares by bits: tensors as their type and bytes."""
    if isinstance(value, Tensor):
        data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return str(value.dtype), tuple(value.shape), data
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, Mapping):
        return {key: frozen(inner) for key, inner in value.items()}
    return [frozen(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def assert_same_bits(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name in expected if frozen(actual[name]) != frozen(expected[name])] == []
