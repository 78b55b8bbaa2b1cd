"""What the ranks of a run send one another for Redline: each message of a step, and its bytes, as formulas.

``tests/ranks/test_traffic.py`` counts what is really sent and holds it against these; ``render_scale.py`` writes them
out in ``scale.md``. Bytes are what a rank hands over: of an all-gather its own part, of an all-reduce the whole vector.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

BLOCK = 6  # vectors of the spectral iteration: 4 warm and 2 fresh
SMALL = 128  # sides up to here are measured by their Gram matrix
TOLD = 8  # samples of each rank that the others are told of


@dataclass(frozen=True)
class Message:
    """One kind of message of a step.

    Attributes:
        part: of Redline that sends it.
        kind: "all-reduce" or "all-gather"; "hosts" for a flag that the hosts exchange without their devices.
        count: how many of them.
        bytes: in all of them together, of one rank.
    """

    part: str
    kind: str
    count: int
    bytes: float

    def on_the_wire(self, ranks: int) -> float:
        """Bytes that one rank sends, by the ring algorithms."""
        if self.kind == "all-gather":
            return self.bytes * (ranks - 1)
        return self.bytes * 2 * (ranks - 1) / ranks


def every_step(*, sharded: bool, optimizers: int = 1) -> list[Message]:
    """What StepHealth, or any controller, has sent at each step: loss and gradient norm."""
    messages = [Message("loss and gradient norm", "all-gather", 1, 3 * 8)]
    return [*messages, Message("gradient norm", "all-reduce", optimizers, 8 * optimizers)] if sharded else messages


def update_norms(tensors: int) -> list[Message]:
    """``tau``, or with a clamp the norm of each parameter's update: a square for each of so many parameters."""
    return [Message("update norms", "all-reduce", 1, 8 * tensors)]


def spectra(
    matrices: Sequence[tuple[int, int]], rounds: Sequence[int], *, sharded: bool, watched: bool
) -> list[Message]:
    """``sigma_1`` of matrices ``(d_out, d_in)``, of weights or of updates; their rows are shared out where sharded.

    Args:
        matrices: all of them.
        rounds: of each one's iteration, two products each.
        sharded: whether they lie in parts; otherwise each is measured by one rank.
        watched: whether convergence is asked for, as on the CPU; on accelerators the rounds are fixed.
    """
    if not sharded:
        return [Message("spectra", "all-reduce", 1, 3 * 8 * len(matrices))]
    numbers = 0.0
    for (_, columns), own in zip(matrices, rounds, strict=True):
        once = columns <= SMALL
        numbers += columns * (columns + 1) / 2 if once else min(own * BLOCK, columns) * columns
        numbers += 4 * (max(1, own - 1) if watched and not once else 1)
    most = max(rounds)
    return [Message("spectra", "all-reduce", max(2, 2 * most - 1 if watched else most + 1), 4 * numbers)]


def frobenius_norms(matrices: int) -> list[Message]:
    """For stable ranks."""
    return [Message("Frobenius norms", "all-reduce", 1, 8 * matrices)]


def tangent(
    parameters: int, tensors: int, units: int, ranks: int, *, sharded: bool, itemsize: int = 4, exact: bool = False
) -> list[Message]:
    """One logit tangent, and what is read of it.

    Args:
        parameters: elements of the model, parts filled up to the largest rank's.
        tensors: parameters of the model.
        units: that are gathered one by one: modules that ``fully_shard`` was applied to.
        ranks: of the run.
        sharded: whether they lie in parts.
        itemsize: bytes of an element.
        exact: whether the exact radius is found, too.
    """
    messages = [
        Message("tangent: whether all can take it, and could", "hosts", 4, 4 * 8),
        Message("r", "all-gather", 1, 4),
        Message("samples", "all-reduce", 1, 2 * 8),
        Message("samples that bind", "all-gather", 1, TOLD * 3 * 8),
    ]
    if exact:
        messages.append(Message("exact radius", "all-gather", 1, 4))
    if sharded:
        messages += [
            Message(
                "tangent: parameters and update, a unit at a time",
                "all-gather",
                units,
                2 * itemsize * parameters / ranks,
            ),
            Message("tangent: sizes", "all-reduce", 1, 2 * 8 * tensors),
            Message("tangent: whether to go on", "hosts", units + 1, 8 * (units + 1)),
        ]
    return messages


def seconds(messages: Sequence[Message], ranks: int, bandwidth: float, latency: float) -> float:
    """How long they take: bytes over ``bandwidth`` (bytes a second, of one rank), and ``latency`` a message."""
    return sum(
        one.on_the_wire(ranks) / bandwidth + one.count * latency * math.ceil(math.log2(ranks)) for one in messages
    )
