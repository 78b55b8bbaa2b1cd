"""What happened between two snapshots: each sink is handed all of it, however seldom it is due."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

if TYPE_CHECKING:
    from redline.interventions import Intervention
    from redline.readings import Series

T = TypeVar("T")


class Measurement(NamedTuple):
    """One value of one series, and the step at which it was measured."""

    series: Series
    step: int
    value: float


class FragileSample(NamedTuple):
    """One of the samples that came nearest to the redline at a step.

    Attributes:
        step: the step, as it was proposed.
        sample: its place in the batch; None for one that was remembered from an earlier batch.
        r: the step over the sample's own radius, by the bound.
        exact_r: the same by the exact radius, or None where that is not known.
        rank: in whose batch.
    """

    step: int
    sample: int | None
    r: float
    exact_r: float | None
    rank: int = 0


@dataclass(frozen=True)
class Since:
    """What happened since the last snapshot that the same sink was handed, oldest first.

    Attributes:
        measurements: every value of the metrics that are ``tracked``, the one in the snapshot among them.
        interventions: what the controllers did; of very many, the last 10,000.
        samples: the most fragile of each step that was measured by sample, most fragile first.
    """

    measurements: tuple[Measurement, ...] = ()
    interventions: tuple[Intervention, ...] = ()
    samples: tuple[FragileSample, ...] = ()


class Trail(Generic[T]):
    """The latest of many, and how many there have been: a reader asks for what came after what it has seen."""

    def __init__(self, most: int) -> None:
        """``most``: that are kept for readers who have not seen them."""
        self.total = 0
        self._latest: deque[T] = deque(maxlen=most)

    def extend(self, items: Iterable[T]) -> None:
        """Add to it."""
        for item in items:
            self._latest.append(item)
            self.total += 1

    def since(self, seen: int) -> tuple[T, ...]:
        """What came after the first ``seen``, as far as it is kept."""
        return latest(self._latest, self.total - seen)

    def forget(self, seen: int) -> None:
        """Every reader has seen so many: they need not be kept."""
        while self._latest and self.total - len(self._latest) < seen:
            self._latest.popleft()


def latest(kept: deque[T], count: int) -> tuple[T, ...]:
    """The last ``count``, or as many as are kept."""
    return tuple(islice(kept, max(len(kept) - count, 0), None))
