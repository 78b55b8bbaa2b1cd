"""Gradient accumulation on several ranks: ``no_sync`` for all micro-batches but the last."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from technique_runs import Blocks, R, batch, every_step, reference, sgd
from torch.nn.parallel import DistributedDataParallel

import redline

STEPS, MICRO_BATCHES = 3, 2


def accumulated(rank: int) -> tuple[list[float], list[float], list[float], list[float]]:
    """The parameters in the end, with and without Redline.

    And r of each step as measured, and of this rank's last micro-batch by the Jacobian.
    """
    measured: list[float] = []
    expected: list[float] = []
    ends = [_train(rank, watched, measured, expected) for watched in (True, False)]
    # Numbers: a tensor goes as a handle to memory of this process, which may end before it is opened.
    return ends[0].tolist(), ends[1].tolist(), measured, expected


def _train(rank: int, watched: bool, measured: list[float], expected: list[float]) -> torch.Tensor:
    torch.manual_seed(0)
    model = Blocks(dropout=0.0)
    parallel, optimizer = DistributedDataParallel(model), sgd(model)
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
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()
