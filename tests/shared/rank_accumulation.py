"""Gradient accumulation on several ranks: ``no_sync`` for all micro-batches but the last."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from technique_runs import Blocks, R, batch, every_step, reference, sgd
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import redline

STEPS, MICRO_BATCHES = 3, 2


def accumulated(rank: int, watched: bool) -> tuple[list[Tensor], list[float], list[float]]:
    """The parameters in the end; r of each step as measured, and of this rank's last micro-batch by the Jacobian."""
    torch.manual_seed(0)
    model = Blocks(dropout=0.0)
    parallel, optimizer = DistributedDataParallel(model), sgd(model)
    measured: list[float] = []
    expected: list[float] = []
    session = redline.attach(parallel, optimizer, monitors=every_step()) if watched else None
    for step in range(STEPS):
        before = copy.deepcopy(model)
        for place in range(MICRO_BATCHES):
            x, y = batch(100 * rank + 10 * step + place)
            with nullcontext() if place == MICRO_BATCHES - 1 else parallel.no_sync():
                F.cross_entropy(parallel(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if session is not None:
            measured.append(session.latest.value(R))
            expected.append(reference(before, model, x))
    if session is not None:
        assert session.notes == ()
        session.close()
    return [parameter.detach() for parameter in model.parameters()], measured, expected
