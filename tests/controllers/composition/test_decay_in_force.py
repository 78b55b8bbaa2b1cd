"""UpdateClamp beside WeightDecayControl: it goes by the decay in force, and leaves it whole."""

from __future__ import annotations

import math

import pytest
import torch
from composition_runs import Run
from step_lengths import CLASSES, FEATURES
from update_clamp_runs import CEILING
from weight_decay_runs import BODY, HEAD, IN_FORCE
from weight_decay_runs import true_sigma as sigma

from redline import UpdateClamp, WeightDecayControl


@pytest.mark.parametrize("order", [1, -1])
def test_the_ceiling_of_the_update_clamp_goes_by_the_decay_in_force(order: int) -> None:
    """Lowered, it raises the ceiling; which does not come down again, since a weight may be there by then."""
    run, limit = Run(), 3.0
    controllers = [
        UpdateClamp(limit, "fan"),
        WeightDecayControl({BODY: 9.0, HEAD: 0.6}, every=2, horizon=2, bounds=(0.05, 4)),
    ]
    fans = {BODY: math.sqrt(8 / FEATURES), HEAD: math.sqrt(CLASSES / 8)}
    start, least = {name: sigma(run.parameters[name]) for name in fans}, dict.fromkeys(fans, math.inf)
    with run.attach(*controllers[::order]) as session:
        for seed in range(8):
            run.step(seed)
            decays = session.latest.layers(IN_FORCE)
            least = {name: min(least[name], decays[name]) for name in least}
            wanted = {name: max(start[name], limit * fans[name] / least[name]) for name in least}
            assert session.latest.layers(CEILING) == pytest.approx(wanted, rel=2e-3)
        assert least[BODY] == pytest.approx(0.05) and decays[HEAD] > 0.3  # noqa: PT018
    alone = Run()
    with alone.attach(UpdateClamp(limit, "fan")) as session:
        alone.step(0)
        by_group = session.latest.layers(CEILING)
    assert wanted[BODY] == pytest.approx(0.3 / 0.05 * by_group[BODY], rel=2e-3)


@pytest.mark.parametrize("order", [1, -1])
def test_what_the_update_clamp_leaves_whole_is_the_decay_in_force(order: int) -> None:
    run = Run()
    controllers = [UpdateClamp(0.01), WeightDecayControl({BODY: 0.5, HEAD: 9.0}, every=1, horizon=1)]
    with run.attach(*controllers[::order]) as session:
        for seed in range(4):
            alone, before = run.uncontrolled(), run.parameters
            alone.step(seed)
            run.step(seed)
            for name, decay in session.latest.layers(IN_FORCE).items():
                w = before[name].double()
                net = alone.parameters[name].double() - w + 2e-2 * 0.3 * w
                factor = min(1.0, 0.01 * sigma(w) / sigma(net))
                assert factor < 1
                wanted = w + factor * net - 2e-2 * decay * w
                torch.testing.assert_close(
                    run.parameters[name].double(), wanted, rtol=0, atol=2e-3 * float(w.abs().max()) * 0.01
                )
