"""WeightDecayControl resumed, and on an accelerator."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from bits import frozen
from runs import HostReads
from torch import nn
from torch.optim import Optimizer
from weight_decay_runs import (
    BODY,
    EVERY_OPTIMIZER,
    HEAD,
    Net,
    Run,
    Stack,
    adamw,
    adamw_fused,
    muon_and_adamw,
    sgd,
    true_sigma,
)

from redline import WeightDecayControl
from redline.numerics import top_singular_values

# State ------------------------------------------------------------------------------------------------------------


CONTROLS: dict[str, Callable[[], WeightDecayControl]] = {
    "target": lambda: WeightDecayControl({BODY: 1.1, HEAD: 0.9}, every=4, horizon=20),
    "frozen": lambda: WeightDecayControl(freeze_at=6, every=4, horizon=20),
    "frozen at once": lambda: WeightDecayControl(every=4, horizon=20),
}


def saved(*parts: Any) -> list[Any]:
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("optimizers", [adamw_fused, muon_and_adamw], ids=lambda make: make.__name__)
def test_a_run_may_be_cut_after_every_step(control: str, optimizers: Callable[[nn.Module], list[Optimizer]]) -> None:
    """And loaded into a model that starts elsewhere."""
    through = Run(optimizers)
    with through.attach(CONTROLS[control]()) as whole:
        through.steps(0, 20)
    run = Run(optimizers)
    session = run.attach(CONTROLS[control]())
    for index in range(20):
        run.step(index)
        states = saved(run.model, *run.optimizers, session)
        session.close()
        run = Run(optimizers)
        for parameter in run.model.parameters():
            parameter.data.mul_(2)
        session = run.attach(CONTROLS[control]())
        for part, state in zip((run.model, *run.optimizers, session), states, strict=True):
            part.load_state_dict(state)
    assert run.everything == through.everything
    assert frozen([vars(one) for one in session.interventions]) == frozen([vars(one) for one in whole.interventions])
    assert frozen(session.state_dict()["control"]) == frozen(whole.state_dict()["control"])
    session.close()


def test_without_its_state_it_would_be_another_run() -> None:
    runs = []
    for loads in (True, False):
        run = Run()
        session = run.attach(CONTROLS["target"]())
        run.steps(0, 6)
        states = saved(run.model, *run.optimizers, session)
        session.close()
        with run.attach(CONTROLS["target"]()) as again:
            if loads:
                again.load_state_dict(states[-1])
            run.steps(6, 12)
        runs.append(run.everything)
    assert runs[0] != runs[1]


@pytest.mark.parametrize(
    ("there", "here"),
    [
        (lambda: WeightDecayControl({HEAD: 0.5}, every=4, horizon=8), CONTROLS["target"]),
        (CONTROLS["target"], lambda: WeightDecayControl({HEAD: 0.5}, every=4, horizon=8)),
        (CONTROLS["target"], lambda: WeightDecayControl({BODY: 0.9}, every=4, horizon=8)),
    ],
    ids=["fewer", "more", "others"],
)
def test_a_state_of_other_layers_is_not_used(
    there: Callable[[], WeightDecayControl], here: Callable[[], WeightDecayControl]
) -> None:
    run = Run()
    session = run.attach(there())
    run.steps(0, 6)
    state = copy.deepcopy(session.state_dict())
    session.close()
    fresh = run.uncontrolled()
    with run.attach(here()) as loaded, fresh.attach(here()):
        loaded.load_state_dict(state)
        run.steps(6, 12)
        fresh.steps(6, 12)
        assert run.in_force() == fresh.in_force()
    assert run.everything == fresh.everything


def test_a_target_that_is_given_outranks_one_that_is_loaded() -> None:
    """As any other argument does: a run that goes on with another target goes to that one."""
    run = Run()
    session = run.attach(WeightDecayControl({BODY: 2.0}, every=2, horizon=20))
    run.steps(0, 6)
    state = copy.deepcopy(session.state_dict())
    session.close()
    with run.attach(WeightDecayControl({BODY: 1.2}, every=2, horizon=20)) as session:
        session.load_state_dict(state)
        run.steps(6, 206)
        assert session.interventions[-1].saw["target"] == pytest.approx(1.2)
    assert true_sigma(run.parameters[BODY]) == pytest.approx(1.2, rel=0.1)


@pytest.mark.parametrize("control", CONTROLS)
def test_it_can_be_used_in_one_session_after_another(control: str) -> None:
    used, ends = CONTROLS[control](), []
    for one in (used, used, CONTROLS[control]()):
        run = Run()
        with run.attach(one) as session:
            run.steps(0, 12)
            ends.append((run.everything, run.in_force(), frozen([vars(one) for one in session.interventions])))
    assert ends[1] == ends[2] == ends[0]


def test_in_a_second_session_over_another_model_it_holds_that_ones_layers() -> None:
    control = WeightDecayControl(every=2, horizon=2)
    run = Run()
    with run.attach(control):
        run.steps(0, 3)
        assert list(run.in_force()) == [BODY, HEAD]
    other = Run(adamw, Stack)
    with other.attach(control):
        other.steps(0, 3)
        assert list(other.in_force()) == ["experts[0]", "experts[1]", "experts[2]", "conv.weight", "head.weight"]


# On an accelerator ------------------------------------------------------------------------------------------------


@pytest.fixture
def accelerated(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, tensors pass for those of an accelerator, whose values nobody on the host knows."""

    def begin() -> None:
        for module in ("interventions", "control", "parameters"):
            monkeypatch.setattr(f"redline.{module}.is_on_host", lambda tensor: False)
        unwatched = partial(top_singular_values, watched=False)
        monkeypatch.setattr("redline.spectrum_tracker.top_singular_values", unwatched)

    return begin


@EVERY_OPTIMIZER
@pytest.mark.parametrize("model", [Net, Stack], ids=lambda make: make.__name__)
@pytest.mark.parametrize("target", [True, False], ids=["target", "frozen"])
def test_on_an_accelerator_the_run_is_the_same(
    optimizers: Callable[[nn.Module], list[Optimizer]],
    model: Callable[[], nn.Module],
    target: bool,
    accelerated: Callable[[], None],
) -> None:
    """To rounding: there the sum is made in another order."""
    if optimizers is muon_and_adamw and model is Stack:
        pytest.skip("Muon takes matrices only")
    held = {Net: {BODY: 1.1, HEAD: 0.9}, Stack: {"conv.weight": 0.8, "experts[2]": 2.7}}[model]  # type: ignore[index]

    def run() -> tuple[Any, ...]:
        one = Run(optimizers, model, torch.float64)
        control = WeightDecayControl(held if target else None, freeze_at=2, every=3, horizon=20)
        with one.attach(control) as session:
            one.steps(0, 15)
            counted = session.latest.series("redline_interventions_total")
            told = [(one.step, one.action, one.reason) for one in session.interventions]
            return one.parameters, one.in_force(), told, counted

    on_host = run()
    accelerated()
    on_device = run()
    for name, parameter in on_host[0].items():
        torch.testing.assert_close(parameter, on_device[0][name], rtol=1e-7, atol=1e-9)
    assert on_device[1] == pytest.approx(on_host[1], rel=1e-6)
    assert on_device[2:] == on_host[2:]
    assert len(on_host[2]) == 5


@pytest.mark.parametrize("model", [Net, Stack], ids=lambda make: make.__name__)
@pytest.mark.parametrize("optimizers", [adamw_fused, sgd], ids=lambda make: make.__name__)
def test_on_an_accelerator_it_waits_for_nothing(
    model: Callable[[], nn.Module],
    optimizers: Callable[[nn.Module], list[Optimizer]],
    accelerated: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import redline.interventions
    import redline.readings

    accelerated()
    copies: list[int] = []
    for module in (redline.interventions, redline.readings):
        bring = module.to_host
        monkeypatch.setattr(module, "to_host", lambda tensors, bring=bring: (copies.append(1), bring(tensors))[1])
    run = Run(optimizers, model)
    with run.attach(WeightDecayControl(every=2, horizon=2)) as session:
        run.step(0)  # whether its optimizer may be controlled is looked at once
        for seed in range(1, 7):
            run.backward(seed)
            copies.clear()
            with HostReads() as reads:
                for optimizer in run.optimizers:
                    optimizer.step()
            assert reads.seen == []
            assert copies == []
        assert [one.step for one in session.interventions] == [0, 2, 4, 6]
