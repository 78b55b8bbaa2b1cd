"""What the tests of the core share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import rich
from matrix_decision_runs import Numbers, elsewhere, host


@pytest.fixture(params=[80, 120])
def columns(request: pytest.FixtureRequest) -> Iterator[int]:
    """rich's own console, so many columns wide."""
    own = rich.get_console()
    kept = dict(own.__dict__)
    rich.reconfigure(width=request.param, force_terminal=False)
    yield request.param
    own.__dict__ = kept


@pytest.fixture
def written(columns: int, capsys: pytest.CaptureFixture[str]) -> Callable[[], list[str]]:
    """The lines written to stdout since the last call; none is too long."""

    def lines() -> list[str]:
        out, err = capsys.readouterr()
        assert err == ""
        found = [line.rstrip() for line in out.splitlines()]
        assert all(len(line) <= columns for line in found)
        return found

    return lines


@pytest.fixture(params=[host, elsewhere], ids=["host", "accelerator"])
def numbers(request: pytest.FixtureRequest) -> Numbers:
    """Where the numbers of a decision are."""
    return request.param
