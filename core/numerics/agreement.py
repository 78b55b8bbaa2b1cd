"""Several ranks that try the same thing: it has worked on all of them or on none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

Agree = Callable[[bool], bool]
"""Whether what is told is true on all ranks; each of them asks at the same point."""

Total = Callable[[Tensor], Tensor]
"""The sum over all ranks of a tensor of one shape and dtype on each."""


class ElsewhereError(RuntimeError):
    """What this rank was doing has failed on another one."""


def alone(flag: bool) -> bool:
    """What one rank agrees on with itself."""
    return flag


@contextmanager
def in_step(agree: Agree) -> Iterator[None]:
    """What is done in it fails on all ranks or on none.

    Ranks that call :func:`go_on` within it meet there the one that has failed, and those that get to its end meet it
    there: each asks once more after a failure, and none of them is left waiting.

    Raises:
        ElsewhereError: it went well here, and failed on another rank.
    """
    try:
        yield
    except ElsewhereError:
        raise
    except Exception:
        agree(False)
        raise
    go_on(agree)


def go_on(agree: Agree) -> None:
    """All ranks are about to exchange something: they do if none of them has failed.

    Raises:
        ElsewhereError: one of them has.
    """
    if not agree(True):
        raise ElsewhereError("it failed on another rank, which says why in its own notes")


def total_of_run(tensor: Tensor) -> Tensor:
    """The sum over the ranks of the default process group."""
    total = tensor.detach().clone()
    torch.distributed.all_reduce(total)
    return total


def agreed_in_run(flag: bool) -> bool:
    """Whether it is true on all ranks of the default process group; it waits, also for what the device has to do."""
    devices = torch.distributed.distributed_c10d._get_default_group()._device_types
    told = torch.tensor(int(flag), device="cpu" if torch.device("cpu") in devices else devices[0])
    torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MIN)
    return bool(told)
