"""Transfer on real text, the short form of examples/width_transfer.py: what is best narrow is best wide."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import pytest
from rich.progress import Progress

NARROW, BETWEEN, WIDE = 32, (64, 96), 128
# Steps of 4, the ratio of the widths: without the rule the best rate moves by one of them.
RATES, DECAYS = (0.02, 0.08, 0.32), (0.5, 2.0, 8.0)

# Measured over 5 seeds (12 narrow ones), losses at width 128 and the standard deviation of one run: 2.337 ± 0.013
# carried over, always the best of the sweep, its best neighbour 2.394 ± 0.016; 2.60 ± 0.06 with nothing scaled. At
# width 32 one seed in ten finds another point the best, and of three seeds' means one in a thousand.
NARROW_SEEDS = 3

Point = tuple[float, float]


@dataclass
class Transferred:
    """Losses by point (lr, wd) in units of the narrow model.

    Attributes:
        carried: the best point of the narrow model's sweep.
        narrow: of the narrow model, means over seeds.
        wide: of the wide one, by the rule.
        between: of the widths in between, at the point carried over.
        unscaled: of the wide one at the point carried over, with nothing scaled.
    """

    carried: Point
    narrow: dict[Point, float]
    wide: dict[Point, float]
    between: dict[int, float]
    unscaled: float


@pytest.fixture(scope="module")
def transferred(load_example: Callable[[str], ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Transferred:
    """Two sweeps of nine points, and three runs more; 45 seconds on one core."""
    example = load_example("width_transfer")
    example.CONTEXT = 32
    options = Namespace(
        steps=100,
        batch=16,
        held_out=512,
        rates=RATES,
        decays=DECAYS,
        runs=tmp_path_factory.mktemp("runs") / "runs.json",
    )
    losses = {}
    with Progress(disable=True) as progress:
        for width, seeds in ((NARROW, NARROW_SEEDS), (WIDE, 1)):
            options.widths, options.seeds = [width], seeds
            found = example.sweep(options, progress)[width]
            losses[width] = {point: example.mean_loss(runs) for point, runs in found.items()}
            if width == NARROW:
                carried = example.best(found)
    between = {width: example.train(width, *carried, 0, options)["loss"] for width in BETWEEN}
    unscaled = example.train(WIDE, *carried, 0, options, scaled=False)["loss"]
    return Transferred(carried, losses[NARROW], losses[WIDE], between, unscaled)


def test_the_sweep_is_around_the_optimum(transferred: Transferred):
    lr, weight_decay = transferred.carried
    assert lr not in (RATES[0], RATES[-1])
    assert weight_decay not in (DECAYS[0], DECAYS[-1])
    assert transferred.narrow.keys() == transferred.wide.keys() == {(lr, wd) for lr in RATES for wd in DECAYS}


def test_carried_over_the_best_of_the_narrow_model_is_within_1_percent_of_the_best_of_the_wide_one(
    transferred: Transferred,
):
    lowest = min(loss for loss in transferred.wide.values() if math.isfinite(loss))
    assert transferred.wide[transferred.carried] <= 1.01 * lowest


def test_with_nothing_scaled_it_is_clearly_worse(transferred: Transferred):
    assert transferred.unscaled >= 1.03 * transferred.wide[transferred.carried]


def test_wider_is_not_worse(transferred: Transferred):
    """muP's own sign of a right parametrization, at the point carried over."""
    narrow = transferred.narrow[transferred.carried]
    assert transferred.wide[transferred.carried] < narrow
    assert all(loss < 1.01 * narrow for loss in transferred.between.values())
