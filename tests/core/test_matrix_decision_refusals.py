"""Decisions on single matrices: what is refused, and what controllers are told at the beginning."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from bits import assert_same_bits, frozen
from matrix_decision_runs import (
    COUPLED,
    DECAYS,
    LAYERS,
    WD,
    Answer,
    Deciding,
    Joint,
    Lengthening,
    Make,
    Numbers,
    Run,
    at,
    decaying,
    each,
    muon_and_adamw,
    optimizers,
    over,
    scaling,
)
from torch.optim import Adam, AdamW

import redline
from redline import (
    ConfigurationError,
    ControllerError,
    Decay,
    Need,
    RedlineWarning,
    ScaleMatrices,
    Step,
)
from redline.controller import RunOutline
from redline.parameters import MatrixLayer

# Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [scaling({"wide.weight": 0.5}), decaying({"wide.weight": 0.5})])
@pytest.mark.parametrize("kind", [Joint, Lengthening])
def test_decisions_on_matrices_from_a_controller_of_the_joint_step_are_refused(
    kind: type[Deciding], answer: Answer
) -> None:
    run = Run(over(AdamW))
    alone = run.twin()
    alone.step(2)
    with run.attach(kind(answer)):
        with pytest.raises(
            ControllerError, match=rf"{kind.__name__} failed at step 0 .*expected per_parameter = True on it"
        ):
            run.step(2)
        assert_same_bits(run.parameters, alone.parameters)


@pytest.mark.parametrize("answer", [scaling({"wide.weight": 0.5}), decaying({"wide.weight": 0.5})])
def test_decisions_on_an_update_that_nobody_kept_are_refused(answer: Answer) -> None:
    class Blind(redline.Controller):
        per_parameter, needs = True, Need.GRADIENTS

        def inspect(self, step: Step) -> Iterable[Any]:
            return answer(step)

    run = Run(over(AdamW))
    with run.attach(Blind()), pytest.raises(ControllerError, match=r"expected Need\.UPDATE in it"):
        run.step(2)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 1)])
@pytest.mark.parametrize(("kind", "what"), [(ScaleMatrices, "factors"), (Decay, "weight decays")])
def test_another_number_of_factors_than_of_matrices_is_refused(
    kind: type[ScaleMatrices] | type[Decay], what: str, shape: tuple[int, ...]
) -> None:
    layers = [MatrixLayer(name, name, 7, 5) for name in ("one", "two")]
    match = rf"got {what} of shape .* for 2 matrices; expected one each"
    with pytest.raises(ConfigurationError, match=match):
        kind(layers, torch.ones(shape), "as told.")
    run = Run(over(AdamW))
    with (
        run.attach(Deciding(lambda step: [kind(step.layers[:2], torch.ones(shape), "as told.")])),
        pytest.raises(ConfigurationError, match=match),
    ):
        run.step(2)


@pytest.mark.parametrize("decided", ["scale", "decay"])
def test_a_decision_on_a_matrix_that_no_optimizer_holds_is_refused(decided: str, numbers: Numbers) -> None:
    run = Run(lambda model: [AdamW([model.wide.weight, model.experts], 0.125, weight_decay=WD)])
    alone = run.twin()
    alone.step(2)
    answer = (scaling if decided == "scale" else decaying)({"wide.weight": 0.5, "conv.weight": 0.5}, numbers)
    with run.attach(Deciding(answer)):
        with pytest.raises(
            ConfigurationError, match=r"got a decision on 'conv\.weight' from Deciding, which the step did not move"
        ):
            run.step(2)
        assert_same_bits(run.parameters, alone.parameters)


@optimizers(COUPLED)
def test_a_decay_in_place_of_a_coupled_one_is_refused(make: Make, numbers: Numbers) -> None:
    run = Run(make)
    alone = run.twin()
    alone.step(2)
    with run.attach(Deciding(decaying(DECAYS, numbers))):
        kind = type(run.optimizers[0]).__name__
        with pytest.raises(
            ConfigurationError,
            match=r"got a weight decay for 'experts' from Deciding; expected one that can be told from the rest of the "
            rf"update: the weight decay of {kind} is not decoupled",
        ):
            run.step(2)
        assert_same_bits(run.parameters, alone.parameters)


def test_of_a_refused_step_nothing_is_carried_out_and_the_run_can_go_on(numbers: Numbers) -> None:
    run = Run(
        lambda model: [
            Adam([model.wide.weight], 0.125, weight_decay=WD),
            AdamW([model.conv.weight, model.experts], 0.125, weight_decay=WD),
        ]
    )
    alone = run.twin()
    alone.step(2)
    wrong = decaying({"conv.weight": 0.1, "wide.weight": 0.1}, numbers)
    with run.attach(Deciding(scaling({"experts[1]": 0.1}, numbers), at(0, wrong))):
        with pytest.raises(ConfigurationError, match=r"got a weight decay for 'wide\.weight'"):
            run.step(2)
        assert_same_bits(run.parameters, alone.parameters)
        before, net = run.parameters, run.net(3)
        coupled = run.twin()
        coupled.step(3)
        run.step(3)
    assert frozen(run.parameters["wide.weight"]) == frozen(coupled.parameters["wide.weight"])
    expected = before["experts"] * (1 - 0.125 * WD) + each({"experts[1]": 0.1}, 1.0, "experts") * net["experts"]
    torch.testing.assert_close(run.parameters["experts"], expected, rtol=0, atol=1e-14)


# The beginning ----------------------------------------------------------------------------------------------------


class Beginning(Deciding):
    """Keeps what it is told when a session begins."""

    def __init__(self, refuse: str | None = None, say: Sequence[str] = (), **attributes: Any) -> None:
        super().__init__(**attributes)
        self.refuse, self.say = refuse, say
        self.begun: list[RunOutline] = []

    def begin(self, run: RunOutline) -> None:
        self.begun.append(run)
        for text in self.say:
            run.note(text)
        if self.refuse:
            raise ConfigurationError(self.refuse)


def test_a_controller_is_told_once_what_it_is_to_control() -> None:
    run = Run(muon_and_adamw)
    run.model.conv.weight.requires_grad_(False)
    run.model.conv.weight.grad = None
    controller = Beginning()
    with run.attach(controller, Beginning(per_parameter=False)):
        assert len(controller.begun) == 1, "ahead of any step"
        run.feed(2)
        run.update()
        run.step(3)
    (outline,) = controller.begun
    assert [layer.name for layer in outline.layers] == LAYERS
    assert list(outline.optimizers) == run.optimizers
    decoupled = dict.fromkeys(run.parameters, (0.125, WD, None)) | {"wide.weight": (0.25, 0.3, None)}
    assert {name: tuple(rates) for name, rates in outline.rates.items()} == decoupled, "frozen ones too"
    with run.attach(controller):
        pass
    assert len(controller.begun) == 2, "once a session"


def test_a_controller_is_told_which_decay_is_coupled() -> None:
    run = Run(over(Adam))
    controller = Beginning()
    with run.attach(controller):
        pass
    reasons = {rates.coupled for rates in controller.begun[0].rates.values()}
    assert len(reasons) == 1
    assert "the weight decay of Adam is not decoupled" in str(reasons)


def test_what_a_controller_says_at_the_beginning_is_a_warning_and_a_note_under_its_name() -> None:
    run = Run(over(AdamW))
    first, second = Beginning(), Beginning(say=["this and that.", "this and that."])
    with pytest.warns(RedlineWarning, match=r"Beginning-2: this and that\.") as caught:
        session = run.attach(first, second)
    assert len(caught) == 1
    assert session.notes == ("Beginning-2: this and that.",)
    session.close()


def test_a_controller_that_refuses_the_run_is_heard_and_nothing_stays_behind() -> None:
    run = Run(over(AdamW))
    alone = run.twin()

    def hooks() -> list[int]:
        return [
            len(run.optimizers[0]._optimizer_step_pre_hooks),
            len(run.optimizers[0]._optimizer_step_post_hooks),
            *(len(module._forward_pre_hooks) for module in run.model.modules()),
        ]

    before = hooks()
    controller = Beginning(refuse="got that; expected this.")
    with pytest.raises(ConfigurationError, match=r"^got that; expected this\.$"):
        run.attach(controller)
    assert hooks() == before
    run.step(2)
    alone.step(2)
    assert_same_bits(run.parameters, alone.parameters)
    assert controller.seen == [], "there is no session that would ask it"
