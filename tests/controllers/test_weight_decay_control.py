"""WeightDecayControl: what is committed, and when it is due."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from bits import frozen
from torch import Tensor, nn
from torch.optim import Optimizer
from weight_decay_runs import (
    BODY,
    EVERY_OPTIMIZER,
    HEAD,
    IN_FORCE,
    Run,
    Stack,
    adamw,
    adamw_in_groups,
    assert_decayed_by,
    true_sigma,
)

import redline
from redline import WeightDecayControl

# What is committed ------------------------------------------------------------------------------------------------


@EVERY_OPTIMIZER
def test_the_decay_that_is_read_is_the_decay_that_is_committed(
    optimizers: Callable[[nn.Module], list[Optimizer]],
) -> None:
    run = Run(optimizers)
    differ = 0
    with run.attach(WeightDecayControl({BODY: 2.0, HEAD: 0.3}, every=3, horizon=6, bounds=(0.01, 2.0))):
        for seed in range(10):
            alone, before = run.uncontrolled(), run.parameters
            alone.step(seed)
            run.step(seed)
            after = run.parameters
            for name in (BODY, HEAD):
                group = run.group_of(name)
                decay = run.in_force()[name]
                differ += decay != group["weight_decay"]
                assert_decayed_by(
                    after[name], before[name], alone.parameters[name], float(group["lr"]), group["weight_decay"], decay
                )
            for name in after.keys() - {BODY, HEAD}:
                assert torch.equal(after[name], alone.parameters[name]), "vectors are the optimizer's own"
            assert frozen([o.state_dict() for o in run.optimizers]) == frozen(
                [o.state_dict() for o in alone.optimizers]
            )
    assert differ > 10


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_decay_that_is_read_is_committed_in_other_precisions(dtype: torch.dtype) -> None:
    run = Run(adamw, dtype=dtype)
    with run.attach(WeightDecayControl({BODY: 2.0, HEAD: 0.3}, every=2, horizon=2)):
        for seed in range(6):
            alone, before = run.uncontrolled(), run.parameters
            alone.step(seed)
            run.step(seed)
            for name in (BODY, HEAD):
                decay = run.in_force()[name]
                assert decay != pytest.approx(0.3)
                assert_decayed_by(run.parameters[name], before[name], alone.parameters[name], 2e-2, 0.3, decay)


@pytest.mark.parametrize("group_decay", [0.0, 0.3])
def test_the_run_is_one_whose_groups_have_the_decays_in_force(group_decay: float) -> None:
    """Each matrix in a group of its own, whose decay follows what is read."""
    run = Run(partial(adamw, weight_decay=group_decay))
    twin = Run(
        lambda model: [
            torch.optim.AdamW(
                [{"params": [p], "weight_decay": group_decay} for p in model.parameters()],
                lr=2e-2,
            )
        ]
    )
    with run.attach(WeightDecayControl({BODY: 1.1, HEAD: 0.9}, every=4, horizon=20)):
        for seed in range(30):
            run.step(seed)
            for name, decay in run.in_force().items():
                twin.group_of(name)["weight_decay"] = decay
            twin.step(seed)
    for name, parameter in run.parameters.items():
        torch.testing.assert_close(parameter, twin.parameters[name], rtol=1e-4, atol=1e-5)
    assert min(run.in_force().values()) > 0, "it brings its own"


def test_matrices_of_a_stack_have_decays_of_their_own() -> None:
    """A convolution, and one expert of three: the others keep their group's."""
    run = Run(adamw, Stack)
    target = {"experts[1]": 0.5, "conv.weight": 0.2}
    with run.attach(WeightDecayControl(target, every=2, horizon=2)) as session:
        for seed in range(5):
            alone, before = run.uncontrolled(), run.parameters
            alone.step(seed)
            run.step(seed)
            decays = run.in_force()
            assert decays.keys() == target.keys()
            each = torch.tensor([0.3, decays["experts[1]"], 0.3])
            after, proposed = run.parameters, alone.parameters
            for e, decay in enumerate(each.tolist()):
                assert_decayed_by(after["experts"][e], before["experts"][e], proposed["experts"][e], 2e-2, 0.3, decay)
            assert_decayed_by(
                after["conv.weight"], before["conv.weight"], proposed["conv.weight"], 2e-2, 0.3, decays["conv.weight"]
            )
            assert torch.equal(after["head.weight"], proposed["head.weight"])
            if seed == 0:
                first = session.interventions[0]
                sigmas = [true_sigma(before["experts"][1]), true_sigma(before["conv.weight"].flatten(1))]
                worst = int(first.saw["worst"])
                assert worst == int(np.argmax(np.abs(np.log(np.array(sigmas) / list(target.values())))))
                assert first.saw["sigma"] == pytest.approx(sigmas[worst], rel=1e-3)
            assert min(decays.values()) > 0.3


@EVERY_OPTIMIZER
def test_the_groups_are_not_touched(optimizers: Callable[[nn.Module], list[Optimizer]]) -> None:
    run = Run(optimizers)
    groups = [group for optimizer in run.optimizers for group in optimizer.param_groups]
    settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    numbers = copy.deepcopy(settings)
    parameters = [list(group["params"]) for group in groups]
    with run.attach(WeightDecayControl({BODY: 1.0, HEAD: 0.3}, every=2, horizon=2)):
        for seed in range(6):
            run.step(seed)
            now = [group for optimizer in run.optimizers for group in optimizer.param_groups]
            for group, same, setting, number, held in zip(now, groups, settings, numbers, parameters, strict=True):
                assert group is same
                assert {key: value for key, value in group.items() if key != "params"} == number
                assert all(group[key] is value for key, value in setting.items() if isinstance(value, Tensor))
                assert all(a is b for a, b in zip(group["params"], held, strict=True))
    assert len(run.in_force()) == 2


def test_a_rate_in_a_tensor_is_the_same_rate() -> None:
    ends = []
    for lr in (2e-2, torch.tensor(2e-2, dtype=torch.float64)):
        run = Run(partial(adamw, lr=lr, foreach=False))
        with run.attach(WeightDecayControl({BODY: 1.0, HEAD: 0.3}, every=4, horizon=8)):
            for seed in range(12):
                run.step(seed)
                if seed == 5:
                    for group in run.optimizers[0].param_groups:
                        group["lr"] *= 0.5  # in place, where it is a tensor
        ends.append((run.parameters, run.in_force()))
    for name, parameter in ends[0][0].items():
        torch.testing.assert_close(parameter, ends[1][0][name])
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-4)


# When it is due ---------------------------------------------------------------------------------------------------


@EVERY_OPTIMIZER
def test_before_it_freezes_the_run_is_its_own_to_the_bit(
    optimizers: Callable[[nn.Module], list[Optimizer]],
) -> None:
    alone, run = Run(optimizers), Run(optimizers)
    with run.attach(WeightDecayControl(freeze_at=6, every=2, horizon=2)) as session:
        alone.steps(0, 6)
        run.steps(0, 6)
        assert run.everything == alone.everything
        assert session.interventions == ()
        assert run.in_force() == {}
        stood = {name: true_sigma(run.parameters[name]) for name in (BODY, HEAD)}
        run.steps(6, 9)
        alone.steps(6, 9)
        assert {name: run.group_of(name)["weight_decay"] for name in stood} != run.in_force()
        assert run.everything != alone.everything
    assert [one.step for one in session.interventions] == [6, 8]
    first = session.interventions[0]
    name = (BODY, HEAD)[int(first.saw["worst"])]
    assert first.saw["target"] == first.saw["sigma"] == pytest.approx(stood[name], rel=1e-3)


def test_at_the_step_at_which_it_freezes_the_groups_decay_is_still_in_force() -> None:
    """It is taken for what holds the matrix at rest."""
    run = Run(adamw_in_groups)
    with run.attach(WeightDecayControl()):
        run.step(0)
        assert run.in_force() == pytest.approx({BODY: 0.7, HEAD: 0.2}, rel=1e-5)


def test_without_a_target_matrices_that_do_not_decay_are_left_alone() -> None:
    def optimizers(model: nn.Module) -> list[Optimizer]:
        (body, *others) = model.parameters()
        return [torch.optim.AdamW([{"params": [body], "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}])]

    alone, run = Run(optimizers), Run(optimizers)
    with run.attach(WeightDecayControl(every=1, horizon=1)):
        alone.step(0)
        run.step(0)
        assert list(run.in_force()) == [BODY]
        for name in run.parameters.keys() - {BODY}:
            assert torch.equal(run.parameters[name], alone.parameters[name])


def test_targets_may_be_given_in_any_order() -> None:
    runs = []
    for target in ({BODY: 1.1, HEAD: 0.7}, {HEAD: 0.7, BODY: 1.1}):
        run = Run()
        with run.attach(WeightDecayControl(target, every=2, horizon=10)):
            run.steps(0, 6)
            runs.append((run.everything, run.in_force()))
    assert runs[0] == runs[1]


def test_a_large_matrix_is_measured_to_a_thousandth() -> None:
    """From a cold start, and warm after it has moved."""
    torch.manual_seed(0)
    model = nn.Linear(200, 300, bias=False)
    nn.init.normal_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    control = WeightDecayControl({"weight": 1.0}, every=1, horizon=1000)
    with redline.attach(model, optimizer, monitors=[], controllers=[control]) as session:
        for index in range(3):
            expected = true_sigma(model.weight)
            model(torch.randn(20, 200)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert session.interventions[index].saw["sigma"] == pytest.approx(expected, rel=2e-3)


def test_with_a_target_freeze_at_says_nothing() -> None:
    run = Run()
    with run.attach(WeightDecayControl({BODY: 1.0}, freeze_at=5)):
        run.step(0)
        assert list(run.in_force()) == [BODY]


def test_matrices_without_a_target_keep_the_optimizers_own_step() -> None:
    alone, run = Run(), Run()
    with run.attach(WeightDecayControl({HEAD: 0.1}, every=1, horizon=1)):
        alone.step(0)
        run.step(0)
    for name in run.parameters:
        assert torch.equal(run.parameters[name], alone.parameters[name]) is (name != HEAD)


@pytest.mark.parametrize("every", [1, 4, 20])
def test_it_tells_of_each_measurement_and_of_the_layer_that_is_farthest_off(every: int) -> None:
    run, target = Run(), {BODY: 1.1, HEAD: 0.95}
    sigmas, decays = [], []
    with run.attach(WeightDecayControl(target, every=every, horizon=20)) as session:
        for seed in range(21):
            before = run.parameters
            run.step(seed)
            if seed % every == 0:
                sigmas.append({name: true_sigma(before[name]) for name in target})
                decays.append(run.in_force())
            assert session.latest.measured_at[redline.Series(IN_FORCE, (BODY,))] == seed - seed % every
    assert [one.step for one in session.interventions] == list(range(0, 21, every))
    for one, sigma, decay in zip(session.interventions, sigmas, decays, strict=True):
        off = {name: abs(math.log(sigma[name] / target[name])) for name in target}
        farthest = max(off, key=lambda name: off[name])
        assert (one.controller, one.action) == ("WeightDecayControl", "decay")
        assert [BODY, HEAD][int(one.saw["worst"])] == farthest
        assert one.saw["sigma"] == pytest.approx(sigma[farthest], rel=1e-3)
        assert one.saw["target"] == pytest.approx(target[farthest])
        assert one.saw["weight_decay"] == pytest.approx(decay[farthest])
        assert one.reason == (
            f"the decay of 2 matrices was set; {farthest} is farthest from its target, with sigma_1 = "
            f"{one.saw['sigma']:.4g} where {target[farthest]:.4g} was asked: its weight decay is "
            f"{one.saw['weight_decay']:.3g}."
        )
    counted = session.latest.value("redline_interventions_total", controller="WeightDecayControl", action="decay")
    assert counted == len(session.interventions)


def test_a_matrix_twice_as_strong_as_asked_is_as_far_off_as_one_half_as_strong() -> None:
    run = Run()
    sigma = {name: true_sigma(run.parameters[name]) for name in (BODY, HEAD)}
    with run.attach(WeightDecayControl({BODY: 2.1 * sigma[BODY], HEAD: sigma[HEAD] / 2})) as session:
        run.step(0)
    assert session.interventions[0].saw["worst"] == 0


def test_r_of_a_step_whose_decay_was_changed_is_not_read_from_the_proposal() -> None:
    run = Run()
    with run.attach(WeightDecayControl({BODY: 0.1}), monitors=[redline.GhostRadius(1)]) as session:
        run.step(0)
        assert "redline_normalized_step_size" in session.latest
        assert "redline_committed_step_size" not in session.latest
        assert session.latest.value("redline_step_scale") == 1


def test_a_layer_that_joins_between_two_measurements_keeps_its_groups_decay_until_the_next() -> None:
    run = Run(adamw)
    body = run.model.get_parameter(BODY)
    body.requires_grad_(False)
    with run.attach(WeightDecayControl({BODY: 1.2, HEAD: 0.5}, every=5, horizon=10)) as session:
        for seed in range(12):
            if seed == 7:
                body.requires_grad_(True)
            alone = run.uncontrolled()
            alone.step(seed)
            run.step(seed)
            if seed < 10:
                assert torch.equal(run.parameters[BODY], alone.parameters[BODY])
            assert all(parameter.isfinite().all() for parameter in run.parameters.values())
        assert set(session.latest.layers("redline_weight_decay_in_force")) == {BODY, HEAD}
