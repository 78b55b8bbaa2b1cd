"""What the tests of the Trainer's callback share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """accelerate keeps precision and devices for the whole process."""
    yield
    from accelerate.state import AcceleratorState, GradientState  # where it is missing, the tests here are skipped

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
