"""What the tests of controllers share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from update_clamp_runs import accelerate


@pytest.fixture
def accelerated(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it to have tensors taken for an accelerator's."""
    return accelerate(monkeypatch)
