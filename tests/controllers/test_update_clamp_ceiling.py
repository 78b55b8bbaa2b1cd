"""UpdateClamp relative to "fan": the ceiling that it puts on the weights for good."""

from __future__ import annotations

import math
import statistics
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from bits import frozen
from torch import Tensor, nn
from torch.optim import Optimizer
from update_clamp_runs import (
    CEILING,
    SGDW,
    TOLERANCE,
    Decaying,
    Lion,
    Optimizers,
    Run,
    adamw,
    assert_held,
    fan,
    limit_of,
    prepared,
    top,
)

from redline import UpdateClamp
from redline.integrations.demo.data import digits


class Long(NamedTuple):
    """A long run: limit, and optimizers."""

    limit: float
    optimizers: Optimizers


def long_muon(model: nn.Module) -> list[Optimizer]:
    parameters = list(model.parameters())
    return [
        torch.optim.Muon([p for p in parameters if p.dim() == 2], 0.02, weight_decay=0.1),
        torch.optim.AdamW([p for p in parameters if p.dim() != 2], 1e-2),
    ]


# The rates are such that the optimizer alone learns the task well (its loss ends at 0.003 to 0.1); the decays such that
# weights come to rest within the run (1 / (lr wd) is 500 or 1,000 steps); the limits such that the ceilings,
# limit * sqrt(d_out / d_in) / wd, are 2 to 3 times the strength at initialization: room to learn in, and half of what
# the optimizer alone takes, or less. Nothing was tuned beyond that.
LONG = {
    "adamw": Long(0.4, lambda model: [torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)]),
    "sgdw": Long(0.12, lambda model: [SGDW(model.parameters(), 0.05, weight_decay=0.04)]),
    "lion": Long(2.0, lambda model: [Lion(model.parameters(), 2e-3, weight_decay=0.5)]),
    "muon": Long(0.4, long_muon),
}


@pytest.mark.parametrize(
    "kind", ["adamw", "muon", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("sgdw", "lion"))]
)
def test_over_5000_steps_every_matrix_stays_under_the_reported_ceiling_and_without_the_clamp_one_does_not(
    kind: str,
) -> None:
    limit, optimizers = LONG[kind]
    inputs, labels, *_ = digits()
    held, bare = (
        Run(optimizers, lambda: nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))) for _ in range(2)
    )
    assert frozen(held.parameters) == frozen(bare.parameters)
    losses: dict[Run, list[float]] = {held: [], bare: []}
    highest: dict[Run, dict[str, float]] = {held: {}, bare: {}}  # sigma_1 over the protected run's ceiling
    samples = torch.Generator().manual_seed(1)
    started = {name: top(held.parameters[name]) for name in ("0.weight", "2.weight")}
    with held.attach(UpdateClamp(limit, "fan")) as session:
        for step in range(5000):
            chosen = torch.randint(len(inputs), (32,), generator=samples)
            for run in (held, bare):
                loss = F.cross_entropy(run.model(inputs[chosen]), labels[chosen])
                loss.backward()
                run.update()
                run.model.zero_grad()
                losses[run].append(loss.item())
            if step % 25 == 0 or step == 4999:
                ceilings = session.latest.layers(CEILING)
                assert set(ceilings) == {"0.weight", "2.weight"}
                for run in (held, bare):
                    for name, ceiling in ceilings.items():
                        ratio = top(run.parameters[name]) / ceiling
                        highest[run][name] = max(ratio, highest[run].get(name, 0.0))
                assert max(highest[held].values()) <= 1, (step, highest[held])
    print(kind, "sigma_1 / ceiling, with:", highest[held], "without:", highest[bare])  # shown with -rP
    print(kind, "loss, with and without:", [statistics.fmean(losses[run][-200:]) for run in (held, bare)])
    rates = held.rates
    for name, ceiling in ceilings.items():
        implied = limit * fan(held.parameters[name]) / rates[name].weight_decay
        assert ceiling == pytest.approx(max(started[name], implied), rel=2 * TOLERANCE)
    assert max(highest[bare].values()) > 1, "without it one exceeds it"
    assert min(highest[held].values()) > 0.75, "the ceiling is no idle one"
    (tally,) = session.report().to_dict()["interventions"]
    assert tally["count"] > 1000
    assert statistics.fmean(losses[held][-200:]) < 0.6 * math.log(10), "it has learned, if more slowly"
    assert statistics.fmean(losses[bare][-200:]) < 0.2


class Fixed(nn.Module):
    """Matrices whose gradients never turn: the loss is linear in them."""

    def __init__(self, rank: int, *shapes: tuple[int, int]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList(0.002 * torch.randn(shape, generator=generator) for shape in shapes)
        self.slopes = [
            torch.randn(m, rank, generator=generator) @ torch.randn(rank, n, generator=generator) for m, n in shapes
        ]

    def forward(self) -> Tensor:
        pairs = zip(self.weights, self.slopes, strict=True)
        return sum((weight * slope.to(weight)).mean() for weight, slope in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "optimizers",
    [
        lambda model: [torch.optim.AdamW(model.parameters(), 2e-2, weight_decay=1.0)],
        lambda model: [Lion(model.parameters(), 2e-2, weight_decay=1.0)],
        lambda model: [SGDW(model.parameters(), 2e-2, weight_decay=1.0)],
        lambda model: [torch.optim.Muon(model.parameters(), 2e-2, weight_decay=1.0)],
    ],
    ids=["adamw", "lion", "sgdw", "muon"],
)
def test_gradients_that_never_turn_take_the_weights_to_the_ceiling_and_no_further(
    optimizers: Optimizers, dtype: torch.dtype
) -> None:
    run = Run(optimizers, lambda: Fixed(70, (12, 20), (20, 12), (70, 80)).to(dtype))
    rounding = torch.finfo(dtype).eps if dtype is torch.bfloat16 else 0.0
    with run.attach(UpdateClamp(0.2, "fan")) as session:
        for step in range(350):
            run.model().backward()
            run.update()
            run.model.zero_grad()
            if step % 20 == 19:
                for name, ceiling in session.latest.layers(CEILING).items():
                    assert top(run.parameters[name]) <= ceiling * (1 + rounding), (step, name)
    if dtype is not torch.bfloat16:  # whose last steps there are lost in rounding
        for name, ceiling in session.latest.layers(CEILING).items():
            assert top(run.parameters[name]) > 0.99 * ceiling


@pytest.mark.parametrize("shape", [(20, 12), (80, 96), (256, 128)])
def test_a_matrix_that_starts_over_the_rest_has_its_ceiling_where_it_starts(shape: tuple[int, int]) -> None:
    """And then comes down, the ceiling staying."""
    for seed in range(8):
        weight = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
        model = nn.ParameterDict({"w": weight})
        run = Run(lambda model: [Lion(model.parameters(), 0.01, weight_decay=1.0)], lambda model=model: model)
        started = top(weight)
        with run.attach(UpdateClamp(1.0, "fan")) as session:
            for step in range(8):
                run.give(step, {})
                run.update()
                ceiling = session.latest.value(CEILING, layer="w")
                assert started <= ceiling <= started * (1 + 2 * TOLERANCE), (seed, step)
                assert top(weight) <= ceiling
        assert top(weight) < 0.99 * started


def test_the_ceiling_holds_where_a_spike_of_the_rate_takes_the_decay_past_zero() -> None:
    """At a rate 100 times too high ``lr wd`` is 2: the weights come out of the decay as strong, the other way round."""
    run = Run(lambda model: [torch.optim.AdamW(model.parameters(), 2e-2, weight_decay=1.0)])
    with run.attach(UpdateClamp(0.5, "fan")) as session:
        for step in range(200):
            run.optimizers[0].param_groups[0]["lr"] = 2.0 if step == 150 else 2e-2
            run.step(step)
            for name, ceiling in session.latest.layers(CEILING).items():
                assert top(run.parameters[name]) <= ceiling * (1 + 1e-6), (step, name)


@pytest.mark.parametrize("decays", [[0.5, 1.0, 2.0], [1.0, 0.25, 4.0, 0.5], [0.5, 0.0, 0.5], [0.0, 0.5]])
def test_the_ceiling_never_falls_below_one_that_held_before(decays: list[float]) -> None:
    """What weaker decay let grow, stronger decay has not taken away yet; without decay each step adds its limit."""
    run = Run(adamw)
    expected = {name: top(parameter) for name, parameter in run.parameters.items() if parameter.dim() == 2}
    lr = run.optimizers[0].param_groups[0]["lr"]
    with run.attach(UpdateClamp(2.0, "fan")) as session:
        for decay in decays:
            run.optimizers[0].param_groups[0]["weight_decay"] = decay
            for seed in range(3):
                run.step(seed)
                for name, ceiling in expected.items():
                    most = 2.0 * fan(run.parameters[name])
                    expected[name] = max(ceiling, most / decay) if decay else ceiling + lr * most
            read = session.latest.layers(CEILING)
            assert read == pytest.approx(expected if decay else {}, rel=2 * TOLERANCE)


@pytest.mark.parametrize("clamp_first", [False, True])
def test_decay_that_a_controller_put_in_force_is_the_one_that_stays_whole_and_gives_the_ceiling(
    clamp_first: bool,
) -> None:
    wanted = [{"0.weight": 2.0}, {"0.weight": 0.25, "4.weight": 0.75}, {}, {"4.weight": 0.125}]
    least = {"0.weight": [2.0, 0.25, 0.25, 0.25], "2.weight": [0.5] * 4, "4.weight": [0.5, 0.5, 0.5, 0.125]}
    run, limit = prepared(adamw), 1.0
    started = {name: top(parameter) for name, parameter in run.parameters.items() if parameter.dim() == 2}
    controllers = [UpdateClamp(limit, "fan"), Decaying(lambda index: wanted[index])]
    with run.attach(*(controllers if clamp_first else controllers[::-1])) as session:
        for index, decays in enumerate(wanted):
            alone, before, rates = run.uncontrolled(), run.parameters, run.rates
            alone.step(index)
            run.step(index)
            ceilings = session.latest.layers(CEILING)
            for name, own in alone.parameters.items():
                if own.dim() == 2:
                    rate = rates[name]._replace(weight_decay=decays.get(name, 0.5))
                    moved = own - (rate.decay - rates[name].decay) * before[name]  # the same update, the other decay
                    at_most = limit_of(own, limit, "fan", rate)
                    assert assert_held(before[name], moved, run.parameters[name], at_most, rate.decay)
                    expected = max(started[name], limit * fan(own) / least[name][index])
                    assert ceilings[name] == pytest.approx(expected, rel=2 * TOLERANCE), (index, name)
