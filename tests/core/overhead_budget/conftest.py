"""What the tests of the overhead budget share."""

from __future__ import annotations

import pytest
from budgeted_runs import Clock

from redline.own_time import OwnTime


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """By which every session times itself."""
    clock = Clock()
    monkeypatch.setattr("redline.session.OwnTime", lambda device: OwnTime(device, clock))
    return clock
