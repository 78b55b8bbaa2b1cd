"""Running a function on several ranks: real processes that meet over gloo, and none that outlives its test."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_START = multiprocessing.get_context("forkserver")  # its children have torch at hand, but none of its threads
_START.set_forkserver_preload(["torch", "torch.distributed.fsdp", "redline"])


class RankError(AssertionError):
    """What a rank raised, or that it did not end in time."""


def on_ranks(function: Callable[..., Any], size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """What ``function(rank, *args)`` returns on each of ``size`` ranks of one gloo process group.

    Args:
        function: of a module in ``tests/shared``, which the processes import by its name.
        size: how many.
        args: anything that can be pickled; so must be what comes back.
        timeout: in seconds; whoever has not ended by then is killed.

    Raises:
        RankError: a rank raised, died or hung; with the tracebacks of all that spoke.
    """
    with tempfile.TemporaryDirectory() as folder:
        ends = [_START.Pipe(duplex=False) for _ in range(size)]
        processes = [
            _START.Process(target=_run, args=(rank, size, folder, ends[rank][1], function, args), daemon=True)
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        for _, theirs in ends:
            theirs.close()
        try:
            answers = _gather([ours for ours, _ in ends], time.monotonic() + timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()
    failures = [f"rank {rank}: {said}" for rank, (ended, said) in enumerate(answers) if not ended]
    if failures:
        raise RankError("\n".join(failures))
    return [said for _, said in answers]


def _gather(ends: list[Connection], until: float) -> list[tuple[bool, Any]]:
    answers: dict[int, tuple[bool, Any]] = {}
    while len(answers) < len(ends) and (left := until - time.monotonic()) > 0:
        waiting = [end for rank, end in enumerate(ends) if rank not in answers]
        for end in wait(waiting, left):
            rank = next(rank for rank, one in enumerate(ends) if one is end)
            try:
                answers[rank] = pickle.loads(end.recv_bytes())
            except EOFError:
                answers[rank] = False, "died without a word"
    return [answers.get(rank, (False, "had not ended in time")) for rank in range(len(ends))]


def _run(
    rank: int, size: int, folder: str, answer: Connection, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(str(Path(folder) / "store"), size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
        _tell(answer, True, function(rank, *args))
    except BaseException:  # noqa: BLE001 told to the test, which raises
        _tell(answer, False, traceback.format_exc())
    finally:
        answer.close()
        dist.destroy_process_group()


def _tell(answer: Connection, ended: bool, said: Any) -> None:
    # Tensors by value: sent as multiprocessing would they are handles to memory of a process that is about to end.
    answer.send_bytes(pickle.dumps((ended, said)))
