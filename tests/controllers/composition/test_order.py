"""The order of the list does not matter: five controllers make the same run in any, and tell of it as they decide.

What lengthens a step decides first, single matrices next, the clamp on the whole last; among equals the list decides.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from bits import frozen
from composition_runs import EVERY_OPTIMIZER, FIVE, SCALE, Run, batch
from step_lengths import reference
from torch import nn
from torch.optim import Optimizer
from weight_decay_runs import BODY, HEAD, IN_FORCE, muon_and_adamw
from weight_decay_runs import true_sigma as sigma

import redline


def trained(
    optimizers: Callable[[nn.Module], list[Optimizer]], names: Sequence[str]
) -> tuple[Run, redline.Session, dict[str, float]]:
    """Four steps, of which the second has a NaN in its gradients."""
    run = Run(optimizers)
    with run.attach(*(FIVE[name]() for name in names)) as session:
        for seed in range(4):
            run.step(seed, broken=seed == 1)
    return run, session, session.latest.layers(IN_FORCE)


def test_every_order_of_the_list_gives_the_same_run() -> None:
    """Bit for bit, but for UpdateClamp and WeightDecayControl: which of these decides first shows in the rounding."""
    ends: dict[bool, list[Any]] = {True: [], False: []}
    for names in itertools.permutations(FIVE):
        run, session, decays = trained(muon_and_adamw, names)
        told = sorted((one.step, one.controller, one.action, one.reason) for one in session.interventions)
        ends[names.index("UpdateClamp") < names.index("WeightDecayControl")].append(
            (run.everything, frozen(decays), told, run.parameters)
        )
    for same in ends.values():
        assert len(same) == 60
        for what in range(3):
            assert all(one[what] == same[0][what] for one in same)
    one, other = ends[True][0], ends[False][0]
    for name, parameter in one[3].items():
        torch.testing.assert_close(parameter, other[3][name], rtol=1e-5, atol=1e-7)
    assert [entry[:3] for entry in one[2]] == [entry[:3] for entry in other[2]]


@EVERY_OPTIMIZER
def test_all_of_them_tell_what_they_did_and_are_counted(optimizers: Callable[[nn.Module], list[Optimizer]]) -> None:
    _, session, decays = trained(optimizers, list(FIVE))
    told = [(one.step, one.controller, one.action) for one in session.interventions]
    acted = {(controller, action) for _, controller, action in told}
    assert acted == {
        ("UpdateClamp", "scale"),
        ("WeightDecayControl", "decay"),
        ("RadiusLR", "scale"),
        ("StepClamp", "scale"),
        ("NonFiniteGuard", "withhold"),
    }
    expected = [
        ("RadiusLR", "scale"),
        ("UpdateClamp", "scale"),
        ("WeightDecayControl", "decay"),
        ("StepClamp", "scale"),
    ]
    assert [entry[1:] for entry in told if entry[0] == 0] == expected, "in the order in which they decide"
    assert [entry[1:] for entry in told if entry[0] == 1] == [("NonFiniteGuard", "withhold")]
    for controller, action in acted:
        counted = session.latest.value("redline_interventions_total", controller=controller, action=action)
        assert counted == sum(entry[1:] == (controller, action) for entry in told)
    assert decays.keys() == {BODY, HEAD}
    by_kind = {(tally.controller, tally.action): tally.count for tally in session.report().interventions}
    assert by_kind.keys() == acted


@EVERY_OPTIMIZER
def test_each_leaves_what_it_is_there_for(optimizers: Callable[[nn.Module], list[Optimizer]]) -> None:
    """All five at once: the committed step is inside the radius, matrices are inside their limit, decay is in force."""
    run = Run(optimizers)
    rates = {BODY: (0.05, 0.2) if optimizers is muon_and_adamw else (2e-2, 0.3), HEAD: (2e-2, 0.3)}
    with run.attach(*(one() for one in FIVE.values())) as session:
        for seed in range(6):
            alone, before = run.uncontrolled(), run.parameters
            alone.step(seed)
            run.step(seed)
            told = {one.controller: one for one in session.interventions if one.step == seed}
            after, proposed = run.parameters, alone.parameters
            assert reference(run.model, before, after, batch(seed)[0]) <= 0.02 * (1 + 1e-3)
            scale = session.latest.value(SCALE)
            lengthened = told["RadiusLR"].saw["scale"]
            assert scale == pytest.approx(lengthened * told["StepClamp"].saw["scale"])
            for name in (BODY, HEAD):
                lr, group_decay = rates[name]
                decay = session.latest.layers(IN_FORCE)[name]
                w, p = before[name].double(), proposed[name].double() - before[name].double()
                net = lengthened * (p + lr * group_decay * w)
                net *= min(1.0, 0.02 * sigma(w) / sigma(net))
                wanted = w + scale / lengthened * (net - lengthened * lr * decay * w)
                torch.testing.assert_close(after[name].double(), wanted, rtol=0, atol=3e-3 * float(p.abs().max()))
            for name in ("body.bias", "head.bias"):
                wanted = before[name] + scale * (proposed[name] - before[name])
                torch.testing.assert_close(after[name], wanted, rtol=1e-5, atol=1e-6)
