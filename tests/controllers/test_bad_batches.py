"""What examples/bad_batches.py shows: which protection helps with which incident, and which does not."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="module")
def example(load_example: Any) -> Any:
    return load_example("bad_batches")


def ends(example: Any, incident: str, protection: str, optimizer: str = "SGD, momentum") -> tuple[float, float, int]:
    """Accuracy 10 steps after the incident and at the end, and how often a controller stepped in."""
    words, count = example.train(example.OPTIMIZERS[optimizer], getattr(example, incident), protection, steps=300)
    soon, late = (float(one.rstrip("%")) / 100 for one in words.split(" → "))
    return soon, late, count


def test_healthy_run_is_left_alone(example: Any) -> None:
    alone = ends(example, "nothing", "nothing")
    assert alone[1] > 0.9
    assert ends(example, "nothing", "all three") == alone, "and nobody stepped in"


@pytest.mark.parametrize("incident", ["shuffled_labels", "large_inputs"])
def test_batch_that_breaks_the_run_does_not_break_a_guarded_one(example: Any, incident: str) -> None:
    assert ends(example, incident, "nothing")[0] < 0.7
    soon, late, count = ends(example, incident, "all three")
    assert soon > 0.9
    assert late > 0.9
    assert count > 0


def test_clamp_alone_does_not_help_with_momentum_that_has_seen_the_batch(example: Any) -> None:
    """Each step is short, and they all go the same wrong way; it recovers when the momentum has faded."""
    soon, late, count = ends(example, "shuffled_labels", "StepClamp")
    assert soon < 0.7
    assert late > 0.9
    assert count > 10


def test_nan_in_one_batch(example: Any) -> None:
    assert ends(example, "nan_input", "nothing")[1] < 0.2
    assert ends(example, "nan_input", "clipping")[1] < 0.2
    assert ends(example, "nan_input", "NonFiniteGuard")[1:] == (pytest.approx(0.94, abs=0.03), 1)
    assert ends(example, "nan_input", "SpikeGuard")[1:] == (pytest.approx(0.94, abs=0.03), 1)
    make = example.OPTIMIZERS["SGD, momentum"]
    assert example.train(make, example.nan_input, "StepClamp", steps=300) == ("stopped at step 150", 1)


def test_new_data_is_accepted_after_a_few_steps(example: Any) -> None:
    """There is nothing to protect from; what a guard costs is a few steps."""
    assert ends(example, "new_data", "nothing")[1] > 0.85
    _, late, count = ends(example, "new_data", "SpikeGuard")
    assert late > 0.85
    assert count == 5
