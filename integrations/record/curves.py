"""Series over a whole run in bounded memory: thinned evenly, with the least and the highest value of what is joined."""

from __future__ import annotations

import math
from array import array

from redline.readings import Series

MOST_BUCKETS = 2_048
"""Of one series; more are joined in pairs, so that it is shown by some 2,000 to 4,000 points."""
MOST_IN_ALL = 262_144
"""Of all series together, some 13 MB: with many series each is thinned further."""

_FIELDS = 5  # of a bucket: step and value of the least, step and value of the highest, step of one not finite or -1


class Curve:
    """One series, oldest first: buckets of as many values each, of which the least and the highest are kept.

    Attributes:
        last: the last value, with its step.
    """

    __slots__ = ("_buckets", "_filled", "_stride", "last")

    def __init__(self) -> None:
        self._buckets = array("d")
        self._stride, self._filled = 1, 1  # values of a bucket; of the last one
        self.last = (-1, math.nan)

    def __len__(self) -> int:
        return len(self._buckets) // _FIELDS

    def add(self, step: int, value: float) -> bool:
        """Take in one more value; whether that took a bucket more."""
        self.last = step, value
        bucket = (step, value, step, value, -1.0) if math.isfinite(value) else (step, math.inf, step, -math.inf, step)
        if self._filled == self._stride or not self._buckets:
            self._buckets.extend(bucket)
            self._filled = 1
            return True
        self._buckets[-_FIELDS:] = _joined(self._buckets[-_FIELDS:], array("d", bucket))
        self._filled += 1
        return False

    def halve(self) -> None:
        """Join the buckets in pairs."""
        old, self._buckets = self._buckets, array("d")
        for at in range(0, len(old), 2 * _FIELDS):
            first, second = old[at : at + _FIELDS], old[at + _FIELDS : at + 2 * _FIELDS]
            self._buckets.extend(_joined(first, second) if second else first)
        if len(old) // _FIELDS % 2 == 0:
            self._filled += self._stride
        self._stride *= 2

    def points(self) -> list[tuple[int, float]]:
        """``(step, value)`` of what is kept, in order; NaN where a value was not finite."""
        found: dict[int, float] = {}
        for at in range(0, len(self._buckets), _FIELDS):
            low_step, low, high_step, high, bad_step = self._buckets[at : at + _FIELDS]
            if low <= high:
                found[int(low_step)], found[int(high_step)] = low, high
            if bad_step >= 0:
                found[int(bad_step)] = math.nan
        step, value = self.last
        if step >= 0:
            found.setdefault(step, value if math.isfinite(value) else math.nan)
        return sorted(found.items())


def _joined(first: array[float], second: array[float]) -> array[float]:
    joined = array("d", first)
    if second[1] < first[1]:
        joined[0:2] = second[0:2]
    if second[3] > first[3]:
        joined[2:4] = second[2:4]
    if first[4] < 0:
        joined[4] = second[4]
    return joined


class Curves(dict[Series, Curve]):
    """The curves of a run, by series; what they take together is bounded, however many there are."""

    def __init__(self, most: int = MOST_BUCKETS, in_all: int = MOST_IN_ALL) -> None:
        """``most``: buckets of one curve; ``in_all``: of all together."""
        super().__init__()
        self._most, self._in_all, self._buckets = most, in_all, 0

    def add(self, series: Series, step: int, value: float) -> None:
        """Take in one more value of a series."""
        curve = self.get(series)
        if curve is None:
            curve = self[series] = Curve()
        if not curve.add(step, value):
            return
        self._buckets += 1
        if len(curve) > self._most:
            self._halve(curve)
        while self._buckets > self._in_all and self._most > 2:
            self._most //= 2
            for one in self.values():
                if len(one) > self._most:
                    self._halve(one)

    def _halve(self, curve: Curve) -> None:
        before = len(curve)
        curve.halve()
        self._buckets += len(curve) - before
