"""Decisions on single matrices together: rates in force, several optimizers and controllers, half precision."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from bits import assert_same_bits, frozen
from matrix_decision_runs import (
    DECAYS,
    FACTORS,
    LAYERS,
    WD,
    Answer,
    Deciding,
    Elsewhere,
    Joint,
    Lengthening,
    Make,
    Numbers,
    Run,
    answers,
    assert_committed,
    decaying,
    each,
    elsewhere,
    jointly,
    muon_and_adamw,
    optimizers,
    over,
    scaling,
    two_adamw,
)
from torch import Tensor
from torch.optim import SGD, Adafactor, AdamW
from torch.optim.lr_scheduler import LambdaLR

from redline import (
    ConfigurationError,
    Reject,
    RunStoppedError,
    Scale,
)

# Together ---------------------------------------------------------------------------------------------------------


@optimizers([over(AdamW), over(SGD), muon_and_adamw])
@pytest.mark.parametrize("joint", [1.0, 0.4])
@pytest.mark.parametrize("order", list(itertools.permutations(range(2))), ids=["scale first", "decay first"])
def test_scale_and_decay_of_matrices_and_then_of_the_joint_step(
    make: Make, order: Sequence[int], joint: float, numbers: Numbers
) -> None:
    run = Run(make)
    before, net, decays = run.parameters, run.net(2), run.decays()
    answers = [scaling(FACTORS, numbers), decaying(DECAYS, numbers)]
    first, second = (Deciding(answers[k]) for k in order)
    clamp = Joint(jointly(joint))
    with run.attach(clamp, first, second):
        run.step(2)
    assert_committed(run, before, net, run.rates, decays, factors=FACTORS, decays=DECAYS, joint=joint)
    for name, seen in clamp.seen[0].items():
        decay = run.rates[name] * each(DECAYS, decays[name] / run.rates[name], name)
        left = each(FACTORS, 1.0, name) * net[name] - decay * before[name]
        torch.testing.assert_close(seen, left, rtol=0, atol=1e-13)


@pytest.mark.parametrize("order", list(itertools.permutations(range(2))), ids=["scale first", "decay first"])
def test_scale_and_decay_by_one_controller(order: Sequence[int], numbers: Numbers) -> None:
    run = Run(over(AdamW))
    before, net = run.parameters, run.net(2)
    answers = [scaling(FACTORS, numbers), decaying(DECAYS, numbers)]
    with run.attach(Deciding(*(answers[k] for k in order))):
        run.step(2)
    assert_committed(run, before, net, run.rates, run.decays(), factors=FACTORS, decays=DECAYS)


@pytest.mark.parametrize("whole", [False, True], ids=["of one parameter", "of the whole step"])
@pytest.mark.parametrize("decided", ["scale", "decay"])
@pytest.mark.parametrize("first", [0.5, 0.0])
def test_a_matrix_decision_after_a_scale_is_one_on_what_is_left(
    decided: str, first: float, whole: bool, numbers: Numbers
) -> None:
    """A scale is as if the rate had been another, for the decay too: that stays whole, or gives place to another."""
    run = Run(over(AdamW))
    before, net, rate, decay = run.parameters, run.net(2), 0.125, 0.125 * WD
    scale = Scale(first, "first.", None if whole else "wide.weight")
    answer = (scaling if decided == "scale" else decaying)({"wide.weight": 0.25}, numbers)
    controller = Deciding(answer)
    with run.attach(Deciding(lambda step: [scale]), controller):
        run.step(2)
    start, q = before["wide.weight"], first * net["wide.weight"]
    torch.testing.assert_close(controller.net[0]["wide.weight"], q, rtol=0, atol=1e-14)
    expected = start + (0.25 * q - first * decay * start if decided == "scale" else q - first * rate * 0.25 * start)
    torch.testing.assert_close(run.parameters["wide.weight"], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "when", [lambda: True, lambda: torch.tensor(True).as_subclass(Elsewhere)], ids=["known", "not"]
)
def test_a_rejected_step_goes_back_all_the_way(when: Callable[[], Any], numbers: Numbers) -> None:
    run = Run(over(AdamW))
    before = run.parameters
    answers = (scaling(FACTORS, numbers), decaying(DECAYS, numbers))
    rejecting = Joint(lambda step: [Reject("as told.", when=when())])
    with run.attach(Deciding(*answers), rejecting) as session:
        run.feed(2)
        with nullcontext() if isinstance(when(), Tensor) else pytest.raises(RunStoppedError, match="rejected step 0"):
            run.update()
        assert_same_bits(run.parameters, before)
        assert [one.action for one in session.interventions][-1] == "reject"
        if isinstance(when(), Tensor):  # it stops once that is read
            with pytest.raises(RunStoppedError, match="Joint rejected step 0: as told"):
                run.update()
        assert_same_bits(run.parameters, before)


@pytest.mark.parametrize("decided", ["scale", "decay"])
def test_a_step_that_was_rejected_stays_rejected_whatever_is_decided_then(decided: str) -> None:
    run = Run(over(AdamW))
    before = run.parameters
    answer = (scaling if decided == "scale" else decaying)({"wide.weight": 0.25}, elsewhere)
    rejecting = Deciding(lambda step: [Reject("as told.", when=torch.tensor(True).as_subclass(Elsewhere))])
    with run.attach(rejecting, Deciding(answer)):
        run.step(2)
        assert_same_bits(run.parameters, before)


# Half precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("factors", "decays"), [(FACTORS, DECAYS), (FACTORS, {}), ({}, DECAYS)], ids=["both", "scaled", "decayed"]
)
def test_half_precision_is_computed_in_float32_and_rounded_once(
    factors: Mapping[str, float], decays: Mapping[str, float], numbers: Numbers
) -> None:
    """Of the update as it was applied, rounded to bfloat16 by the optimizer; it is as large as the weights."""
    run = Run(over(SGD, lr=0.5), torch.bfloat16, steps=0)
    alone, before = run.twin(), run.parameters
    alone.step(2)
    with run.attach(Deciding(scaling(factors, numbers), decaying(decays, numbers))):
        run.step(2)
    for name in ("wide.weight", "conv.weight", "turned.weight", "experts"):
        start, after = before[name].double(), alone.parameters[name].double()
        factor, decay = each(factors, 1.0, name), each(decays, WD, name)
        expected = start + factor * (after - start + 0.5 * WD * start) - 0.5 * decay * start
        assert torch.equal(run.parameters[name], expected.bfloat16()), name


def test_updates_are_shown_in_float32_for_half_precision(numbers: Numbers) -> None:
    run = Run(over(SGD, lr=0.5), torch.bfloat16, steps=0)
    second = Joint()
    with run.attach(Deciding(scaling(FACTORS, numbers)), second):
        run.step(2)
    assert {tensor.dtype for tensor in (*second.seen[0].values(), *second.net[0].values())} == {torch.float32}
    assert {tensor.dtype for tensor in run.parameters.values()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@optimizers([over(AdamW), over(AdamW, fused=True), over(SGD), two_adamw])
def test_other_precisions_to_their_own_rounding(make: Make, dtype: torch.dtype, numbers: Numbers) -> None:
    """``q`` is then what the applied update was without its decay, ``p + lr * wd * W``."""
    run = Run(make, dtype)
    alone, before = run.twin(), run.parameters
    decays = run.decays()
    alone.step(2)
    net = {
        name: after.double() - before[name].double() * (1 - decays[name]) for name, after in alone.parameters.items()
    }
    with run.attach(Deciding(decaying(DECAYS, numbers), scaling(FACTORS, numbers)), Joint(jointly(0.75))):
        run.step(2)
    assert_committed(run, before, net, run.rates, decays, factors=FACTORS, decays=DECAYS, joint=0.75)


# The rates of the step --------------------------------------------------------------------------------------------


def test_the_rates_are_those_of_each_step_as_schedules_set_them(numbers: Numbers) -> None:
    run = Run(over(AdamW))
    scheduler = LambdaLR(run.optimizers[0], lambda step: 0.5**step)
    with run.attach(Deciding(scaling(FACTORS, numbers))):
        for seed in range(2, 6):
            run.optimizers[0].param_groups[0]["weight_decay"] = 0.1 * seed
            before, net, rates, decays = run.parameters, run.net(seed), run.rates, run.decays()
            run.step(seed)
            assert_committed(run, before, net, rates, decays, factors=FACTORS)
            scheduler.step()


@optimizers([muon_and_adamw, two_adamw])
def test_a_scheduler_that_steps_between_the_optimizers_of_a_joint_step_comes_too_late_for_it(
    make: Make, numbers: Numbers
) -> None:
    run = Run(make)
    before, net, rates, decays = run.parameters, run.net(2), run.rates, run.decays()
    group = run.optimizers[0].param_groups[0]
    schedulers = [LambdaLR(run.optimizers[0], lambda step: 0.1**step)]
    assert run.rates == rates
    run.feed(2)
    controller = Deciding(*answers(numbers))
    with run.attach(controller):
        run.optimizers[0].step()
        schedulers[0].step()
        group["weight_decay"] = 5.0
        run.optimizers[1].step()
    assert float(group["lr"]) == pytest.approx(0.1 * rates["wide.weight"])
    assert_committed(run, before, net, rates, decays, factors=FACTORS, decays={"wide.weight": 0.25, "experts[1]": 0.0})
    assert {name: float(one.lr) for name, one in controller.rates[0].items()} == rates


def test_rates_that_the_closure_sets_are_those_of_the_step(numbers: Numbers) -> None:
    run = Run(over(AdamW))
    group = run.optimizers[0].param_groups[0]
    group.update(lr=9.0, weight_decay=9.0)
    before, twin = run.parameters, run.twin(lr=0.25, weight_decay=0.0)
    twin.step(2)
    net = {name: tensor - before[name] for name, tensor in twin.parameters.items()}

    def closure() -> None:
        group.update(lr=0.25, weight_decay=0.5)
        run.feed(2)

    with run.attach(Deciding(scaling(FACTORS, numbers))):
        run.optimizers[0].step(closure)
    rates = dict.fromkeys(before, 0.25)
    assert_committed(run, before, net, rates, dict.fromkeys(before, 0.125), factors=FACTORS)


def test_rates_in_tensors_of_an_accelerator(numbers: Numbers) -> None:
    run = Run(over(AdamW, lr=torch.tensor(0.125).as_subclass(Elsewhere), foreach=False), torch.float32)
    before, net, rates, decays = run.parameters, run.net(2), run.rates, run.decays()
    controller, second = Deciding(*answers(numbers)), Joint()
    with run.attach(controller, second):
        run.step(2)
    assert isinstance(controller.rates[0]["wide.weight"].lr, Elsewhere)
    assert_committed(run, before, net, rates, decays, factors=FACTORS, decays={"wide.weight": 0.25, "experts[1]": 0.0})
    for name, tensor in second.net[0].items():
        expected = each(FACTORS, 1.0, name) * net[name]
        torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-6)


def test_a_session_without_decisions_on_single_parameters_has_no_rates() -> None:
    """It tries no optimizer out."""
    run = Run(over(AdamW))
    joint = Joint(jointly(0.5))
    with run.attach(joint):
        run.step(2)
    assert joint.rates == [{}]


# Several optimizers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skipped", [0, 1])
def test_of_a_joint_step_of_which_one_was_skipped_the_others_matrices_are_decided_on(
    skipped: int, numbers: Numbers
) -> None:
    run = Run(muon_and_adamw)
    before, net, rates, decays = run.parameters, run.net(2), run.rates, run.decays()
    of = ["wide.weight"] if skipped else [name for name in LAYERS if name != "wide.weight"]
    factors = {name: FACTORS[name] for name in of}
    controller = Deciding(scaling(factors, numbers), decaying({name: DECAYS[name] for name in of}, numbers))
    run.feed(2)
    with run.attach(controller):
        run.optimizers[1 - skipped].step()
    untouched = [name for name in before if (name == "wide.weight") is (skipped == 0)]
    assert controller.rates[0].keys() == before.keys() - set(untouched)
    assert_same_bits({name: run.parameters[name] for name in untouched}, {name: before[name] for name in untouched})
    for name in untouched:
        net[name] = torch.zeros_like(net[name])
        decays[name] = 0.0
    assert_committed(run, before, net, rates, decays, factors=factors, decays={name: DECAYS[name] for name in of})


@pytest.mark.parametrize("decided", ["scale", "decay"])
def test_a_decision_on_a_matrix_whose_optimizer_was_skipped_is_refused(decided: str) -> None:
    run = Run(muon_and_adamw)
    answer = (scaling if decided == "scale" else decaying)({"conv.weight": 0.5, "wide.weight": 0.5})
    run.feed(2)
    alone = run.twin()
    session = run.attach(Deciding(answer))
    alone.feed(2)
    alone.optimizers[1].step()
    run.optimizers[1].step()
    with pytest.raises(
        ConfigurationError,
        match=r"got a decision on 'wide\.weight' from Deciding, which the step did not move; expected the name",
    ):
        session.close()
    assert_same_bits(run.parameters, alone.parameters)


# Steps that leave a matrix out ------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [over(AdamW), over(SGD), over(Adafactor)], ids=lambda make: make.__name__)
def test_a_matrix_without_a_gradient_stays_where_the_optimizer_leaves_it(make: Make, numbers: Numbers) -> None:
    """Such as that of an expert that no token went to: it is skipped, and not decayed either."""
    run = Run(make)
    before, net, decays = run.parameters, run.net(2), run.decays()
    run.feed(2)
    run.model.wide.weight.grad = None
    controller = Deciding(scaling(FACTORS, numbers))
    with run.attach(controller):
        run.update()
    assert frozen(run.parameters["wide.weight"]) == frozen(before["wide.weight"])
    assert not controller.net[0]["wide.weight"].any()
    net["wide.weight"], decays["wide.weight"] = torch.zeros_like(net["wide.weight"]), 0.0
    assert_committed(run, before, net, run.rates, decays, factors=FACTORS)


def test_decay_lets_no_matrix_without_a_gradient_grow(numbers: Numbers) -> None:
    run = Run(over(AdamW))
    before = run.parameters["wide.weight"]
    run.feed(2)
    run.model.wide.weight.grad = None
    with run.attach(Deciding(decaying({"wide.weight": 0.25}, numbers))):
        run.update()
    # Skipped, as the optimizer skips it, or decayed as it was told to be.
    allowed = [before, before - 0.125 * 0.25 * before]
    assert any(torch.allclose(run.parameters["wide.weight"], one, rtol=0, atol=1e-14) for one in allowed)


@pytest.mark.parametrize("decided", ["scale", "decay"])
def test_a_fused_step_that_a_scaler_made_a_no_op_stays_one(decided: str, numbers: Numbers) -> None:
    run = Run(over(AdamW, fused=True), torch.float32)
    before = run.parameters
    answer = (scaling if decided == "scale" else decaying)(dict.fromkeys(LAYERS, 0.25), numbers)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with run.attach(Deciding(answer)):
        x = torch.ones(1, 5)
        run.feed(2)
        scaler.scale(run.model(x).sum()).backward()
        run.model.wide.weight.grad[0, 0] = math.inf
        scaler.step(run.optimizers[0])
        scaler.update()
    assert scaler.get_scale() == 2.0, "there was an overflow"
    assert_same_bits(run.parameters, before)


# The order of the controllers -------------------------------------------------------------------------------------


def test_what_lengthens_first_then_single_matrices_then_the_rest() -> None:
    """So that clamps have the last word."""
    asked: list[str] = []

    def note(name: str, *decisions: Answer) -> tuple[Answer, ...]:
        return (lambda step: (asked.append(name), [])[1], *decisions)

    run = Run(over(AdamW))
    before, net = run.parameters, run.net(2)
    controllers = [
        Joint(*note("joint", jointly(0.5))),
        Lengthening(*note("lengthening", jointly(3.0))),
        Joint(*note("another joint")),
        Deciding(*note("scaling", scaling(FACTORS))),
        Deciding(*note("decaying", decaying(DECAYS))),
        Lengthening(*note("another lengthening")),
    ]
    with run.attach(*controllers) as session:
        run.step(2)
    assert asked == ["lengthening", "another lengthening", "scaling", "decaying", "joint", "another joint"]
    assert_committed(run, before, net, run.rates, run.decays(), factors=FACTORS, decays=DECAYS, joint=1.5)
    assert [one.controller for one in session.interventions] == ["Lengthening", "Deciding", "Deciding-2", "Joint"]
    assert session.latest.value("redline_step_scale") == 1.5
    left = [dict.fromkeys(LAYERS, 1.0), dict.fromkeys(LAYERS, 3.0), {name: 3.0 * FACTORS[name] for name in LAYERS}]
    for controller, factors in zip((controllers[1], controllers[3], controllers[0]), left, strict=True):
        for name in set(net) - {"wide.bias"}:
            expected = each(factors, 1.0, name) * net[name]
            torch.testing.assert_close(controller.net[0][name], expected, rtol=0, atol=1e-13)
