"""Redline's own share of the time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from functools import partial
from typing import Any

import torch


class Account(Enum):
    """What time is spent on."""

    OBSERVING = "observing"  # monitors, sinks, hooks, and copies that only they need
    CONTROLLING = "controlling"  # asking controllers, carrying out what they decide, copies made for them


class OwnTime:
    """Adds up the time spent in Redline, by account, from the first event of training on.

    For a model on a CUDA device it is the device's time, between pairs of events on the current stream; they are
    counted once the device has come past them, and never waited for, so that the sums run some steps late. Elsewhere it
    is the host's. Training is what is left of the host's time.
    """

    def __init__(self, device: torch.device | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        """``device``: on which the model is; ``clock``: of the host, in seconds."""
        self._clock = clock
        self._mark: Callable[[], Any] = clock
        self._elapsed: Callable[[Any, Any], float | None] = _between_times
        if device is not None and device.type == "cuda":
            self._mark, self._elapsed = partial(_recorded_event, device), _between_events
        self._spent = dict.fromkeys(Account, 0.0)
        self._unknown: deque[tuple[Account, Any, Any]] = deque()  # oldest first
        self._open: list[Account] = []
        self._since: Any = None  # the innermost section was entered, or gone back to
        self._first: float | None = None
        self._last = 0.0

    def start(self) -> None:
        """Training has begun, if it had not."""
        if self._first is None:
            self._first = self._last = self._clock()

    @contextmanager
    def spent(self, account: Account = Account.OBSERVING) -> Iterator[None]:
        """What runs inside is Redline's; of nested sections the innermost counts."""
        self.start()
        self._pass_to(account)
        self._open.append(account)
        try:
            yield
        finally:
            self._pass_to(self._open[-2] if len(self._open) > 1 else None)
            self._open.pop()

    def _pass_to(self, account: Account | None) -> None:
        """Close the time of the section that is open; that of ``account`` begins, or the loop's."""
        if self._open and self._open[-1] is account:
            return
        mark = self._mark()
        if self._open:
            self._unknown.append((self._open[-1], self._since, mark))
        self._since = mark
        if not self._open or account is None:
            self._last = self._clock()
            self._drain()  # whether or not anybody ever asks: the list would grow with the run

    def _count(self) -> None:
        """Add what is known by now, up to this moment."""
        if self._open:
            mark = self._mark()
            self._unknown.append((self._open[-1], self._since, mark))
            self._since = mark
        self._drain()

    def _drain(self) -> None:
        while self._unknown and (seconds := self._elapsed(*self._unknown[0][1:])) is not None:
            self._spent[self._unknown.popleft()[0]] += seconds

    @property
    def seconds(self) -> float:
        """From the first event to the last."""
        return self._last - (self._last if self._first is None else self._first)

    def totals(self) -> tuple[float, float, float]:
        """Seconds of training, of observing and of controlling, up to now."""
        self._count()
        observing, controlling = self._spent[Account.OBSERVING], self._spent[Account.CONTROLLING]
        since = 0.0 if self._first is None else self._clock() - self._first
        return max(since - observing - controlling, 0.0), observing, controlling

    def ratios(self) -> tuple[float, float]:
        """All of Redline's time / time of training, and that of observing / time of training; 0 before any."""
        training, observing, controlling = self.totals()
        return ((observing + controlling) / training, observing / training) if training > 0 else (0.0, 0.0)


def _between_times(start: float, end: float) -> float:
    return end - start


def _recorded_event(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _between_events(start: torch.cuda.Event, end: torch.cuda.Event) -> float | None:
    """Seconds, or None while the device has not come so far."""
    return start.elapsed_time(end) / 1000 if start.query() and end.query() else None
