"""The step transaction: what controllers decide is what is committed, to the bit where a bit is promised.

Each test trains two identical models: one is left alone and says what the optimizer proposes, the other is controlled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import redline
from redline import ConfigurationError, ControllerError, Need, Reject, RunStoppedError, Scale, Step, Withhold
from redline.transaction import StepTransaction

Answer = Callable[[Step], Iterable[Any]]


# Doubles ------------------------------------------------------------------------------------------


class Deciding(redline.Controller):
    """Answers what it is told to, and keeps what it was shown."""

    def __init__(
        self,
        answer: Answer = lambda step: (),
        *,
        withhold: Callable[[Step], Withhold | None] = lambda step: None,
        per_parameter: bool = False,
        snapshots_state: bool = False,
        needs: Need = Need.UPDATE,
    ) -> None:
        self.answer, self.withhold = answer, withhold
        self.per_parameter, self.snapshots_state, self.needs = per_parameter, snapshots_state, needs
        self.seen: list[dict[str, Tensor]] = []
        self.norms: list[float] = []

    def before_update(self, step: Step) -> Withhold | None:
        return self.withhold(step)

    def inspect(self, step: Step) -> Iterable[Any]:
        if Need.UPDATE in self.needs:
            self.seen.append({name: tensor.clone() for name, tensor in step.update.tensors.items()})
            self.norms.append(float(step.update.norm))
        return self.answer(step)


class Joint(Deciding):
    """Another class, so that it has another name in a session."""


def scaling(factor: float, parameter: str | None = None, **options: Any) -> Deciding:
    return Deciding(lambda step: [Scale(factor, "as told.", parameter, {"factor": factor})], **options)


def at(index: int, decision: Any) -> Answer:
    return lambda step: [decision] if step.index == index else []


def withholding(index: int) -> Callable[[Step], Withhold | None]:
    return lambda step: Withhold("as told.", {"index": float(index)}) if step.index == index else None


# Runs ---------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A matrix large enough for rounding to show, a head, and a parameter of -0.0 whose gradient is 0."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(200, 150)
        self.head = nn.Linear(150, 4)
        self.silent = nn.Parameter(torch.full((3,), -0.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


def sgd(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-2)]


def adam(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.Adam(model.parameters(), 1e-2)]


def adamw_foreach(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.AdamW(model.parameters(), 1e-2, foreach=True)]


def adamw_fused(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.AdamW(model.parameters(), 1e-2, fused=True)]


def muon_and_adamw(model: nn.Module) -> list[Optimizer]:
    parameters = list(model.parameters())
    return [
        torch.optim.Muon([parameter for parameter in parameters if parameter.dim() == 2], 0.02),
        torch.optim.AdamW([parameter for parameter in parameters if parameter.dim() != 2], 1e-2),
    ]


EVERY_OPTIMIZER = pytest.mark.parametrize("optimizers", [sgd, adam, adamw_foreach, adamw_fused, muon_and_adamw])


class Run:
    """A model with its optimizers; two made alike are alike."""

    def __init__(
        self,
        optimizers: Callable[[nn.Module], list[Optimizer]] = sgd,
        dtype: torch.dtype = torch.float32,
        model: Callable[[], nn.Module] = Net,
    ) -> None:
        torch.manual_seed(0)
        self.model = model().to(dtype)
        self.dtype = dtype
        self.optimizers = optimizers(self.model)

    def backward(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(16, 200, generator=generator).to(self.dtype)
        y = torch.randint(0, 4, (16,), generator=generator)
        F.cross_entropy(self.model(x).float(), y).backward()
        if isinstance(self.model, Net):
            self.model.silent.grad = torch.zeros_like(self.model.silent)

    def step(self, seed: int) -> None:
        self.backward(seed)
        for optimizer in self.optimizers:
            optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def attach(self, *controllers: redline.Controller, monitors: Sequence[redline.Monitor] = ()) -> redline.Session:
        return redline.attach(self.model, self.optimizers, monitors=monitors, controllers=controllers)

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    @property
    def state(self) -> list[Any]:
        return [frozen(optimizer.state_dict()) for optimizer in self.optimizers]


def frozen(value: Any) -> Any:
    """A copy that compares by bits: tensors as their type and bytes."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), bits(value)
    if isinstance(value, dict):
        return {key: frozen(inner) for key, inner in value.items()}
    return [frozen(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name in expected if bits(actual[name]) != bits(expected[name])] == []


def assert_scaled(
    actual: dict[str, Tensor], before: dict[str, Tensor], after: dict[str, Tensor], factors: dict[str, float]
) -> None:
    """``theta_before + factor * p`` to the rounding of the parameters' own type; computed in float64."""
    for name, factor in factors.items():
        update = after[name].double() - before[name].double()
        expected = before[name].double() + factor * update
        error = (actual[name].double() - expected).abs()
        bound = 2 * torch.finfo(actual[name].dtype).eps * (expected.abs() + factor * update.abs())
        assert bool((error <= bound).all()), f"{name} is off by up to {float(error.max()):.3g}"


def prepared(optimizers: Callable[[nn.Module], list[Optimizer]] = sgd, dtype: torch.dtype = torch.float32) -> Run:
    """Two steps in, so that moments are there."""
    run = Run(optimizers, dtype)
    run.step(1)
    run.step(2)
    return run


# Scale --------------------------------------------------------------------------------------------


@EVERY_OPTIMIZER
@pytest.mark.parametrize("factor", [0.5, 1e-3, 1.7])
def test_scale_commits_a_fraction_of_the_update(
    optimizers: Callable[[nn.Module], list[Optimizer]], factor: float
) -> None:
    alone, run = prepared(optimizers), prepared(optimizers)
    before = run.parameters
    assert_same_bits(alone.parameters, before)
    alone.step(3)
    controller = scaling(factor)
    with run.attach(controller):
        run.step(3)
    after = alone.parameters
    assert_scaled(run.parameters, before, after, dict.fromkeys(before, factor))
    assert not torch.equal(run.parameters["body.weight"], after["body.weight"])
    assert run.state == alone.state, "moments and counters are the optimizer's own"
    for name, seen in controller.seen[0].items():
        assert torch.equal(seen, after[name] - before[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_scale_in_other_precisions(dtype: torch.dtype) -> None:
    alone, run = prepared(sgd, dtype), prepared(sgd, dtype)
    before = run.parameters
    alone.step(3)
    with run.attach(scaling(0.5)):
        run.step(3)
    assert_scaled(run.parameters, before, alone.parameters, dict.fromkeys(before, 0.5))
    assert {tensor.dtype for tensor in run.parameters.values()} == {dtype}


@EVERY_OPTIMIZER
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_of_one_leaves_the_parameters_to_the_bit(
    optimizers: Callable[[nn.Module], list[Optimizer]], dtype: torch.dtype
) -> None:
    alone, run = prepared(optimizers, dtype), prepared(optimizers, dtype)
    every = Deciding(lambda step: [Scale(1.0, "nothing to object to.", name) for name in step.update.tensors])
    with run.attach(scaling(1.0), every) as session:
        for seed in (3, 4, 5):
            alone.step(seed)
            run.step(seed)
    assert_same_bits(run.parameters, alone.parameters)
    assert run.state == alone.state
    assert session.interventions == ()
    assert session.latest.value("redline_step_scale") == 1


def test_scale_of_one_keeps_a_negative_zero() -> None:
    run = Run(lambda model: [torch.optim.SGD(model.parameters(), 0.1)])
    with run.attach(scaling(1.0)):
        run.step(3)
    assert torch.signbit(run.parameters["silent"]).all()
    assert not run.parameters["silent"].any()


@EVERY_OPTIMIZER
def test_scale_of_zero_restores_the_parameters_to_the_bit(
    optimizers: Callable[[nn.Module], list[Optimizer]],
) -> None:
    run = prepared(optimizers)
    before = run.parameters
    with run.attach(scaling(0.0)):
        run.step(3)
    assert_same_bits(run.parameters, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_of_zero_restores_what_the_update_made_nan(dtype: torch.dtype) -> None:
    run = Run(lambda model: [torch.optim.SGD(model.parameters(), 0.1)], dtype)
    before = run.parameters
    controller = scaling(0.0)
    with run.attach(controller):
        run.backward(1)
        for parameter in run.model.parameters():
            parameter.grad = torch.full_like(parameter, float("nan"))
        run.optimizers[0].step()
    assert_same_bits(run.parameters, before)
    assert torch.signbit(run.parameters["silent"]).all()
    assert controller.norms[0] != controller.norms[0], "the controller saw the NaN"


def test_controller_that_objects_to_nothing_leaves_no_trace() -> None:
    alone, run = prepared(), prepared()
    with run.attach(Deciding()) as session:
        for seed in (3, 4):
            alone.step(seed)
            run.step(seed)
    assert_same_bits(run.parameters, alone.parameters)
    assert session.interventions == ()
    assert sum(session.latest.series("redline_interventions_total").values()) == 0


@pytest.mark.parametrize("factor", [-0.1, float("nan"), float("inf")])
def test_scale_that_is_no_factor_is_refused(factor: float) -> None:
    with pytest.raises(ConfigurationError, match=r"got a scale of .*; expected a finite factor of at least 0"):
        Scale(factor, "as told.")


# Single parameters first --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_parameters_are_scaled_first_and_the_joint_clamp_sees_what_is_left(dtype: torch.dtype) -> None:
    alone, run = prepared(sgd, dtype), prepared(sgd, dtype)
    before = run.parameters
    alone.step(3)
    after = alone.parameters
    joint, single = Joint(lambda step: [Scale(0.5, "joint.")]), scaling(0.25, "body.weight", per_parameter=True)
    with run.attach(joint, single) as session:  # in this order: which decides first is not up to it
        run.step(3)
    assert [one.controller for one in session.interventions] == ["Deciding", "Joint"]
    update = {name: after[name].float() - before[name].float() for name in before}
    assert single.norms[0] == pytest.approx(norm(update), rel=1e-5)
    left = {**update, "body.weight": 0.25 * update["body.weight"]}
    assert joint.norms[0] == pytest.approx(norm(left), rel=1e-5 if dtype is torch.float32 else 2e-2)
    assert joint.norms[0] < 0.9 * single.norms[0]
    if dtype is torch.float32:
        torch.testing.assert_close(joint.seen[0], left, rtol=1e-3, atol=1e-8)
        factors = dict.fromkeys(before, 0.5) | {"body.weight": 0.125}
        assert_scaled(run.parameters, before, after, factors)


def norm(tensors: dict[str, Tensor]) -> float:
    return float(torch.stack([tensor.double().norm() for tensor in tensors.values()]).norm())


def test_several_parameters_each_by_its_own_factor() -> None:
    alone, run = prepared(), prepared()
    before = run.parameters
    alone.step(3)
    factors = {"body.weight": 0.5, "body.bias": 0.0, "head.weight": 1.0, "head.bias": 0.1, "silent": 1.0}
    controller = Deciding(
        lambda step: [Scale(factor, "its own.", name) for name, factor in factors.items()], per_parameter=True
    )
    with run.attach(controller) as session:
        run.step(3)
    assert_scaled(run.parameters, before, alone.parameters, factors)
    assert bits(run.parameters["body.bias"]) == bits(before["body.bias"])
    assert bits(run.parameters["head.weight"]) == bits(alone.parameters["head.weight"])
    assert [one.action for one in session.interventions] == ["scale"] * 3, "a factor of 1 leaves no trace"


class Linear(nn.Module):
    """Logits that are linear in the one parameter: a scaled step has exactly a scaled r."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 200) / 20)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


def test_joint_clamp_is_shown_the_tangent_of_what_is_left() -> None:
    run = Run(model=Linear)
    sizes: list[float] = []

    def clamp(step: Step) -> Iterable[Scale]:
        assert step.tangent(None) is not None
        assert step.normalized_step_size is not None
        sizes.append(float(step.normalized_step_size))
        return [Scale(0.5, "half of what is left.")]

    with run.attach(
        Joint(clamp, needs=Need.TANGENT),
        scaling(0.25, "weight", per_parameter=True),
        monitors=[redline.GhostRadius(1, max_samples=None)],
    ) as session:
        run.step(1)
        latest = session.latest
    proposed = latest.value("redline_normalized_step_size")
    assert sizes == [pytest.approx(0.25 * proposed, rel=1e-4)]
    assert latest.value("redline_committed_step_size") == pytest.approx(0.125 * proposed, rel=1e-4)
    assert latest.value("redline_step_scale") == 0.5


# What is exported of a decision -------------------------------------------------------------------


def test_readings_and_traces_of_a_scaled_step() -> None:
    run = Run(model=Linear)
    controller = Deciding(at(1, Scale(0.5, "too long.", saw={"r": 2.5})))
    with run.attach(controller, monitors=[redline.GhostRadius(1, max_samples=None)]) as session:
        for index, scale in ((0, 1.0), (1, 0.5), (2, 1.0)):
            run.step(index)
            latest = session.latest
            assert latest.value("redline_step_scale") == scale
            proposed = latest.value("redline_normalized_step_size")
            assert latest.value("redline_committed_step_size") == pytest.approx(scale * proposed)
            assert latest.measured_at[redline.Series("redline_committed_step_size")] == index
        assert session.interventions == (redline.Intervention(1, "Deciding", "scale", "too long.", {"r": 2.5}),)
        assert latest.value("redline_interventions_total", controller="Deciding", action="scale") == 1


def test_several_joint_scales_multiply() -> None:
    run = Run(model=Linear)
    with run.attach(scaling(0.5), scaling(0.2), monitors=[redline.GhostRadius(1, max_samples=None)]) as session:
        run.step(1)
        latest = session.latest
    assert latest.value("redline_step_scale") == pytest.approx(0.1)
    assert latest.value("redline_committed_step_size") == pytest.approx(
        0.1 * latest.value("redline_normalized_step_size"), rel=1e-4
    )
    assert [one.controller for one in session.interventions] == ["Deciding", "Deciding-2"]
    assert latest.value("redline_interventions_total", controller="Deciding-2", action="scale") == 1


def test_monitors_see_the_step_as_proposed_and_the_weights_as_committed() -> None:
    alone, run = Run(model=Linear), Run(model=Linear)
    before = run.parameters["weight"]
    alone.step(1)
    proposed = alone.parameters["weight"] - before
    with run.attach(scaling(0.0), monitors=[redline.UpdateSpectrum(1), redline.WeightSpectrum(1)]) as session:
        run.step(1)
        latest = session.latest
    assert latest.value("redline_update_norm") == pytest.approx(float(proposed.norm()), rel=1e-5)
    sigma = torch.linalg.matrix_norm(before.double(), 2)
    assert latest.value("redline_weight_spectral_norm", layer="weight") == pytest.approx(float(sigma), rel=1e-4)


def test_weights_are_measured_as_committed_even_if_a_controller_looked_at_them_before() -> None:
    run = Run(model=Linear)
    before = run.parameters["weight"]

    def look(step: Step) -> Iterable[Scale]:
        step.weight_spectra(1e-6)
        return []

    with run.attach(scaling(0.0), Joint(look), monitors=[redline.WeightSpectrum(1)]) as session:
        run.step(1)
        sigma = session.latest.value("redline_weight_spectral_norm", layer="weight")
    assert sigma == pytest.approx(float(torch.linalg.matrix_norm(before.double(), 2)), rel=1e-4)


def test_weights_are_measured_as_committed_even_if_a_controller_looked_at_them_ahead_of_the_update() -> None:
    run = Run(model=Linear)

    class Looking(redline.Controller):
        def before_update(self, step: Step) -> None:
            step.weight_spectra(1e-6)

    with run.attach(Looking(), monitors=[redline.WeightSpectrum(1)]) as session:
        run.step(1)
        sigma = session.latest.value("redline_weight_spectral_norm", layer="weight")
    after = run.parameters["weight"]
    assert sigma == pytest.approx(float(torch.linalg.matrix_norm(after.double(), 2)), rel=1e-4)


@pytest.mark.parametrize(
    "controller",
    [
        pytest.param(lambda: Deciding(at(1, Scale(0.5, "as told.", "weight"))), id="scaled by parameter"),
        pytest.param(lambda: Deciding(withhold=withholding(1)), id="withheld"),
        pytest.param(lambda: Deciding(at(1, Reject("as told.")), snapshots_state=True), id="rejected"),
    ],
)
def test_committed_step_size_is_never_that_of_an_earlier_step(controller: Callable[[], Deciding]) -> None:
    """Where r of what was committed is not known it is absent; 0 would do for a step that was taken back."""
    run = Run(model=Linear)
    with run.attach(controller(), monitors=[redline.GhostRadius(1)]) as session:
        run.step(0)
        run.step(1)
        latest = session.latest
        committed = redline.Series("redline_committed_step_size")
        assert committed not in latest.values or latest.measured_at[committed] == 1


def test_committed_step_size_is_absent_where_a_parameter_was_scaled_and_nobody_measured_again() -> None:
    run = Run(model=Linear)
    scaling_one = Deciding(at(0, Scale(0.5, "as told.", "weight")))
    with run.attach(scaling_one, monitors=[redline.GhostRadius(1)]) as session:
        run.step(0)
        latest = session.latest
    assert latest.value("redline_normalized_step_size") > 0
    assert "redline_committed_step_size" not in latest


def test_scales_that_make_up_for_one_another_leave_the_optimizers_own_bits() -> None:
    run, alone = prepared(), prepared()
    with run.attach(scaling(2.0), Joint(lambda step: [Scale(0.5, "as told.")])):
        run.step(3)
        alone.step(3)
    assert_same_bits(run.parameters, alone.parameters)


def test_parameter_of_two_optimizers_goes_back_to_before_the_first() -> None:
    run = Run(lambda model: [torch.optim.SGD(model.parameters(), 0.1), torch.optim.SGD(model.parameters(), 0.2)])
    before = run.parameters
    with run.attach(scaling(0.0)):
        run.step(1)
    assert_same_bits(run.parameters, before)


def test_committed_step_size_is_that_over_the_most_samples() -> None:
    """Of two who measured r, the one on more of the batch errs less."""
    run = Run(model=Linear)
    few, all_of_it = redline.GhostRadius(1, max_samples=1), redline.GhostRadius(1, max_samples=None)
    with run.attach(scaling(0.5), monitors=[few, all_of_it]) as session:
        run.step(0)
        latest = session.latest
    proposed = latest.value("redline_normalized_step_size")  # the last to measure is on all
    assert latest.value("redline_tangent_samples") == 16
    assert latest.value("redline_committed_step_size") == pytest.approx(0.5 * proposed)


def test_scale_of_zero_on_a_device_hides_an_update_that_is_not_finite() -> None:
    """From whoever asks next; the factor is a tensor that nobody has read."""
    transaction, parameter = StepTransaction(), nn.Parameter(torch.ones(3))
    transaction.save({"one": parameter})
    with torch.no_grad():
        parameter.fill_(float("nan"))
    transaction.scale(torch.tensor(0.0))
    assert transaction.update()["one"].tolist() == [0.0] * 3
    transaction.commit()
    assert parameter.tolist() == [1.0] * 3


@pytest.mark.parametrize("zero", [0.0, torch.tensor(0.0)], ids=["host", "device"])
@pytest.mark.parametrize("decay", [float("inf"), float("nan")])
def test_scale_of_zero_takes_back_a_decay_that_is_not_finite(zero: float | Tensor, decay: float) -> None:
    """As of a rate that is not finite, on whose update a guard then decides."""
    parameter = torch.tensor([1.0, -2.0])
    transaction = StepTransaction()
    transaction.save({"a": parameter})
    parameter += 1
    transaction.shrink("a", decay)
    transaction.scale_net("a", 0.5, decay)
    transaction.scale(zero)
    assert torch.equal(transaction.update()["a"], torch.zeros(2))
    transaction.commit()
    assert parameter.tolist() == [1.0, -2.0]


# Withhold -----------------------------------------------------------------------------------------


@EVERY_OPTIMIZER
def test_withheld_step_is_no_step_at_all(optimizers: Callable[[nn.Module], list[Optimizer]]) -> None:
    run, alone = prepared(optimizers), prepared(optimizers)
    before, state = run.parameters, run.state
    with run.attach(Deciding(withhold=withholding(1))) as session:
        run.step(3)
        alone.step(3)
        before, state = run.parameters, run.state
        run.backward(4)
        gradients = {name: parameter.grad for name, parameter in run.model.named_parameters()}
        values = {name: grad.clone() for name, grad in gradients.items() if grad is not None}
        for optimizer in run.optimizers:
            optimizer.step()
        assert_same_bits(run.parameters, before)
        assert run.state == state, "moments, step counters, everything"
        for name, parameter in run.model.named_parameters():
            assert parameter.grad is gradients[name], "the gradients come back as the same objects"
        assert_same_bits({name: gradients[name] for name in values}, values)  # type: ignore[misc]
        for optimizer in run.optimizers:
            optimizer.zero_grad()
        run.step(5)
        alone.step(5)  # which never saw the batch that was withheld
        assert session.latest.value("redline_step_scale") == 1
    assert_same_bits(run.parameters, alone.parameters)
    assert run.state == alone.state
    assert session.interventions == (redline.Intervention(1, "Deciding", "withhold", "as told.", {"index": 1.0}),)
    assert session.latest.value("redline_interventions_total", controller="Deciding", action="withhold") == 1
    assert session.latest.value("redline_steps_total") == 3


@EVERY_OPTIMIZER
def test_withholding_the_first_step_leaves_no_state(optimizers: Callable[[nn.Module], list[Optimizer]]) -> None:
    run, fresh = Run(optimizers), Run(optimizers)
    with run.attach(Deciding(withhold=withholding(0))) as session:
        run.step(1)
        assert session.latest.value("redline_step_scale") == 0
    assert_same_bits(run.parameters, fresh.parameters)
    assert run.state == fresh.state


def test_withheld_gradients_go_on_accumulating() -> None:
    run = Run()
    with run.attach(Deciding(withhold=withholding(0))):
        run.backward(1)
        once = run.model.get_parameter("body.weight").grad.clone()  # type: ignore[union-attr]
        run.optimizers[0].step()
        run.backward(1)
    torch.testing.assert_close(run.model.get_parameter("body.weight").grad, 2 * once)


@pytest.mark.parametrize("keyword", [False, True])
def test_closure_is_withheld_from_too(keyword: bool) -> None:
    run = prepared(adam)
    before, state = run.parameters, run.state

    def closure() -> Tensor:
        run.optimizers[0].zero_grad()
        run.backward(3)
        return torch.tensor(1.25)

    with run.attach(Deciding(withhold=withholding(0))):
        loss = run.optimizers[0].step(closure=closure) if keyword else run.optimizers[0].step(closure)
    assert loss == 1.25
    assert_same_bits(run.parameters, before)
    assert run.state == state
    assert run.model.get_parameter("body.weight").grad is not None


def test_withheld_step_is_not_measured_but_its_gradient_is() -> None:
    run = Run()
    monitors = [redline.UpdateSpectrum(1), redline.GhostRadius(1), redline.WeightSpectrum(1), redline.StepHealth(1)]
    with run.attach(Deciding(withhold=withholding(0)), monitors=monitors) as session:
        run.step(1)
        latest = session.latest
    assert latest.series("redline_measurements_total") == {
        ("UpdateSpectrum",): 0,
        ("GhostRadius",): 0,
        ("WeightSpectrum",): 1,
        ("StepHealth",): 1,
    }
    assert latest.value("redline_gradient_norm") > 0
    assert "redline_update_norm" not in latest


def test_all_are_asked_ahead_of_the_update_and_each_decision_is_traced() -> None:
    """A guard learns from every step, also from one that another has withheld."""
    run = Run()
    first, second = Deciding(withhold=withholding(0)), Joint(withhold=withholding(0))
    with run.attach(first, second) as session:
        run.step(1)
    assert [one.controller for one in session.interventions] == ["Deciding", "Joint"]
    assert first.seen == second.seen == [], "there is no update to inspect"


def test_withholding_by_the_joint_gradient_withholds_from_every_optimizer() -> None:
    """The norm that crosses the limit is that of the joint step, of which the first optimizer holds a part only."""
    run, probe = prepared(muon_and_adamw), prepared(muon_and_adamw)
    probe.backward(3)
    squares = [
        [float(p.grad.double().square().sum()) for p in group["params"] if p.grad is not None]
        for optimizer in probe.optimizers
        for group in optimizer.param_groups
    ]
    first, whole = sum(squares[0]) ** 0.5, sum(map(sum, squares)) ** 0.5
    limit = (first + whole) / 2
    assert first < limit < whole

    def over(step: Step) -> Withhold | None:
        assert step.gradient_norm is not None
        return Withhold("over the limit.") if float(step.gradient_norm) > limit else None

    before, state = run.parameters, run.state
    with run.attach(Deciding(withhold=over, needs=Need.GRADIENTS)) as session:
        run.step(3)
    assert [one.action for one in session.interventions] == ["withhold"]
    assert_same_bits(run.parameters, before)
    assert run.state == state


# Reject -------------------------------------------------------------------------------------------


@EVERY_OPTIMIZER
def test_rejection_with_a_snapshot_brings_parameters_and_state_back(
    optimizers: Callable[[nn.Module], list[Optimizer]],
) -> None:
    run, alone = prepared(optimizers), prepared(optimizers)
    controller = Deciding(at(1, Reject("as told.", {"r": 9.0})), snapshots_state=True)
    with run.attach(controller) as session:
        run.step(3)
        alone.step(3)
        before, state = run.parameters, run.state
        run.step(4)
        assert_same_bits(run.parameters, before)
        assert run.state == state
        assert session.latest.value("redline_step_scale") == 0
        run.step(5)
        alone.step(5)  # which never saw the step that was rejected
    assert_same_bits(run.parameters, alone.parameters)
    assert run.state == alone.state
    assert session.interventions == (redline.Intervention(1, "Deciding", "reject", "as told.", {"r": 9.0}),)
    assert session.latest.value("redline_interventions_total", controller="Deciding", action="reject") == 1


@EVERY_OPTIMIZER
def test_rejected_first_step_leaves_no_state(optimizers: Callable[[nn.Module], list[Optimizer]]) -> None:
    run, fresh = Run(optimizers), Run(optimizers)
    with run.attach(Deciding(at(0, Reject("as told.")), snapshots_state=True)):
        run.step(1)
    assert_same_bits(run.parameters, fresh.parameters)
    assert run.state == fresh.state
    run.step(2)
    fresh.step(2)
    assert_same_bits(run.parameters, fresh.parameters)


def test_rejection_brings_back_state_that_is_no_tensor() -> None:
    run = Run(lambda model: [Counting(model.parameters(), 0.1)])
    with run.attach(Deciding(at(1, Reject("as told.")), snapshots_state=True)):
        run.step(1)
        before, state = run.parameters, run.state
        run.step(2)
    assert_same_bits(run.parameters, before)
    assert run.state == state


@EVERY_OPTIMIZER
def test_rejection_without_a_snapshot_stops_the_run(optimizers: Callable[[nn.Module], list[Optimizer]]) -> None:
    run = prepared(optimizers)
    before = run.parameters
    with run.attach(Deciding(at(1, Reject("r was 12.")))) as session:
        run.step(3)
        before = run.parameters
        with pytest.raises(RunStoppedError, match=r"Deciding rejected step 1: r was 12\. The parameters are as they"):
            run.step(4)
        assert_same_bits(run.parameters, before)
        assert [one.action for one in session.interventions] == ["reject"]


def test_rejection_ends_the_questions() -> None:
    run = Run()
    first, second = Deciding(at(0, Reject("as told.")), snapshots_state=True), Joint(at(0, Scale(0.5, "as told.")))
    with run.attach(first, second) as session:
        run.step(1)
    assert [one.action for one in session.interventions] == ["reject"]
    assert second.seen == []


def test_rejection_after_a_scale_goes_back_all_the_way() -> None:
    run = prepared()
    before = run.parameters
    rejecting = Joint(at(0, Reject("as told.")), snapshots_state=True)
    with run.attach(scaling(0.5, "body.weight", per_parameter=True), scaling(0.5), rejecting):
        run.step(3)
    assert_same_bits(run.parameters, before)


@pytest.mark.parametrize("needs", [Need.NOTHING, Need.GRADIENTS])
@pytest.mark.parametrize("decision", [Scale(0.0, "as told."), Reject("as told.")])
def test_decision_on_an_update_that_nobody_kept_is_never_silently_dropped(
    needs: Need, decision: Scale | Reject
) -> None:
    """A controller that reads gradients alone may still take the step back: that is done, or said to be impossible."""
    run = prepared()
    before = run.parameters
    with run.attach(Deciding(at(0, decision), needs=needs, snapshots_state=True)):
        try:
            run.step(3)
        except (ConfigurationError, ControllerError):
            return
    assert_same_bits(run.parameters, before)


# Controllers that fail ----------------------------------------------------------------------------


def fail(step: Step) -> Any:
    raise ZeroDivisionError("of its own making")


@EVERY_OPTIMIZER
def test_controller_that_raises_leaves_the_step_as_it_is(
    optimizers: Callable[[nn.Module], list[Optimizer]],
) -> None:
    alone, run = prepared(optimizers), prepared(optimizers)
    alone.step(3)
    with run.attach(Deciding(fail)):
        with pytest.raises(
            ControllerError, match=r"Deciding failed at step 0 with ZeroDivisionError: of its own making"
        ):
            run.step(3)
        assert_same_bits(run.parameters, alone.parameters)
        assert run.state == alone.state


def test_controller_that_raises_before_the_update_leaves_parameters_and_gradients() -> None:
    run = prepared()
    before, state = run.parameters, run.state
    with run.attach(Deciding(withhold=fail)):
        run.backward(3)
        gradient = run.model.get_parameter("body.weight").grad
        with pytest.raises(ControllerError, match="Deciding failed at step 0 with ZeroDivisionError"):
            run.optimizers[0].step()
        assert_same_bits(run.parameters, before)
        assert run.state == state
        assert run.model.get_parameter("body.weight").grad is gradient


def test_controller_that_raises_undoes_what_others_decided_before_it() -> None:
    """The error says that the parameters are as the optimizer left them: then they are."""
    alone, run = prepared(), prepared()
    alone.step(3)
    with run.attach(scaling(0.5), Joint(fail)):
        with pytest.raises(ControllerError, match="The parameters are as the optimizer left them"):
            run.step(3)
        assert_same_bits(run.parameters, alone.parameters)


@pytest.mark.parametrize("moment", ["answer", "withhold"])
def test_run_can_go_on_after_a_controller_failed(moment: str) -> None:
    run = prepared()

    def once(step: Step) -> Any:
        if step.index == 0 and not failed:
            failed.append(True)
            raise ZeroDivisionError("of its own making")
        return [Scale(0.5, "as told.")] if moment == "answer" else None

    failed: list[bool] = []
    controller = Deciding(once) if moment == "answer" else Deciding(withhold=once)
    with run.attach(controller, monitors=[redline.StepHealth(1)]) as session:
        with pytest.raises(ControllerError, match="ZeroDivisionError"):
            run.step(3)
        run.optimizers[0].zero_grad()
        run.backward(4)
        expected = norm({name: p.grad for name, p in run.model.named_parameters() if p.grad is not None})
        before = run.parameters
        run.optimizers[0].step()
        assert session.latest.value("redline_gradient_norm") == pytest.approx(expected, rel=1e-5)
        moved = {name: tensor - before[name] for name, tensor in run.parameters.items()}
        factor = 0.5 if moment == "answer" else 1.0
        assert norm(moved) == pytest.approx(factor * controller.norms[-1], rel=1e-3)


@pytest.mark.parametrize(
    "controller",
    [
        pytest.param(lambda: scaling(0.5, "no.such.parameter"), id="a parameter that is none"),
        pytest.param(lambda: Deciding(lambda step: None), id="no list"),  # type: ignore[arg-type,return-value]
        pytest.param(lambda: Deciding(lambda step: [0.5]), id="a bare number"),
        pytest.param(lambda: Deciding(lambda step: [Withhold("too late.")]), id="a withhold after the update"),
        pytest.param(lambda: Deciding(withhold=lambda step: True), id="a bare yes"),  # type: ignore[arg-type,return-value]
    ],
)
def test_answer_that_is_no_decision_is_refused_by_name(controller: Callable[[], Deciding]) -> None:
    run = prepared()
    with (
        run.attach(controller()),
        pytest.raises((ControllerError, ConfigurationError), match=r"Deciding|no\.such\.parameter"),
    ):
        run.step(3)


# Several optimizers, one joint step ---------------------------------------------------------------


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


# Who may be controlled ----------------------------------------------------------------------------


class Descent(Optimizer):
    """Gradient descent, and what subclasses do about it."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.move(parameter, group)

    def move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        parameter -= group["lr"] * parameter.grad


class Lookahead(Descent):
    """Keeps slow weights, and every second step writes the parameters from them."""

    def move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(steps=0, slow_buffer=parameter.clone())
        super().move(parameter, group)
        state["steps"] += 1
        if state["steps"] % 2 == 0:
            parameter.copy_(state["slow_buffer"].lerp_(parameter, 0.5))


class MasterWeights(Descent):
    """Works on float32 copies of half-precision parameters, under a name and a key that nobody knows."""

    def move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["precise"] = parameter.float()
        state["precise"] -= group["lr"] * parameter.grad.float()
        parameter.copy_(state["precise"])


class Counting(Descent):
    """Keeps a number, a list and a setting of the group, none of them tensors."""

    def move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        super().move(parameter, group)
        group["moves"] = group.get("moves", 0) + 1
        state = self.state[parameter]
        state.setdefault("history", []).append(group["moves"])
        state["count"] = state.get("count", 0) + 1


def lookahead(model: nn.Module) -> list[Optimizer]:
    return [Lookahead(model.parameters(), 0.1)]


def master_weights(model: nn.Module) -> list[Optimizer]:
    return [MasterWeights(model.parameters(), 0.1)]


def lbfgs(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.LBFGS(model.parameters(), 0.1, max_iter=3)]


@pytest.mark.parametrize(
    ("optimizers", "message"),
    [
        (lbfgs, "got controllers on LBFGS, which may only be monitored: LBFGS moves the parameters many times"),
        (lookahead, "got controllers on Lookahead, which may only be monitored: Lookahead keeps shadow weights"),
    ],
)
def test_optimizer_known_to_undo_control_is_refused_by_name(
    optimizers: Callable[[nn.Module], list[Optimizer]], message: str
) -> None:
    run = Run(optimizers)
    hooks = len(run.model._forward_pre_hooks), len(run.optimizers[0]._optimizer_step_pre_hooks)
    with pytest.raises(ConfigurationError, match=message):
        run.attach(Deciding())
    assert hooks == (len(run.model._forward_pre_hooks), len(run.optimizers[0]._optimizer_step_pre_hooks))


def test_one_of_several_that_undoes_control_is_refused() -> None:
    run = Run(lambda model: [torch.optim.SGD([model.head.weight], 0.1), Lookahead([model.body.weight], 0.1)])
    with pytest.raises(ConfigurationError, match="got controllers on Lookahead"):
        run.attach(Deciding())


def test_master_weights_are_found_out_when_they_appear() -> None:
    run = Run(master_weights, torch.bfloat16)
    with (
        run.attach(scaling(0.5)),
        pytest.raises(ConfigurationError, match=r"on MasterWeights.*keeps shadow weights \(state 'precise'\)"),
    ):
        run.step(1)


def test_master_weights_of_a_resumed_run_are_refused_at_once() -> None:
    run = Run(master_weights, torch.bfloat16)
    run.step(1)
    with pytest.raises(ConfigurationError, match="got controllers on MasterWeights, which may only be monitored"):
        run.attach(Deciding())


def test_master_weights_that_appear_after_a_withheld_step_are_found_out() -> None:
    run = Run(master_weights, torch.bfloat16)
    controller = Deciding(lambda step: [Scale(0.5, "as told.")], withhold=withholding(0))
    with run.attach(controller):
        run.step(1)
        with pytest.raises(ConfigurationError, match="got controllers on MasterWeights, which may only be monitored"):
            run.step(2)


@pytest.mark.parametrize(
    ("optimizers", "dtype"), [(lookahead, torch.float32), (master_weights, torch.bfloat16), (lbfgs, torch.float32)]
)
def test_optimizers_that_must_not_be_controlled_may_be_watched(
    optimizers: Callable[[nn.Module], list[Optimizer]], dtype: torch.dtype
) -> None:
    alone, run = Run(optimizers, dtype), Run(optimizers, dtype)

    def step(run: Run, seed: int) -> None:
        def closure() -> Tensor:
            run.optimizers[0].zero_grad()
            run.backward(seed)
            return torch.tensor(1.0)

        run.optimizers[0].step(closure) if optimizers is lbfgs else run.step(seed)

    with run.attach(monitors=[redline.UpdateSpectrum(1), redline.GhostRadius(1), redline.StepHealth(1)]) as session:
        for seed in range(3):
            before = run.parameters
            step(alone, seed)
            step(run, seed)
            update = {name: tensor.double() - before[name].double() for name, tensor in run.parameters.items()}
            assert session.latest.value("redline_update_norm") == pytest.approx(norm(update), rel=1e-3)
    assert_same_bits(run.parameters, alone.parameters)
    assert session.latest.value("redline_measurements_total", monitor="GhostRadius") == 3
    assert session.notes == ()


@pytest.mark.parametrize(
    "kind",
    [
        torch.optim.Adadelta,
        torch.optim.Adafactor,
        torch.optim.Adagrad,
        torch.optim.Adam,
        torch.optim.Adamax,
        torch.optim.ASGD,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.RMSprop,
        torch.optim.Rprop,
        torch.optim.SGD,
    ],
)
def test_optimizers_of_torch_may_be_controlled(kind: type[Optimizer]) -> None:
    """An average that is not read back, such as ASGD's, is no shadow weight."""
    alone, run = (Run(lambda model: [kind(model.parameters())]) for _ in range(2))
    before = run.parameters
    alone.step(1)
    with run.attach(scaling(0.5)) as session:
        run.step(1)
    assert_scaled(run.parameters, before, alone.parameters, dict.fromkeys(before, 0.5))
    assert len(session.interventions) == 1


def test_step_counter_that_equals_a_scalar_parameter_is_no_shadow_weight() -> None:
    """A gate of 1 behind a layer that starts at 0 has no gradient at first, and Adam's first count is 1."""
    run = Run(adam)
    run.model.gate = nn.Parameter(torch.tensor(1.0))
    run.model.gate.grad = torch.zeros(())
    run.optimizers[0].add_param_group({"params": [run.model.gate]})
    with run.attach(scaling(0.5)) as session:
        run.step(1)
    assert len(session.interventions) == 1


# Optimizers that build on others ------------------------------------------------------------------


class Shrinking(torch.optim.SGD):
    """Calls its base class's step, as many do, and moves the parameters once more."""

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter *= 0.5
        return result


def shrinking(model: nn.Module) -> list[Optimizer]:
    torch.optim.SGD([torch.zeros(1)], 0.1)  # from the first instance on, the base class's step runs hooks of its own
    return [Shrinking(model.parameters(), 0.1, momentum=0.9)]


def test_step_that_calls_its_base_class_is_one_step() -> None:
    alone, run = prepared(shrinking), prepared(shrinking)
    before = run.parameters
    alone.step(3)
    monitors = [redline.GhostRadius(1), redline.UpdateSpectrum(1), redline.StepHealth(1)]
    with run.attach(monitors=monitors) as session:
        run.step(3)
        latest = session.latest
    update = {name: tensor - before[name] for name, tensor in alone.parameters.items()}
    assert latest.value("redline_steps_total") == 1
    assert latest.value("redline_update_norm") == pytest.approx(norm(update), rel=1e-5)
    assert latest.value("redline_measurements_total", monitor="GhostRadius") == 1
    assert "redline_normalized_step_size" in latest


def test_step_that_calls_its_base_class_is_scaled_as_a_whole() -> None:
    alone, run = prepared(shrinking), prepared(shrinking)
    before = run.parameters
    alone.step(3)
    controller = scaling(0.5)
    with run.attach(controller):
        run.step(3)
    assert len(controller.seen) == 1
    assert_scaled(run.parameters, before, alone.parameters, dict.fromkeys(before, 0.5))


def test_step_that_calls_its_base_class_is_withheld_once_as_a_whole() -> None:
    run = prepared(shrinking)
    before, state = run.parameters, run.state
    asked: list[int] = []

    def first_time(step: Step) -> Withhold | None:
        asked.append(step.index)
        return Withhold("as told.") if len(asked) == 1 else None

    with run.attach(Deciding(withhold=first_time)):
        run.step(3)
    assert asked == [0]
    assert_same_bits(run.parameters, before)
    assert run.state == state


def test_step_that_calls_its_base_class_is_taken_back_as_a_whole() -> None:
    run = prepared(shrinking)
    before, state = run.parameters, run.state
    with run.attach(Deciding(at(0, Reject("as told.")), snapshots_state=True)):
        run.step(3)
    assert_same_bits(run.parameters, before)
    assert run.state == state
