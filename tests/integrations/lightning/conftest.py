"""What the tests of the Lightning callback share."""

from __future__ import annotations

import pytest
from lightning_runs import seed


@pytest.fixture(autouse=True)
def seeded() -> None:
    seed(0)
