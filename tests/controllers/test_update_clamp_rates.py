"""UpdateClamp: which rate the limit goes by, decay that is coupled with the gradient, and the trace."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from update_clamp_runs import (
    CEILING,
    EITHER_WAY,
    SGDW,
    TOLERANCE,
    Run,
    adamw,
    assert_all_held,
    fan,
    limit_of,
    net,
    prepared,
    top,
)

import redline
import redline.spectrum_tracker
import redline.update_limits
from redline import RedlineWarning, UpdateClamp

# Rates ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_tensor", [False, True])
@EITHER_WAY
def test_the_limit_goes_with_the_rate_of_each_step(relative_to: Any, in_tensor: bool) -> None:
    factors = [1.0, 10.0, 0.01, 0.0, 3.0, 0.5]
    lr = torch.tensor(1e-2) if in_tensor else 1e-2
    run = Run(lambda model: [torch.optim.AdamW(model.parameters(), lr, weight_decay=0.5)])
    scheduler = LambdaLR(run.optimizers[0], lambda step: factors[min(step, len(factors) - 1)])
    limit, over = (2.0, []) if relative_to == "fan" else (0.05, [])
    with run.attach(UpdateClamp(limit, relative_to)) as session:
        for seed, factor in enumerate(factors):
            alone, before, rates = run.uncontrolled(), run.parameters, run.rates
            assert rates["0.weight"].lr == pytest.approx(1e-2 * factor)
            alone.step(seed)
            run.step(seed)
            over.append(any(assert_all_held(before, alone.parameters, run.parameters, limit, relative_to, rates)))
            rate = run.optimizers[0].param_groups[0]["lr"]
            assert isinstance(rate, Tensor) is in_tensor
            assert float(rate) == pytest.approx(1e-2 * factor), "not ours to change"
            scheduler.step()
            if relative_to == "fan":
                for name, ceiling in session.latest.layers(CEILING).items():
                    assert ceiling == pytest.approx(limit * fan(before[name]) / 0.5), "whatever the rate"
    assert over == [True, True, True, False, True, True] if relative_to == "fan" else 0 < sum(over) < len(over)


def test_the_rate_is_that_at_the_update_also_where_step_is_given_a_closure() -> None:
    alone, run = prepared(adamw), prepared(adamw)
    before = run.parameters

    def step(one: Run) -> None:
        def closure() -> Tensor:
            one.backward(3)
            one.optimizers[0].param_groups[0]["lr"] = 0.05
            return torch.zeros(())

        one.optimizers[0].step(closure)

    step(alone)
    with run.attach(UpdateClamp(0.5, "fan")):
        step(run)
    assert all(assert_all_held(before, alone.parameters, run.parameters, 0.5, "fan", alone.rates))


@pytest.mark.parametrize("on_accelerator", [False, True])
@pytest.mark.parametrize("in_tensor", [False, True])
def test_the_rate_is_that_of_the_update_also_where_a_schedule_goes_on_within_the_joint_step(
    in_tensor: bool, on_accelerator: bool, accelerated: Callable[[], None]
) -> None:
    """It may change a rate that is a tensor in place, ahead of the commit."""

    def optimizers(model: nn.Module) -> list[Optimizer]:
        first, *rest = model.parameters()
        return [
            SGDW([first], torch.tensor(0.1) if in_tensor else 0.1, weight_decay=0.5),
            torch.optim.AdamW(rest, 1e-2, weight_decay=0.5),
        ]

    def step(one: Run) -> None:
        one.give(3, {})
        one.optimizers[0].step()
        one.optimizers[0].param_groups[0]["lr"] *= 0.1
        one.optimizers[1].step()

    if on_accelerator:
        accelerated()
    alone, run = Run(optimizers), Run(optimizers)
    before, rates = run.parameters, run.rates
    step(alone)
    with run.attach(UpdateClamp(0.5, "fan")):
        step(run)
    assert all(assert_all_held(before, alone.parameters, run.parameters, 0.5, "fan", rates))


def muon_matching_adamw(model: nn.Module) -> list[Optimizer]:
    *matrices, head = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() != 2]
    return [
        torch.optim.Muon(matrices, 0.02, weight_decay=0.5, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([head, *vectors], 1e-2, weight_decay=0.2),
    ]


@EITHER_WAY
def test_where_a_rate_is_adjusted_to_the_shape_the_groups_own_is_gone_by_and_it_is_said_by_name(
    relative_to: Any,
) -> None:
    limit, run = (0.1 if relative_to == "fan" else 0.002), prepared(muon_matching_adamw)
    if relative_to == "fan":
        with pytest.warns(RedlineWarning, match=r"^UpdateClamp: Muon adjusts its rate .*\(match_rms_adamw\)") as said:
            session = run.attach(UpdateClamp(limit, "fan"))
        assert len(said) == 1
    else:
        session = run.attach(UpdateClamp(limit, "weight"))  # a warning would be an error
    with session:
        for seed in (3, 4):
            alone, before, rates = run.uncontrolled(), run.parameters, run.rates
            alone.step(seed)
            run.step(seed)
            assert all(assert_all_held(before, alone.parameters, run.parameters, limit, relative_to, rates))
        if relative_to == "fan":
            assert set(session.latest.layers(CEILING)) == {"0.weight", "2.weight", "4.weight"}


@pytest.mark.parametrize("adjusted", [None, "original"])
def test_muons_own_adjustment_needs_no_word(adjusted: Any) -> None:
    run = Run(
        lambda model: [torch.optim.Muon([p for p in model.parameters() if p.dim() == 2], 0.02, adjust_lr_fn=adjusted)]
    )
    with run.attach(UpdateClamp(1.0, "fan")) as session:
        run.step(1)
    assert session.notes == ()


# Decay that is coupled --------------------------------------------------------------------------------------------


def sgd_with_momentum(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.5)]


@EITHER_WAY
def test_where_decay_cannot_be_told_apart_the_whole_update_is_held_and_it_is_said_by_name(relative_to: Any) -> None:
    limit = 0.1 if relative_to == "fan" else 0.005
    run = prepared(sgd_with_momentum)
    with pytest.warns(RedlineWarning, match=r"^UpdateClamp: the weight decay of SGD is not decoupled") as said:
        session = run.attach(UpdateClamp(limit, relative_to))
    assert len(said) == len(session.notes) == 1
    assert "the whole update is clamped, and there is no ceiling" in session.notes[0]
    with session:
        for seed in range(3, 7):
            alone, before = run.uncontrolled(), run.parameters
            rates = {name: rate._replace(weight_decay=0.0) for name, rate in run.rates.items()}
            alone.step(seed)
            run.step(seed)  # a second warning would be an error
            assert any(assert_all_held(before, alone.parameters, run.parameters, limit, relative_to, rates))
        assert CEILING not in session.latest


def test_beside_coupled_decay_the_others_have_their_ceiling() -> None:
    def optimizers(model: nn.Module) -> list[Optimizer]:
        first, *rest = model.parameters()
        return [torch.optim.SGD([first], 0.1, momentum=0.9, weight_decay=0.5), torch.optim.AdamW(rest, 1e-2)]

    run = Run(optimizers)
    with pytest.warns(RedlineWarning, match="of SGD is not decoupled"):
        session = run.attach(UpdateClamp(1.0, "fan"))
    with session:
        run.step(1)
        assert set(session.latest.layers(CEILING)) == {"2.weight", "4.weight"}
    assert len(session.notes) == 1


def test_coupled_decay_of_vectors_is_no_matter() -> None:
    """Nor is that of matrices where it is 0, or where momentum is."""

    def optimizers(model: nn.Module) -> list[Optimizer]:
        first, second, *rest = [parameter for parameter in model.parameters() if parameter.dim() == 2]
        vectors = [parameter for parameter in model.parameters() if parameter.dim() == 1]
        groups = [{"params": vectors}, {"params": [first], "weight_decay": 0.0}]
        return [
            torch.optim.SGD([*groups, {"params": [second], "momentum": 0.0}], 0.1, momentum=0.9, weight_decay=0.5),
            torch.optim.AdamW(rest, 1e-2),
        ]

    run = Run(optimizers)
    with run.attach(UpdateClamp(1.0, "fan")) as session:  # a warning would be an error
        run.step(1)
        assert set(session.latest.layers(CEILING)) == {"2.weight", "4.weight"}
    assert session.notes == ()


# The trace --------------------------------------------------------------------------------------------------------


def test_an_intervention_tells_how_many_were_over_and_of_the_worst_what_was_seen_and_done() -> None:
    """The first matrix is under, so that a place among those over is none among all."""
    run = Run(lambda model: [torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.5)])
    with run.attach(UpdateClamp(1.0, "fan")) as session:
        for seed, (second, third) in enumerate([(2.0, 9.0), (9.0, 2.0), (1e-3, 3.0), (1e-3, 1e-3), (4.0, 6.4)]):
            run.give(seed, {"0": 1e-3, "2": second, "4": third})
            before, rates, alone = run.parameters, run.rates, run.uncontrolled()
            alone.update()
            told = len(session.interventions)
            run.update()
            seen = {
                name: (
                    top(net(before[name], own, rates[name].decay)),
                    limit_of(own, 1.0, "fan", rates[name]),
                )
                for name, own in alone.parameters.items()
                if own.dim() == 2
            }
            over = {name: sigma / limit for name, (sigma, limit) in seen.items() if sigma > limit}
            new = session.interventions[told:]
            assert len(new) == bool(over), "one a step"
            if not over:
                continue
            (one,) = new
            worst = max(over, key=lambda name: over[name])
            if seed == 4:
                assert worst != max(seen, key=lambda name: seen[name][0]), "the worst is not the longest here"
            sigma, limit = seen[worst]
            assert (one.step, one.controller, one.action) == (seed, "UpdateClamp", "scale")
            assert set(one.saw) == {"matrices", "worst", "sigma", "limit", "scale"}
            assert one.saw["matrices"] == len(over)
            assert one.saw["sigma"] == pytest.approx(sigma, rel=2 * TOLERANCE)
            assert one.saw["limit"] == pytest.approx(limit, rel=1e-6)
            assert one.saw["scale"] == pytest.approx(limit / sigma, rel=2 * TOLERANCE)
            assert one.reason == (
                f"sigma_1 of the update was over the limit in {len(over)} matrices, most in {worst}: "
                f"{one.saw['sigma']:.3g} over {one.saw['limit']:.3g}, scaled by {one.saw['scale']:.3g} there."
            )
        count = session.latest.value("redline_interventions_total", controller="UpdateClamp", action="scale")
        assert count == len(session.interventions) == 4
        (tally,) = session.report().to_dict()["interventions"]
        assert (tally["count"], tally["first_step"], tally["last_step"]) == (4, 0, 4)


def test_the_monitors_see_the_update_as_proposed_and_the_weights_as_committed() -> None:
    alone, run = prepared(adamw), prepared(adamw)
    before = run.parameters
    for one in (alone, run):
        one.optimizers[0].param_groups[0]["lr"] *= 30
    alone.step(3)
    with run.attach(
        UpdateClamp(0.1, "fan"), monitors=[redline.UpdateSpectrum(1), redline.WeightSpectrum(1)]
    ) as session:
        run.step(3)
        latest = session.latest
    for name in ("0.weight", "2.weight", "4.weight"):
        update = alone.parameters[name].double() - before[name].double()
        assert latest.value("redline_update_spectral_norm", layer=name) == pytest.approx(top(update), rel=1e-3)
        assert top(alone.parameters[name]) > 1.1 * top(run.parameters[name])
        weight = latest.value("redline_weight_spectral_norm", layer=name)
        assert weight == pytest.approx(top(run.parameters[name]), rel=1e-3)


def test_a_controller_that_is_used_again_starts_anew() -> None:
    clamp = UpdateClamp(0.1, "fan")
    strong = Run(adamw)
    strong.model.get_parameter("0.weight").data.mul_(100.0)
    with strong.attach(clamp) as session:
        strong.step(1)
        assert session.latest.value(CEILING, layer="0.weight") > 50
    with Run(adamw).attach(clamp) as session:
        pass
    weak = Run(adamw)
    with weak.attach(clamp) as session:
        weak.step(1)
        assert session.latest.value(CEILING, layer="0.weight") < 5
