"""Several optimizers make one joint step, which is decided once and as a whole."""

from __future__ import annotations

import pytest
import torch
from bits import assert_same_bits
from torch import Tensor
from torch_optimizers import muon_and_adamw
from transaction_runs import Deciding, Run, assert_scaled, at, prepared, scaling, withholding

from redline import Reject


def test_joint_step_is_decided_once_over_the_parameters_of_all() -> None:
    alone, run = prepared(muon_and_adamw), prepared(muon_and_adamw)
    before = run.parameters
    alone.step(3)
    controller = scaling(0.5)
    with run.attach(controller) as session:
        run.backward(3)
        run.optimizers[0].step()
        assert controller.seen == [], "open until each has stepped"
        run.optimizers[1].step()
        assert len(controller.seen) == 1
        assert session.latest.value("redline_steps_total") == 1
    assert controller.seen[0].keys() == before.keys()
    assert_scaled(run.parameters, before, alone.parameters, dict.fromkeys(before, 0.5))


def test_order_of_the_optimizers_does_not_matter() -> None:
    alone, run = prepared(muon_and_adamw), prepared(muon_and_adamw)
    before = run.parameters
    alone.step(3)
    with run.attach(scaling(0.5)):
        run.backward(3)
        for optimizer in reversed(run.optimizers):
            optimizer.step()
    assert_scaled(run.parameters, before, alone.parameters, dict.fromkeys(before, 0.5))


@pytest.mark.parametrize("skipped", [0, 1])
def test_joint_step_of_which_one_was_skipped_is_committed_before_the_next_forward(skipped: int) -> None:
    run, alone = prepared(muon_and_adamw), prepared(muon_and_adamw)
    before = run.parameters
    alone.backward(3)
    alone.optimizers[1 - skipped].step()
    factors = {name: 0.5 if (tensor.dim() == 2) == (skipped == 1) else 1.0 for name, tensor in before.items()}
    controller = scaling(0.5)
    seen_by_forward: list[dict[str, Tensor]] = []
    with run.attach(controller) as session:
        run.backward(3)
        run.optimizers[1 - skipped].step()
        with torch.no_grad():
            run.model(torch.zeros(2, 200))
        run.model.eval()
        run.model(torch.zeros(2, 200))
        run.model.train()
        assert controller.seen == [], "neither a forward without gradients nor one in eval mode ends the step"
        handle = run.model.body.register_forward_pre_hook(lambda *_: seen_by_forward.append(run.parameters))
        run.model(torch.zeros(2, 200))
        handle.remove()
        assert len(controller.seen) == 1
        assert session.latest.value("redline_steps_total") == 1
        assert_scaled(run.parameters, before, alone.parameters, factors)
        assert_same_bits(seen_by_forward[0], run.parameters)
        run.step(4)
        assert len(controller.seen) == 2
        assert controller.seen[1].keys() == before.keys()


def test_joint_step_of_which_one_was_skipped_is_committed_before_another_steps_again() -> None:
    run, alone = prepared(muon_and_adamw), prepared(muon_and_adamw)
    before = run.parameters
    alone.backward(3)
    alone.optimizers[0].step()
    controller = scaling(0.5)
    with run.attach(controller) as session:
        run.backward(3)
        run.optimizers[0].step()
        committed: list[dict[str, Tensor]] = []
        # A hook added later runs later: after the commit, before the second update.
        handle = run.optimizers[0].register_step_pre_hook(lambda *_: committed.append(run.parameters))
        run.optimizers[0].step()
        handle.remove()
        assert len(controller.seen) == 1
        assert session.latest.value("redline_steps_total") == 1
        run.optimizers[1].step()
        assert len(controller.seen) == 2
    factors = {name: 0.5 if tensor.dim() == 2 else 1.0 for name, tensor in before.items()}
    assert_scaled(committed[0], before, alone.parameters, factors)


def test_joint_step_left_open_is_committed_on_close() -> None:
    run, alone = prepared(muon_and_adamw), prepared(muon_and_adamw)
    before = run.parameters
    alone.backward(3)
    alone.optimizers[0].step()
    with run.attach(scaling(0.5)) as session:
        run.backward(3)
        run.optimizers[0].step()
    assert session.latest.value("redline_steps_total") == 1
    factors = {name: 0.5 if tensor.dim() == 2 else 1.0 for name, tensor in before.items()}
    assert_scaled(run.parameters, before, alone.parameters, factors)


@pytest.mark.parametrize("decided", ["withheld", "rejected"])
def test_joint_step_is_withheld_or_rejected_as_a_whole_even_if_one_was_skipped(decided: str) -> None:
    run = prepared(muon_and_adamw)
    controller = Deciding(
        at(0, Reject("as told.")) if decided == "rejected" else lambda step: (),
        withhold=withholding(0) if decided == "withheld" else lambda step: None,
        snapshots_state=True,
    )
    before, state = run.parameters, run.state
    with run.attach(controller):
        run.backward(3)
        run.optimizers[1].step()
        run.model(torch.zeros(2, 200))
        assert_same_bits(run.parameters, before)
        assert run.state == state
    assert run.model.get_parameter("body.bias").grad is not None


def test_parameter_of_two_optimizers_goes_back_to_before_the_first() -> None:
    run = Run(lambda model: [torch.optim.SGD(model.parameters(), 0.1), torch.optim.SGD(model.parameters(), 0.2)])
    before = run.parameters
    with run.attach(scaling(0.0)):
        run.step(1)
    assert_same_bits(run.parameters, before)
