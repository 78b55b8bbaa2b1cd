"""Redline's own time, by a clock that is set by hand: whose it is, and how a device's comes to be known late."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from redline.own_time import Account, OwnTime

OBSERVING, CONTROLLING = Account


class Clock:
    """Goes on only when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_nothing_is_spent_before_training(clock: Clock) -> None:
    own = OwnTime(clock=clock)
    clock.pass_by(5)
    assert own.totals() == (0, 0, 0)
    assert own.ratios() == (0, 0)
    assert own.seconds == 0


def test_training_is_what_is_left(clock: Clock) -> None:
    own = OwnTime(clock=clock)
    own.start()
    clock.pass_by(6)
    with own.spent():
        clock.pass_by(1)
    with own.spent(CONTROLLING):
        clock.pass_by(2)
    clock.pass_by(4)
    assert own.totals() == (10, 1, 2)
    assert own.ratios() == pytest.approx((0.3, 0.1))
    assert own.seconds == 9, "to the last event"


def test_of_nested_sections_the_innermost_counts(clock: Clock) -> None:
    own = OwnTime(clock=clock)
    with own.spent():
        clock.pass_by(1)
        with own.spent(CONTROLLING):
            clock.pass_by(10)
            with own.spent(CONTROLLING):
                clock.pass_by(20)
            with own.spent(OBSERVING):
                clock.pass_by(100)
            clock.pass_by(200)
        clock.pass_by(1000)
    clock.pass_by(5)
    assert own.totals() == (5, 1101, 230)


def test_a_section_that_raises_is_counted(clock: Clock) -> None:
    own = OwnTime(clock=clock)

    def fail() -> None:
        with own.spent(), own.spent(CONTROLLING):
            clock.pass_by(3)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    clock.pass_by(2)
    assert own.totals() == (2, 0, 3)


def test_a_section_still_open_counts_up_to_now(clock: Clock) -> None:
    own = OwnTime(clock=clock)
    own.start()
    clock.pass_by(4)
    with own.spent():
        clock.pass_by(1)
        assert own.totals() == (4, 1, 0)
        clock.pass_by(1)
        assert own.totals() == (4, 2, 0)
    assert own.totals() == (4, 2, 0)


class Device:
    """One that works through what it is given whenever it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.reached, self.given = 0.0, 0, 0
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self, stream: Any) -> None:
                device.given += 1
                self.place, self.at = device.given, device.now

            def query(self) -> bool:
                return self.place <= device.reached

            def elapsed_time(self, end: Any) -> float:
                assert end.query(), "the device has not come so far"
                return 1000 * (end.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)


def test_a_devices_time_is_counted_once_it_is_known_and_not_waited_for(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(monkeypatch)
    own = OwnTime(torch.device("cuda", 0), clock)
    own.start()
    clock.pass_by(10)
    with own.spent():
        device.now += 2
        with own.spent(CONTROLLING):
            device.now += 3
        device.now += 4
    device.now += 50
    assert own.totals() == (10, 0, 0)
    device.reached = 2
    assert own.totals() == (8, 2, 0)
    device.reached = device.given
    assert own.totals() == (1, 6, 3)
    assert own.totals() == (1, 6, 3)


def test_sections_within_one_of_the_same_account_put_no_event_on_the_stream(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = Device(monkeypatch)
    own = OwnTime(torch.device("cuda", 0), clock)
    with own.spent(), own.spent(), own.spent(OBSERVING):
        device.now += 1
    assert device.given == 2
    device.reached = 2
    assert own.totals()[1] == 1
