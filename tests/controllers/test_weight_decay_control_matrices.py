"""WeightDecayControl on steps that not all matrices take, weights that are no numbers to go by, and refusals."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from bits import frozen
from torch import Tensor, nn
from torch.optim import Optimizer
from weight_decay_runs import (
    BATCH,
    BODY,
    CLASSES,
    FEATURES,
    HEAD,
    Feedback,
    Net,
    Run,
    Stack,
    adamw,
    adamw_fused,
    assert_decayed_by,
    muon_and_adamw,
    true_sigma,
)

import redline
from redline import ConfigurationError, UpdateClamp, WeightDecayControl

# Steps that not all matrices take ---------------------------------------------------------------------------------


def test_where_one_optimizer_of_two_is_skipped_the_others_matrices_are_decayed_on() -> None:
    """At steps that are due as well: what was skipped waits for the next, and its steps are not counted."""
    run, target = Run(muon_and_adamw), {BODY: 1.2, HEAD: 0.85}
    feedback = {BODY: Feedback(1.2, 0.2, 3, 40), HEAD: Feedback(0.85, 0.3, 3, 40)}
    skipped = {1, 3, 4, 9, 10}
    with run.attach(WeightDecayControl(target, every=3, horizon=40)) as session:
        for index in range(16):
            alone, before = run.uncontrolled(), run.parameters
            for one in (alone, run):
                one.backward(index)
                one.optimizers[0].step()
                if index not in skipped:
                    one.optimizers[1].step()
                elif one is run:
                    one.model(torch.zeros(1, FEATURES))  # the next forward ends the step
            lr = {BODY: 0.05, HEAD: 0.0 if index in skipped else 2e-2}
            decays = {
                name: one.decide(index, before[name], lr[name], moves=bool(lr[name])) for name, one in feedback.items()
            }
            assert run.in_force() == pytest.approx(decays, rel=2e-3, abs=2e-3)
            after, proposed = run.parameters, alone.parameters
            assert_decayed_by(after[BODY], before[BODY], proposed[BODY], 0.05, 0.2, run.in_force()[BODY])
            if index in skipped:
                assert torch.equal(after[HEAD], before[HEAD])
            else:
                assert_decayed_by(after[HEAD], before[HEAD], proposed[HEAD], 2e-2, 0.3, run.in_force()[HEAD])
    assert [one.step for one in session.interventions] == [0, 3, 6, 9, 12, 15]


@pytest.mark.parametrize("targets", [{BODY: 1.2, HEAD: 1.2}, {BODY: 1.2}, None], ids=["both", "the frozen", "all"])
def test_a_layer_that_is_frozen_for_a_while_stays_as_it_is_and_is_held_again(targets: dict[str, float] | None) -> None:
    run = Run()
    with run.attach(WeightDecayControl(targets, every=3, horizon=30)) as session:
        run.steps(0, 7)
        body = run.model.get_parameter(BODY)
        run.optimizers[0].zero_grad()
        body.requires_grad_(False)
        stood = run.parameters[BODY]
        for seed in range(7, 15):
            alone, before = run.uncontrolled(), run.parameters
            alone.step(seed)
            run.step(seed)
            assert torch.equal(run.parameters[BODY], stood)
            if HEAD in run.in_force():
                decay = run.in_force()[HEAD]
                assert_decayed_by(run.parameters[HEAD], before[HEAD], alone.parameters[HEAD], 2e-2, 0.3, decay)
        body.requires_grad_(True)
        for seed in range(15, 300):
            run.step(seed)
    sigma = true_sigma(run.parameters[BODY])
    if targets is not None:
        assert sigma == pytest.approx(1.2, rel=0.1)
    assert session.interventions[-1].step >= 296


def test_a_layer_that_is_frozen_from_the_start_does_not_keep_the_others_from_being_held() -> None:
    """As in fine-tuning, with all parameters in the optimizer."""
    run = Run()
    run.model.get_parameter(HEAD).requires_grad_(False)
    with run.attach(WeightDecayControl({BODY: 0.5, HEAD: 0.5}, every=2, horizon=4)) as session:
        run.steps(0, 6)
        assert BODY in run.in_force(), "it is held"
    assert session.interventions


class Choosing(Net):
    """Which may do without a layer, as a mixture of experts does."""

    def __init__(self) -> None:
        super().__init__()
        self.beside = nn.Linear(FEATURES, CLASSES)
        self.uses_it = True

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (self.beside(x) if self.uses_it else 0)


@pytest.mark.parametrize("target", [99.0, 0.05], ids=["below its target", "above its target"])
def test_a_layer_without_gradient_that_the_optimizer_skips_is_no_farther_moved_than_by_the_decay_in_force(
    target: float,
) -> None:
    """Its group's decay was not applied, so that there is nothing to give back."""
    run = Run(adamw, Choosing)
    with run.attach(WeightDecayControl({"beside.weight": target}, every=2, horizon=2)):
        run.steps(0, 3)
        run.model.uses_it = False
        for seed in range(3, 6):
            before = run.parameters["beside.weight"]
            run.step(seed)
            after, decay = run.parameters["beside.weight"], run.in_force()["beside.weight"]
            left_alone = torch.allclose(after, before, rtol=1e-6, atol=0)
            decayed = torch.allclose(after, (1 - 2e-2 * decay) * before, rtol=1e-6, atol=0)
            assert left_alone or decayed, f"it was multiplied by {float((after / before).mean()):.4f}"


def test_a_step_that_a_fused_optimizer_skips_for_an_overflow_moves_nothing() -> None:
    run = Run(adamw_fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with run.attach(WeightDecayControl({BODY: 99.0, HEAD: 0.05}, every=2, horizon=2)):
        for seed in range(4):
            before = frozen(run.parameters)
            run.optimizers[0].zero_grad()
            x = torch.randn(BATCH, FEATURES, generator=torch.Generator().manual_seed(seed))
            scaler.scale(F.cross_entropy(run.model(x), torch.arange(BATCH) % CLASSES)).backward()
            if seed == 3:
                next(run.model.parameters()).grad.fill_(math.inf)  # type: ignore[union-attr]
            scaler.step(run.optimizers[0])
            scaler.update()
            assert (frozen(run.parameters) == before) is (seed == 3)


def test_a_step_that_a_guard_withholds_moves_nothing() -> None:
    run = Run()
    with run.attach(
        redline.NonFiniteGuard(), WeightDecayControl({BODY: 0.2, HEAD: 9.0}, every=2, horizon=2)
    ) as session:
        run.steps(0, 2)
        before = frozen(run.parameters)
        run.backward(2)
        next(run.model.parameters()).grad.fill_(math.nan)  # type: ignore[union-attr]
        run.optimizers[0].step()
        assert frozen(run.parameters) == before
        run.steps(3, 6)
    assert [one.step for one in session.interventions if one.action == "decay"] == [0, 3, 5]


# Weights that are no numbers to go by -----------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_makes_no_decay_that_is_not(value: float) -> None:
    run = Run()
    with run.attach(WeightDecayControl({BODY: 0.5, HEAD: 0.5}, every=2, horizon=2)):
        run.steps(0, 4)
        known = run.in_force()
        with torch.no_grad():
            run.model.get_parameter(BODY)[0, 0] = value
        run.steps(4, 8)
        decays = run.in_force()
    assert decays[BODY] == known[BODY], "it stays"
    assert 0 <= decays[HEAD] <= 10


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_was_not_finite_once_is_held_again(value: float) -> None:
    """As after a roll-back, or a checkpoint that is loaded by hand."""
    run = Run()
    with run.attach(WeightDecayControl({BODY: 1.2, HEAD: 1.2}, every=2, horizon=20)):
        run.steps(0, 4)
        sound = copy.deepcopy((run.model.state_dict(), run.optimizers[0].state_dict()))
        with torch.no_grad():
            run.model.get_parameter(BODY)[0, 0] = value
        run.step(4)
        run.model.load_state_dict(sound[0])
        run.optimizers[0].load_state_dict(sound[1])
        known = run.in_force()
        run.steps(5, 205)
        assert run.in_force()[BODY] != known[BODY]
    assert true_sigma(run.parameters[BODY]) == pytest.approx(1.2, rel=0.1)


def zero_head() -> nn.Module:
    net = Net()
    nn.init.zeros_(net.head.weight)
    return net


def test_a_matrix_that_starts_at_zero_grows_to_its_target() -> None:
    run = Run(adamw, zero_head)
    with run.attach(WeightDecayControl({HEAD: 1.2}, every=2, horizon=20)):
        run.step(0)
        assert run.in_force() == {HEAD: pytest.approx(0.3)}, "there is nothing yet to go by"
        run.steps(1, 200)
    assert true_sigma(run.parameters[HEAD]) == pytest.approx(1.2, rel=0.1)


def test_a_matrix_that_is_zero_when_the_others_are_frozen_is_not_held_at_zero() -> None:
    """A target of 0 is refused; and a matrix that starts at zero is to learn."""
    run = Run(adamw, zero_head)
    with run.attach(WeightDecayControl(every=2, horizon=10)) as session:
        run.steps(0, 30)
        assert run.in_force().get(HEAD, 0.3) <= 0.3 * (1 + 1e-6)
    assert all(one.saw["target"] > 0 for one in session.interventions)


# Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0, 0.0, -1.0, math.nan, math.inf, -math.inf])
def test_a_target_that_is_not_positive_is_refused(sigma: float) -> None:
    with pytest.raises(
        ConfigurationError, match=rf"got a target of {sigma} for 'a\.b'; expected a positive spectral norm\."
    ):
        WeightDecayControl({"fine": 1.0, "a.b": sigma})


def test_a_target_for_nothing_is_refused() -> None:
    with pytest.raises(
        ConfigurationError, match=r"got a target for no layer; expected \{layer: sigma_1\}, or None to freeze all\."
    ):
        WeightDecayControl({})


def test_a_step_before_the_first_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"got freeze_at=-1; expected a step, 0 or later\."):
        WeightDecayControl(freeze_at=-1)


@pytest.mark.parametrize(("every", "horizon"), [(0, 200), (-1, 5), (20, 19), (1, 0)])
def test_steps_that_do_not_fit_are_refused(every: int, horizon: int) -> None:
    with pytest.raises(
        ConfigurationError,
        match=f"got every={every} and horizon={horizon}; expected at least 1, and a horizon of as many steps or more",
    ):
        WeightDecayControl(every=every, horizon=horizon)
    assert WeightDecayControl(every=1, horizon=1).horizon == 1


@pytest.mark.parametrize(
    "bounds", [(1.0, 0.5), (0.5, 0.5), (-0.1, 1.0), (0.0, math.inf), (math.nan, 1.0), (0.0, math.nan)]
)
def test_bounds_out_of_order_are_refused(bounds: tuple[float, float]) -> None:
    with pytest.raises(
        ConfigurationError, match=r"got bounds=\(.*\); expected a least decay of 0 or more and a larger"
    ):
        WeightDecayControl(bounds=bounds)


@pytest.mark.parametrize(
    ("name", "close"),
    [("body.wieght", "'body.weight'"), ("net.head.weight", "'head.weight'"), ("head", "'head.weight'")],
)
def test_a_target_for_a_layer_that_does_not_exist_is_refused_with_close_names(name: str, close: str) -> None:
    run = Run()
    with pytest.raises(
        ConfigurationError,
        match=rf"got a target for '{name}', which is no layer of the model; expected the qualified name of a matrix, "
        rf"such as .*{close}",
    ):
        run.attach(WeightDecayControl({BODY: 1.0, name: 1.0}))


def test_a_target_for_a_vector_or_a_whole_stack_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ConfigurationError, match=r"got a target for 'body\.bias', which is no layer .*'body\.weight'"):
        Run().attach(WeightDecayControl({"body.bias": 1.0}))
    with pytest.raises(ConfigurationError, match=r"got a target for 'experts', .*'experts\[\d\]'"):
        Run(adamw, Stack).attach(WeightDecayControl({"experts": 1.0}))


def test_a_target_in_a_model_without_matrices_is_refused() -> None:
    model = nn.LayerNorm(4)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ConfigurationError, match=r"which is no layer of the model; .*the model has no matrix"):
        redline.attach(model, optimizer, monitors=[], controllers=[WeightDecayControl({"weight": 1.0})])


def test_a_target_for_a_layer_that_no_optimizer_holds_is_refused() -> None:
    def optimizers(model: nn.Module) -> list[Optimizer]:
        return [torch.optim.AdamW([model.get_parameter(BODY)], weight_decay=0.1)]

    run = Run(optimizers)
    with pytest.raises(
        ConfigurationError,
        match=rf"got a target for '{HEAD}', which no optimizer holds; expected a layer that is trained\.",
    ):
        run.attach(WeightDecayControl({HEAD: 1.0}))
    with run.attach(WeightDecayControl(every=1, horizon=1)):  # without targets it is not among those to freeze
        run.step(0)
        assert list(run.in_force()) == [BODY]


COUPLED: dict[str, Callable[[nn.Module], list[Optimizer]]] = {
    "SGD": lambda model: [torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)],
    "Adam": lambda model: [torch.optim.Adam(model.parameters(), weight_decay=0.1)],
    "RMSprop": lambda model: [torch.optim.RMSprop(model.parameters(), weight_decay=0.1)],
}


@pytest.mark.parametrize("kind", COUPLED)
def test_decay_that_is_coupled_is_refused_by_name(kind: str) -> None:
    run = Run(COUPLED[kind])
    untouched = run.everything
    with pytest.raises(
        ConfigurationError,
        match=rf"got a target for '{BODY}', whose decay cannot be replaced: the weight decay of {kind} is not "
        r"decoupled .*Use an optimizer with decoupled decay, such as AdamW, or set its weight_decay to 0",
    ):
        run.attach(WeightDecayControl({BODY: 1.0}))
    with pytest.raises(
        ConfigurationError,
        match=rf"got no target and no matrix that decays; expected .*\(the weight decay of {kind} is",
    ):
        run.attach(WeightDecayControl())
    assert run.everything == untouched
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["weight_decay"] = 0  # the remedy works
    with run.attach(WeightDecayControl({BODY: 0.1}, every=1, horizon=1)):
        alone, before = run.uncontrolled(), run.parameters
        alone.step(0)
        run.step(0)
        decay, lr = run.in_force()[BODY], run.group_of(BODY)["lr"]
        assert decay > 0
        assert_decayed_by(run.parameters[BODY], before[BODY], alone.parameters[BODY], lr, 0.0, decay)


def test_decay_that_comes_to_be_coupled_in_the_midst_of_a_run_is_refused() -> None:
    """The setting of the groups is the user's, who may change it."""
    run = Run(lambda model: [torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)])
    with run.attach(WeightDecayControl({BODY: 0.1})):
        run.step(0)
        run.optimizers[0].param_groups[0]["weight_decay"] = 0.1
        with pytest.raises(
            ConfigurationError,
            match=rf"got a weight decay for '{BODY}' from WeightDecayControl; expected one that can be told from the",
        ):
            run.step(1)


def test_with_no_target_and_nothing_that_decays_it_is_refused() -> None:
    run = Run(partial(adamw, weight_decay=0.0))
    with pytest.raises(
        ConfigurationError,
        match=r"got no target and no matrix that decays; expected parameter groups with a weight_decay, or "
        r"target=\{layer: sigma_1\}\.",
    ):
        run.attach(WeightDecayControl())


def test_two_of_them_hold_two_sets_of_layers() -> None:
    """And beside UpdateClamp neither is in the other's way."""
    run = Run()
    one, other = (WeightDecayControl({name: 0.2}, every=2, horizon=2) for name in (BODY, HEAD))
    together = Run()
    with (
        run.attach(one, UpdateClamp(1e3), other) as session,
        together.attach(WeightDecayControl({BODY: 0.2, HEAD: 0.2}, every=2, horizon=2)),
    ):
        run.steps(0, 5)
        together.steps(0, 5)
        assert run.in_force() == together.in_force()
    assert run.everything == together.everything
    assert {one.controller for one in session.interventions} == {"WeightDecayControl", "WeightDecayControl-2"}
