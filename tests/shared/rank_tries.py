"""Ranks that do well, raise, die and hang, to see that the tests notice."""

import os
import time

import torch
import torch.distributed as dist


def told(rank: int, more: int) -> float:
    """The sum over ranks, and a number more."""
    total = torch.tensor(float(rank))
    dist.all_reduce(total)
    return total.item() + more


def fails(rank: int, how: str) -> None:
    """Only rank 1."""
    if rank == 1 and how == "raise":
        raise ValueError("of rank 1")
    if rank == 1 and how == "die":
        os._exit(3)
    if rank == 1 and how == "hang":
        time.sleep(600)
