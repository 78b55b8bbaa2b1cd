"""RadiusLR: which samples and positions the length goes by, and which quantile of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from radius_lr_runs import batch, prepared, unlimited
from step_lengths import BATCH, normalizing, reference, spreads
from torch import Tensor
from torch_optimizers import sgd


@pytest.mark.parametrize("reduction", ["max", 1.0, 1, 0.9, 0.5, 0.1])
@pytest.mark.parametrize("rate", [1e-2, 1e2])
def test_it_goes_by_the_quantile_asked_for(reduction: Any, rate: float) -> None:
    run = prepared().times_rate(rate)
    before = run.parameters
    with run.attach(unlimited(0.7, reduction=reduction)):
        run.step(3)
    each = np.sort(spreads(run.model, before, run.parameters, batch(3)[0])) / math.pi
    place = math.ceil((1 if reduction == "max" else reduction) * BATCH - 1e-9) - 1
    assert each[place] == pytest.approx(0.7, rel=1e-3)
    assert each[-1] > 0.71 or place == BATCH - 1


@pytest.mark.parametrize("samples", [1, 4, 5, 16, 100, None])
def test_it_goes_by_so_many_samples_spread_over_the_batch(samples: int | None) -> None:
    run = prepared()
    before = run.parameters
    with run.attach(unlimited(0.7, max_samples=samples)):
        run.step(3)
    each = spreads(run.model, before, run.parameters, batch(3)[0]) / math.pi
    used = min(samples or BATCH, BATCH)
    assert max(each[k * BATCH // used] for k in range(used)) == pytest.approx(0.7, rel=1e-3)
    assert each.max() > 0.75 or used > 5


def test_where_batch_statistics_couple_the_samples_it_goes_by_the_whole_batch() -> None:
    run = prepared(sgd, normalizing)
    before = run.parameters
    with run.attach(unlimited(0.7, max_samples=4)):
        run.step(3)
    assert reference(run.model, before, run.parameters, batch(3)[0]) == pytest.approx(0.7, rel=1e-3)


def test_positions_that_do_not_count_or_whose_logits_are_nan_are_left_out() -> None:
    def masked(output: Tensor) -> tuple[Tensor, Tensor]:
        return output, torch.arange(len(output)) % 2 > 0

    def broken(output: Tensor) -> Tensor:
        return output * torch.where(torch.arange(len(output)).unsqueeze(1) % 2 > 0, 1.0, math.nan)

    def both(output: Tensor) -> tuple[Tensor, Tensor]:
        place = torch.arange(len(output))
        return output * torch.where(place.unsqueeze(1) % 4 > 0, 1.0, math.nan), place % 4 != 2

    ends = []
    for logits in (masked, broken, both):
        run = prepared()
        before = run.parameters
        with run.attach(unlimited(0.7), logits=logits):
            run.step(3)
        each = spreads(run.model, before, run.parameters, batch(3)[0]) / math.pi
        assert each[1::2].max() == pytest.approx(0.7, rel=1e-3)
        ends.append(run.everything)
    assert ends[0] == ends[1] == ends[2]
