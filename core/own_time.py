"""Redline's own share of the time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class OwnTime:
    """Adds up the host time spent in Redline, from the first event of training on."""

    def __init__(self) -> None:
        self._own = 0.0
        self._depth = 0
        self._first: float | None = None
        self._last = 0.0

    def start(self) -> None:
        """Training has begun, if it had not."""
        if self._first is None:
            self._first = self._last = time.perf_counter()

    @contextmanager
    def spent(self) -> Iterator[None]:
        """What runs inside is Redline's; it may be nested."""
        self.start()
        entered = time.perf_counter()
        if self._depth == 0:
            self._last = entered
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._last = time.perf_counter()
                self._own += self._last - entered

    @property
    def seconds(self) -> float:
        """From the first event to the last."""
        return self._last - (self._last if self._first is None else self._first)

    @property
    def ratio(self) -> float:
        """Time in Redline / time of training, up to now; 0 before there is any training."""
        now = time.perf_counter()
        own = self._own + (now - self._last if self._depth else 0.0)
        training = (0.0 if self._first is None else now - self._first) - own
        return own / training if training > 0 else 0.0
