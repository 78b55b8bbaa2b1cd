"""What is refused as an overhead budget, and where."""

from __future__ import annotations

import math
from typing import Any

import pytest
from budgeted_runs import Clock, Run

from redline import ConfigurationError

NONE = [0, 0.0, -0.1, 1, 1.0, 2, math.nan, math.inf, -math.inf, True, False, "0.02", [0.02]]


@pytest.mark.parametrize("budget", NONE)
def test_a_budget_that_is_no_share_is_refused(budget: Any, clock: Clock) -> None:
    hooks = Run(clock)
    with pytest.raises(ConfigurationError, match=r"got overhead_budget=.*; expected a share of training time above 0"):
        hooks.attach(budget=budget)


@pytest.mark.parametrize("budget", NONE)
def test_the_callback_refuses_it_when_it_is_made(budget: Any) -> None:
    pytest.importorskip("lightning")
    from redline.integrations.lightning import RedlineCallback

    with pytest.raises(ConfigurationError, match=r"such as 0\.02\. Leave it out to measure whenever it is due"):
        RedlineCallback(overhead_budget=budget)
