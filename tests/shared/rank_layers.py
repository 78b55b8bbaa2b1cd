"""Layers' sizes over ranks: random radii, dealt out in uneven parts."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from redline.layer_sizes import layer_sizes
from redline.numerics.layer_recorder import LayerSteps
from redline.ranks import Ranks

CASES = 24
Told = tuple[dict[str, float], dict[str, float]]


def drawn(case: int, size: int) -> tuple[float, list[LayerSteps]]:
    """A quantile, and what each rank has seen: some layers on some ranks only, some radii infinite, NaN or tied."""
    generator = torch.Generator().manual_seed(case)

    def integer(most: int) -> int:
        return int(torch.randint(most, (), generator=generator))

    quantile = [0.01, 0.1, 0.5, 1.0][integer(4)]
    ranks = [LayerSteps() for _ in range(size)]
    for layer in range(3):
        for rank in ranks:
            if integer(4) == 0 and rank is not ranks[0]:
                continue
            rank.attention[f"attention{layer}"] = torch.rand((), generator=generator)
            radii = torch.rand(1 + integer(300), generator=generator) * 10 ** integer(3)
            if integer(5) == 0:
                radii[0] = [torch.inf, torch.nan, 0.0][integer(3)]
            rank.activation_radii[f"activation{layer}"] = radii.round(decimals=integer(4) + 1)
    return quantile, ranks


def joined(ranks: list[LayerSteps]) -> LayerSteps:
    """What one process would have seen of all samples."""
    names = {name for one in ranks for name in one.attention}
    attention = {name: torch.stack([one.attention[name] for one in ranks if name in one.attention]) for name in names}
    names = {name for one in ranks for name in one.activation_radii}
    radii = {
        name: torch.cat([one.activation_radii[name] for one in ranks if name in one.activation_radii]) for name in names
    }
    return LayerSteps({name: sizes.amax() for name, sizes in attention.items()}, radii)


def told(of: tuple[dict[str, Tensor], dict[str, Tensor]]) -> Told:
    attention, activation = of
    return {k: float(v) for k, v in attention.items()}, {k: float(v) for k, v in activation.items()}


def together(rank: int) -> tuple[list[Told], bool]:
    """Every case on these ranks; and whether nothing is told where one rank has seen nothing at all."""
    ranks = Ranks(rank, dist.get_world_size())
    found = []
    for case in range(CASES):
        quantile, seen = drawn(case, ranks.size)
        sizes = layer_sizes(seen[rank], quantile, ranks, torch.zeros(()))
        assert sizes is not None
        found.append(told(sizes))
    return found, layer_sizes(LayerSteps() if rank else None, 0.5, ranks, torch.zeros(())) is None
