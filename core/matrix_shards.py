"""Which part of a matrix this rank holds, and norms over all of the parts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from redline.numerics.sharded_spectra import MatrixShard
from redline.sharding import Layout, Sharding, is_sharded, together

if TYPE_CHECKING:
    from redline.parameters import MatrixLayer

Split: TypeAlias = Literal["rows", "columns", "both"]


def why_unmeasurable(tensor: Tensor) -> str | None:
    """What of a DTensor's placements keeps its matrices from being measured by their parts, or None."""
    given: Any = tensor
    placements = list(zip(given.placements, given.device_mesh.shape, strict=True)) if is_sharded(tensor) else []
    for place, (placement, _) in enumerate(placements):
        if placement.is_partial() and placement.reduce_op not in ("sum", "avg"):
            return f"is placed as {placement!r}, which is no sum"
        if (nested := getattr(placement, "split_factor", None)) is not None:  # rows that later placements divided first
            later = [size for other, size in placements[place + 1 :] if getattr(other, "dim", None) == placement.dim]
            if math.prod(later) != nested:
                return f"is placed as {placement!r} over parts that are not divided any more"
    return None


def split_of(layer: MatrixLayer, sharding: Sharding | None) -> Split | None:
    """What of a matrix some ranks hold others of than others; None where they hold all of it, or nothing.

    Which columns they are follows from the dimension of the parameter: any, for a kernel, may be divided.
    """
    if sharding is None:
        return None
    rows, columns = (any(map(sharding.splits, side)) for side in _sides(layer, sharding.shape))
    if sharding.has_terms or (rows and columns):
        return "both"
    return "rows" if rows else "columns" if columns else None


def block_of(layer: MatrixLayer, part: Tensor, sharding: Sharding | None) -> Tensor:
    """What this rank holds of a matrix, ``(rows, columns)``, maybe empty.

    Args:
        layer: of the matrix.
        part: this rank's part of the parameter, or of what lies as the parameter does.
        sharding: of the parameter, or None where each rank holds all of it.
    """
    if sharding is None:
        return layer.of(part)
    rows, columns = (math.prod(part.shape[d] for d in side) for side in _sides(layer, sharding.shape))
    block = part.detach()
    if layer.index is not None:
        place = [int(at) for at in torch.unravel_index(torch.tensor(layer.index), layer.stack)]
        here = [at - first for at, (first, _) in zip(place, sharding.places, strict=False)]
        held = all(0 <= at < count for at, count in zip(here, part.shape, strict=False))
        block = block[tuple(here)] if held else block.new_zeros(0)
    elif layer.transposed:
        block = block.transpose(0, 1)
    if block.numel() == 0:  # of the sides that are not divided it has the length all the same
        return block.new_zeros((rows, 0) if split_of(layer, sharding) == "columns" else (0, columns))
    return block.reshape(rows, columns)


def matrix_shard(layer: MatrixLayer, part: Tensor, sharding: Sharding) -> MatrixShard:
    """This rank's part of a matrix that is split."""
    split = split_of(layer, sharding)
    if split is None:
        raise ValueError(f"got {layer.name}, which no rank holds a part of; expected a matrix that is split")
    means = (
        size
        for placement, size in zip(sharding.placements, sharding.mesh.shape, strict=True)
        if placement.is_partial() and placement.reduce_op == "avg"  # type: ignore[attr-defined]
    )
    block, share = block_of(layer, part, sharding), sharding.share / math.prod(means)
    shape = (layer.d_out, layer.d_in)
    if split != "both":
        return MatrixShard(block, shape, split, share=share)
    first_row, first_column = (_first(side, part.shape, sharding) for side in _sides(layer, sharding.shape))
    return MatrixShard(block, shape, split, first_row, first_column, share)


def frobenius_norms(layers: Sequence[MatrixLayer], tensors: Mapping[str, Tensor], layout: Layout) -> Tensor:
    """Frobenius norm of each matrix, ``(n,)``: on several ranks in float64, by one message.

    On one device in float32, or float64 if one of them is.

    Args:
        layers: which.
        tensors: by the name of the parameter, this rank's parts of what lies as the parameters do.
        layout: of the parameters.
    """
    settled = {name: _without_terms(tensors[name], layout.shardings.get(name)) for name in _parameters(layers)}
    dtype = torch.float64 if any(part.dtype == torch.float64 for part, _ in settled.values()) else torch.float32
    norms = together(
        torch.linalg.vector_norm(block_of(layer, *settled[layer.parameter]), dtype=dtype) for layer in layers
    )
    if layout.ranks.size == 1:
        return norms
    everywhere = 1 / layout.ranks.size
    lies = [settled[layer.parameter][1] for layer in layers]
    shares = torch.tensor([everywhere if one is None else one.share for one in lies], dtype=torch.float64)
    return layout.ranks.total(shares.to(norms.device, non_blocking=True) * norms.double().square()).sqrt()


def _parameters(layers: Sequence[MatrixLayer]) -> list[str]:
    return list(dict.fromkeys(layer.parameter for layer in layers))


def _without_terms(part: Tensor, sharding: Sharding | None) -> tuple[Tensor, Sharding | None]:
    """The part, and how it lies, after terms of a sum have been exchanged for parts of it."""
    if sharding is None or not sharding.has_terms:
        return part, sharding
    return sharding.summed(part), sharding.without_terms


def _sides(layer: MatrixLayer, shape: Sequence[int]) -> tuple[list[int], list[int]]:
    """The dimensions of a parameter that a matrix's rows and columns are made of; those of 1 are of neither."""
    dimensions = list(range(len(layer.stack), len(shape)))
    if layer.transposed:
        dimensions[:2] = 1, 0
    dimensions = [d for d in dimensions if shape[d] != 1]
    rows = 0
    while math.prod(shape[d] for d in dimensions[:rows]) < layer.d_out:
        rows += 1
    return dimensions[:rows], dimensions[rows:]


def _first(side: Sequence[int], counts: Sequence[int], sharding: Sharding) -> int:
    """Where a block begins on a side that several dimensions make up.

    They are reordered where it takes that to make the block's places follow one another, on every rank alike: singular
    values know no order.
    """
    first = 0
    for k, d in enumerate(side):
        inner = math.prod(counts[before] for before in side[:k]) * math.prod(sharding.shape[d] for d in side[k + 1 :])
        first += sharding.places[d][0] * inner
    return first
