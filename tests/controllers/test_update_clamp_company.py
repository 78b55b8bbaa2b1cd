"""UpdateClamp beside other controllers, on an accelerator and resumed."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bits import frozen
from runs import HostReads
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR
from update_clamp_runs import (
    CEILING,
    EITHER_WAY,
    FEATURES,
    SGDW,
    TOLERANCE,
    Optimizers,
    Run,
    Stacks,
    adamw,
    adamw_fused,
    assert_held,
    batch,
    fan,
    limit_of,
    lion,
    muon_and_adamw,
    net,
    plain,
    prepared,
    sgd,
    sgdw,
    top,
)

import redline
import redline.spectrum_tracker
import redline.update_limits
from redline import StepClamp, UpdateClamp

# With other controllers -------------------------------------------------------------------------------------------


def step_size(model: nn.Module, before: Mapping[str, Tensor], after: Mapping[str, Tensor], x: Tensor) -> float:
    """``r`` by the whole Jacobian in float64."""
    model = copy.deepcopy(model).double()
    point = {name: tensor.double() for name, tensor in before.items()}
    jacobian = jacrev(lambda parameters: functional_call(model, parameters, (x.double(),)))(point)
    tangent = sum((jacobian[name].flatten(2) @ (after[name].double() - point[name]).flatten()) for name in point)
    return float((tangent.amax(-1) - tangent.amin(-1)).max() / math.pi)


@pytest.mark.parametrize("clamp_first", [False, True])
@pytest.mark.parametrize("share", [0.3, 1.2], ids=["scaled again", "short enough by then"])
def test_step_clamp_sees_and_scales_what_is_left(clamp_first: bool, share: float) -> None:
    alone, single, run = prepared(adamw), prepared(adamw), prepared(adamw)
    before, limit = run.parameters, 1.0
    alone.step(3)
    with single.attach(UpdateClamp(limit, "fan")):
        single.step(3)
    left = single.parameters
    r = step_size(run.model, before, left, batch(3)[0])
    max_r = share * r
    assert step_size(run.model, before, alone.parameters, batch(3)[0]) > 1.5 * max_r, "by itself it would be scaled"
    controllers = [UpdateClamp(limit, "fan"), StepClamp(max_r)]
    with run.attach(*(controllers if clamp_first else controllers[::-1])) as session:
        run.step(3)
        committed = session.latest.value("redline_committed_step_size")
        scale = session.latest.value("redline_step_scale")
    first, *others = session.interventions
    assert (first.controller, first.saw["matrices"]) == ("UpdateClamp", 3)
    assert committed == pytest.approx(min(r, max_r), rel=1e-4)
    if share > 1:
        assert others == []
        assert scale == 1
        assert frozen(run.parameters) == frozen(left)
        return
    (second,) = others
    assert second.controller == "StepClamp"
    assert second.saw["r"] == pytest.approx(r, rel=1e-4)
    assert scale == second.saw["scale"] == pytest.approx(share, rel=1e-4)
    for name, one in run.parameters.items():
        expected = before[name].double() + scale * (left[name].double() - before[name].double())
        assert torch.allclose(one.double(), expected, rtol=0, atol=1e-7), name


class Joint(redline.Controller):
    """Scales the whole of what is left."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def inspect(self, step: redline.Step) -> list[redline.Scale]:
        return [redline.Scale(self.factor, "so.")]


@pytest.mark.parametrize("factor", [0.0, 0.5, 3.0])
def test_a_scale_of_the_joint_step_comes_on_top(factor: float) -> None:
    single, run = prepared(adamw), prepared(adamw)
    before = run.parameters
    with single.attach(UpdateClamp(0.5, "fan")):
        single.step(3)
    with run.attach(Joint(factor), UpdateClamp(0.5, "fan")) as session:
        run.step(3)
        assert session.latest.value("redline_step_scale") == factor
        assert session.latest.layers(CEILING)["0.weight"] == pytest.approx(
            max(top(before["0.weight"]), 0.5 * fan(before["0.weight"]) / 0.5), rel=2 * TOLERANCE
        )
    for name, left in single.parameters.items():
        expected = before[name].double() + factor * (left.double() - before[name].double())
        assert torch.allclose(run.parameters[name].double(), expected, rtol=0, atol=1e-7), name
    assert [one.controller for one in session.interventions] == ["UpdateClamp", "Joint"]


class Lengthening(Joint):
    """Makes the step longer, ahead of those who may hold it."""

    lengthens = True


@EITHER_WAY
@pytest.mark.parametrize("clamp_first", [False, True])
def test_a_step_that_another_lengthens_is_held_as_it_is_then(clamp_first: bool, relative_to: Any) -> None:
    """As if the rate had been ten times as high, for update and decay."""
    alone, run = prepared(sgd), prepared(sgd)
    limit, before = (0.05 if relative_to == "fan" else 0.005), run.parameters
    alone.step(3)
    longer = {name: before[name] + 10 * (own - before[name]) for name, own in alone.parameters.items()}
    rates = {name: rate._replace(lr=10 * rate.lr) for name, rate in run.rates.items()}
    controllers = [UpdateClamp(limit, relative_to), Lengthening(10.0)]
    with run.attach(*(controllers if clamp_first else controllers[::-1])) as session:
        run.step(3)
    matrices = 0
    for name, own in longer.items():
        if own.dim() == 2:
            at_most = limit_of(before[name], limit, relative_to, rates[name])
            assert top(net(before[name], own, rates[name].decay)) > 1.1 * at_most
            assert_held(before[name], own, run.parameters[name], at_most, rates[name].decay)
            matrices += 1
    assert [one.controller for one in session.interventions] == ["Lengthening", "UpdateClamp"]
    assert session.interventions[1].saw["matrices"] == matrices == 3


@pytest.mark.parametrize("other", [lambda: StepClamp(0.002), lambda: Joint(0.3), lambda: redline.RadiusLR(0.05)])
def test_the_ceiling_holds_where_the_joint_step_is_scaled_too(other: Callable[[], redline.Controller]) -> None:
    """That scales the update and its decay alike, as another rate would."""
    run = Run(lambda model: [torch.optim.AdamW(model.parameters(), 2e-2, weight_decay=1.0)])
    with run.attach(UpdateClamp(1.5, "fan"), other()) as session:
        for step in range(300):
            run.step(step % 2)
            if step % 10 == 9:
                for name, ceiling in session.latest.layers(CEILING).items():
                    assert top(run.parameters[name]) <= ceiling
        counts = {one["controller"]: one["count"] for one in session.report().to_dict()["interventions"]}
    assert min(counts.values()) > 200
    assert len(counts) == 2


# On an accelerator ------------------------------------------------------------------------------------------------


def sgd_in_tensors(model: nn.Module) -> list[Optimizer]:
    """Rate and decay are tensors, as a graph that is captured needs them."""
    return [SGDW(model.parameters(), torch.tensor(0.1), weight_decay=torch.tensor(0.5))]


def uneven(run: Run, seed: int) -> None:
    """A step that is over in some matrices, in all of them or in none."""
    sizes = [(1e-4, 1e-4, 1e-4), (9.0, 1e-4, 9.0), (9.0, 9.0, 9.0), (1e-4, 9.0, 1e-4)][seed % 4]
    run.give(seed, dict(zip(("0", "2", "4"), sizes, strict=True)))
    run.update()


@pytest.mark.parametrize("optimizers", [sgd, sgd_in_tensors, adamw_fused, muon_and_adamw, lion])
@EITHER_WAY
def test_on_an_accelerator_the_same_is_decided(
    optimizers: Optimizers, relative_to: Any, accelerated: Callable[[], None]
) -> None:
    limit = 1.0 if relative_to == "fan" else 0.01

    def run() -> tuple[dict[str, Tensor], list[Any], list[Any], dict[str, float]]:
        one = Run(optimizers)
        with one.attach(UpdateClamp(limit, relative_to), redline.NonFiniteGuard()) as session:
            for seed in range(9):
                uneven(one, seed)
            ceilings = session.latest.layers(CEILING)
            words = [(i.step, i.controller, i.action, i.reason) for i in session.interventions]
            # The worst's place is one among those that were measured: on the host fewer are.
            saw = [{k: v for k, v in i.saw.items() if k != "worst"} for i in session.interventions]
        return one.parameters, words, saw, ceilings

    parameters, words, saw, ceilings = run()
    accelerated()
    there = run()
    for name, tensor in there[0].items():
        assert torch.allclose(tensor, parameters[name], rtol=1e-5, atol=1e-6), name
    assert there[1] == words
    assert there[2] == [pytest.approx(one, rel=1e-4) for one in saw]
    assert there[3] == pytest.approx(ceilings, rel=1e-5)
    assert 0 < len(words) <= 9


@pytest.mark.parametrize("optimizers", [sgd, sgd_in_tensors, adamw_fused])
@pytest.mark.parametrize("model", [plain, Stacks, lambda: nn.ParameterList([torch.randn(80, 96)])])
@EITHER_WAY
def test_on_an_accelerator_nothing_is_read(
    optimizers: Optimizers, model: Callable[[], nn.Module], relative_to: Any, accelerated: Callable[[], None]
) -> None:
    import redline.interventions
    import redline.readings

    accelerated()
    run = Run(optimizers, model)
    with run.attach(UpdateClamp(0.005, relative_to)) as session:
        run.give(9, {})
        run.update()  # at the first step the optimizer's state is looked through for shadow weights
        for seed in range(3):
            run.give(seed, {})
            with pytest.MonkeyPatch.context() as patch, HostReads() as reads:
                for module in (redline.interventions, redline.readings):
                    patch.setattr(module, "to_host", lambda tensors: pytest.fail("it was read"))
                for name in ("tolist", "numpy"):
                    patch.setattr(torch.Tensor, name, lambda tensor: pytest.fail("it was read"), raising=False)
                run.update()
            assert reads.seen == []
        assert len(session.interventions) == 4, "told of once somebody asks"


def test_on_an_accelerator_what_is_under_the_limit_or_not_finite_keeps_its_bits(
    accelerated: Callable[[], None],
) -> None:
    accelerated()
    run = Run(sgd)
    with run.attach(UpdateClamp(1.0, "fan")) as session:
        for seed in range(8):
            run.give(seed, {"0": 1e-3, "4": [1e-3, 9.0][seed % 2]})
            run.model.get_parameter("2.weight").grad[0, 0] = [0.0, math.nan][seed // 7]  # type: ignore[index]
            alone, before, rates = run.uncontrolled(), run.parameters, run.rates
            alone.update()
            run.update()
            over = [
                assert_held(before[name], own, run.parameters[name], limit_of(own, 1.0, "fan", rates[name]), 0.05)
                for name, own in alone.parameters.items()
                if own.dim() == 2 and bool(own.isfinite().all())
            ]
            assert over[0] is False
            assert over[-1] is bool(seed % 2)
        assert frozen(run.parameters["2.weight"]) == frozen(alone.parameters["2.weight"])
        (last,) = [one for one in session.interventions if one.step == 7]
        assert last.saw["matrices"] == 1


# Resumed ----------------------------------------------------------------------------------------------------------


class Resumable:
    """A model of a matrix whose spectrum is iterated for, with schedules and a session, as a user would save it."""

    def __init__(self, optimizers: Optimizers, relative_to: Any, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(FEATURES, 80), nn.Tanh(), nn.Linear(80, 96), nn.Tanh(), nn.Linear(96, 5))
        self.optimizers = optimizers(self.model)
        self.schedulers = [ExponentialLR(optimizer, 0.97) for optimizer in self.optimizers]
        controllers = [UpdateClamp(0.3 if relative_to == "fan" else 0.003, relative_to), StepClamp(0.02)]
        self.session = redline.attach(self.model, self.optimizers, monitors=[], controllers=controllers)

    @property
    def parts(self) -> list[Any]:
        return [self.model, *self.optimizers, *self.schedulers, self.session]

    def steps(self, first: int, last: int) -> None:
        for seed in range(first, last):
            x, y = batch(seed)
            F.cross_entropy(self.model(x), y).backward()
            for optimizer, scheduler in zip(self.optimizers, self.schedulers, strict=True):
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()

    def saved(self) -> io.BytesIO:
        file = io.BytesIO()
        torch.save([part.state_dict() for part in self.parts], file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO) -> None:
        for part, state in zip(self.parts, torch.load(file, weights_only=True), strict=True):
            part.load_state_dict(state)

    @property
    def everything(self) -> Any:
        training = frozen([part.state_dict() for part in self.parts[:-1]])
        ceilings = frozen(self.session.latest.layers(CEILING))
        return training, ceilings, frozen([vars(one) for one in self.session.interventions])


@pytest.mark.parametrize("optimizers", [adamw, adamw_fused, sgdw, lion, muon_and_adamw])
@EITHER_WAY
def test_a_run_that_was_cut_equals_one_that_was_not(optimizers: Optimizers, relative_to: Any) -> None:
    through = Resumable(optimizers, relative_to)
    through.steps(0, 12)
    for cut in (1, 5):
        first = Resumable(optimizers, relative_to)
        first.steps(0, cut)
        second = Resumable(optimizers, relative_to, seed=1)
        second.load(first.saved())
        second.steps(cut, 12)
        assert second.everything == through.everything
        assert frozen(second.session.state_dict()["control"]) == frozen(through.session.state_dict()["control"])
    assert len([one for one in through.session.interventions if one.controller == "UpdateClamp"]) == 12


def test_a_resumed_run_keeps_the_ceiling_of_its_beginning() -> None:
    """Of its first weights, and of the weakest decay there was."""
    run = Run(adamw)
    run.model.get_parameter("0.weight").data.mul_(50.0)
    with run.attach(UpdateClamp(2.0, "fan")) as session:
        run.optimizers[0].param_groups[0]["weight_decay"] = 0.25
        run.step(1)
        before, state = session.latest.layers(CEILING), session.state_dict()
    run.optimizers[0].param_groups[0]["weight_decay"] = 1.0
    run.model.get_parameter("0.weight").data.div_(50.0)
    with run.attach(UpdateClamp(2.0, "fan")) as session:
        session.load_state_dict(state)
        run.step(2)
        assert session.latest.layers(CEILING) == before
    assert before["0.weight"] > 50
