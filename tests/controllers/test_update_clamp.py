"""UpdateClamp: no matrix is pushed harder than its limit, decay stays whole, and the weights stay under the ceiling.

What is committed is held against an identical run that nobody controls, by singular values in float64.
"""

from __future__ import annotations

import copy
import io
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from runs import HostReads, frozen
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR

import redline
import redline.spectrum_tracker
import redline.update_limits
from redline import ConfigurationError, RedlineWarning, StepClamp, UpdateClamp
from redline.integrations.demo.data import byte_batch, digits, library_bytes
from redline.integrations.demo.models import ByteLM
from redline.numerics import top_singular_values

FEATURES, CLASSES, BATCH = 12, 5, 16
CEILING = "redline_weight_spectral_ceiling"
TOLERANCE = 1e-3  # of sigma_1, as asked for


# Optimizers -------------------------------------------------------------------------------------------------------


class SGDW(Optimizer):
    """SGD with momentum and decoupled weight decay (arXiv 1711.05101, algorithm 1)."""

    def __init__(
        self, parameters: Any, lr: float | Tensor, momentum: float = 0.9, weight_decay: float | Tensor = 0.0
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    buffer = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                    buffer.mul_(group["momentum"]).add_(parameter.grad)
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * buffer)


class Lion(Optimizer):
    """The sign of an average of gradients (arXiv 2302.06675, algorithm 2)."""

    def __init__(
        self, parameters: Any, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            fast, slow = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is not None:
                    average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
                    sign = average.lerp(parameter.grad, 1 - fast).sign()
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * sign)
                    average.lerp_(parameter.grad, 1 - slow)


Optimizers = Callable[[nn.Module], list[Optimizer]]


def sgd(model: nn.Module) -> list[Optimizer]:
    """Without momentum torch's decay is decoupled."""
    return [torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.5)]


def sgdw(model: nn.Module) -> list[Optimizer]:
    return [SGDW(model.parameters(), 0.1, weight_decay=0.5)]


def adamw(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.5)]


def adamw_fused(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.5, fused=True)]


def adamw_in_groups(model: nn.Module) -> list[Optimizer]:
    """Each matrix at a rate and a decay of its own."""
    groups = [
        {"params": [parameter], "lr": rate, "weight_decay": decay}
        for parameter, rate, decay in zip(
            [p for p in model.parameters() if p.dim() > 1], (1e-3, 3e-2, 1e-2), (2.0, 0.0, 0.5), strict=True
        )
    ]
    vectors = {"params": [p for p in model.parameters() if p.dim() == 1], "lr": 1e-2, "weight_decay": 0.0}
    return [torch.optim.AdamW([*groups, vectors])]


def lion(model: nn.Module) -> list[Optimizer]:
    return [Lion(model.parameters(), 3e-3, weight_decay=1.0)]


def muon_and_adamw(model: nn.Module) -> list[Optimizer]:
    """The last matrix is AdamW's, as a head mostly is."""
    *matrices, head = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() != 2]
    return [
        torch.optim.Muon(matrices, 0.02, weight_decay=0.5),
        torch.optim.AdamW([head, *vectors], 1e-2, weight_decay=0.2),
    ]


EVERY_OPTIMIZER = pytest.mark.parametrize(
    "optimizers",
    [sgd, sgdw, adamw, adamw_fused, adamw_in_groups, lion, muon_and_adamw],
    ids=lambda make: make.__name__,
)
EITHER_WAY = pytest.mark.parametrize("relative_to", ["fan", "weight"])


# Runs -------------------------------------------------------------------------------------------------------------


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 20), nn.Tanh(), nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, FEATURES, generator=generator)
    return x, torch.randint(0, CLASSES, (BATCH,), generator=generator)


class Rate(NamedTuple):
    lr: float
    weight_decay: float

    @property
    def decay(self) -> float:
        return self.lr * self.weight_decay


class Run:
    """A model with its optimizers; two made alike are alike."""

    def __init__(self, optimizers: Optimizers = adamw, model: Callable[[], nn.Module] = plain) -> None:
        torch.manual_seed(0)
        self.model = model()
        self.optimizers = optimizers(self.model)

    def backward(self, seed: int) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        x, y = batch(seed)
        F.cross_entropy(self.model(x), y).backward()

    def give(self, seed: int, sizes: Mapping[str, float]) -> None:
        """Random gradients, of the sizes given for parameters whose names begin so, else of size 1."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.model.named_parameters():
            size = next((size for start, size in sizes.items() if name.startswith(start)), 1.0)
            parameter.grad = size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)

    def update(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def step(self, seed: int) -> None:
        self.backward(seed)
        self.update()

    def attach(self, *controllers: redline.Controller, **arguments: Any) -> redline.Session:
        arguments = {"monitors": [], **arguments}
        return redline.attach(self.model, self.optimizers, controllers=controllers, **arguments)

    def uncontrolled(self) -> Run:
        """A copy, which nobody watches."""
        twin = copy.copy(self)
        twin.model, twin.optimizers = copy.deepcopy((self.model, self.optimizers))
        for mine, its in zip(self.model.parameters(), twin.model.parameters(), strict=True):
            its.grad = None if mine.grad is None else mine.grad.clone()
        return twin

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    @property
    def rates(self) -> dict[str, Rate]:
        """As the groups have them; all that decays here is decoupled."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return {
            names[id(parameter)]: Rate(float(group["lr"]), float(group.get("weight_decay", 0.0)))
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }

    @property
    def everything(self) -> Any:
        return frozen(self.model.state_dict()), [frozen(optimizer.state_dict()) for optimizer in self.optimizers]


def prepared(optimizers: Optimizers = adamw, model: Callable[[], nn.Module] = plain) -> Run:
    """Two steps in, so that moments are there."""
    run = Run(optimizers, model)
    run.step(1)
    run.step(2)
    return run


# The reference ----------------------------------------------------------------------------------------------------


def top(matrix: Tensor) -> float:
    """The largest singular value, in float64."""
    return float(torch.linalg.svdvals(matrix.detach().double())[0])


def fan(matrix: Tensor) -> float:
    return math.sqrt(matrix.shape[0] / matrix.shape[1])


def limit_of(before: Tensor, limit: float, relative_to: str, rate: Rate) -> float:
    return limit * (rate.lr * fan(before) if relative_to == "fan" else top(before))


def net(before: Tensor, after: Tensor, decay: float) -> Tensor:
    """The update net of decoupled decay."""
    return after.double() - (1 - decay) * before.double()


def assert_held(before: Tensor, own: Tensor, actual: Tensor, limit: float, decay: float) -> bool:
    """One matrix under a limit of ``sigma_1``, ``own`` being what the optimizer alone makes of it.

    Returns:
        Whether it was over.
    """
    proposed, committed = net(before, own, decay), net(before, actual, decay)
    sigma = top(proposed)
    if sigma <= limit * (1 - 2 * TOLERANCE):
        assert frozen(actual) == frozen(own), "under the limit it is the optimizer's own"
        return False
    if sigma > limit:
        assert top(committed) <= limit * (1 + TOLERANCE), "within the limit"
        assert top(committed) >= limit * (1 - 2 * TOLERANCE), "and as long as allowed"
    factor = (committed * proposed).sum() / proposed.square().sum()
    expected = (1 - decay) * before.double() + factor * proposed
    rounding = 2 * torch.finfo(actual.dtype).eps * (before.double().abs() + proposed.abs())
    bound = rounding + 1e-5 * proposed.abs().amax()  # the factor is fitted to what was rounded
    assert bool(((actual.double() - expected).abs() <= bound).all()), "the same way, with the whole of the decay"
    return sigma > limit


def assert_all_held(
    before: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    actual: Mapping[str, Tensor],
    limit: float,
    relative_to: str,
    rates: Mapping[str, Rate],
) -> list[bool]:
    """Vectors untouched; of the matrices, whether each was over."""
    over = []
    for name in before:
        if before[name].dim() == 1:
            assert frozen(actual[name]) == frozen(own[name]), name
        else:
            at_most = limit_of(before[name], limit, relative_to, rates[name])
            over.append(assert_held(before[name], own[name], actual[name], at_most, rates[name].decay))
    return over


def typical(optimizers: Optimizers, relative_to: str, model: Callable[[], nn.Module] = plain) -> float:
    """What the optimizer's net updates come to by themselves, in the limit's unit; the median."""
    run, found = prepared(optimizers, model), []
    for seed in range(3, 9):
        before, rates = run.parameters, run.rates
        run.step(seed)
        found += [
            top(net(before[name], after, rates[name].decay)) / limit_of(before[name], 1.0, relative_to, rates[name])
            for name, after in run.parameters.items()
            if after.dim() == 2
        ]
    return statistics.median(found)


# The limit --------------------------------------------------------------------------------------------------------


@EVERY_OPTIMIZER
@EITHER_WAY
def test_each_matrix_is_held_to_its_limit_and_the_others_keep_the_optimizers_own_bits(
    optimizers: Optimizers, relative_to: Any
) -> None:
    """Direction and decay are as they were; vectors and the optimizer's state are left alone."""
    limit, over = typical(optimizers, relative_to), []
    run = prepared(optimizers)
    with run.attach(UpdateClamp(limit, relative_to)) as session:
        for seed in range(3, 13):
            alone, before, rates = run.uncontrolled(), run.parameters, run.rates
            alone.step(seed)
            run.step(seed)
            over.append(assert_all_held(before, alone.parameters, run.parameters, limit, relative_to, rates))
            assert frozen([o.state_dict() for o in run.optimizers]) == frozen(
                [o.state_dict() for o in alone.optimizers]
            )
            assert session.latest.value("redline_step_scale") == 1, "that of the joint step"
    assert 0 < sum(map(sum, over)) < sum(map(len, over)), "some were over, and some were not"
    acted = [step for step, matrices in enumerate(over) if any(matrices)]
    assert {one.step for one in session.interventions} >= set(acted)
    assert session.notes == ()


@pytest.mark.parametrize("optimizers", [adamw, lion, muon_and_adamw], ids=lambda make: make.__name__)
@pytest.mark.parametrize("on_accelerator", [False, True])
def test_the_limit_holds_where_the_spectrum_is_found_by_iteration(
    optimizers: Optimizers, on_accelerator: bool, accelerated: Callable[[], None]
) -> None:
    """Matrices of more than 64 by 64; Muon's updates have singular values that all but coincide.

    On an accelerator so many iterations are made, and nobody looks whether they were enough.
    """
    tolerance = TOLERANCE
    if on_accelerator:
        accelerated()
        tolerance = 0.03
    run = Run(optimizers, lambda: ByteLM(width=96, layers=1, context=16))
    limit, found = 0.1, []
    text, windows = library_bytes(200_000), torch.Generator().manual_seed(0)
    with run.attach(UpdateClamp(limit, "fan")):
        for _ in range(12):
            x, y = byte_batch(text, 8, 16, windows)
            F.cross_entropy(run.model(x).flatten(0, 1), y.flatten()).backward()
            before, rates = run.parameters, run.rates
            run.update()
            found += [
                top(net(before[name], after, rates[name].decay)) / limit_of(after, limit, "fan", rates[name])
                for name, after in run.parameters.items()
                if after.dim() == 2
            ]
    assert max(found) <= 1 + tolerance
    assert min(found) >= 1 - 2 * TOLERANCE, "each was over, and is as long as allowed"


@EITHER_WAY
def test_asking_norms_first_changes_nothing(relative_to: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Updates of all sizes around the limit, of rank 1 and of full rank."""

    def run() -> tuple[Any, Any]:
        one = Run(lambda model: [torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.5)])
        with one.attach(UpdateClamp(0.3, relative_to)) as session:
            for seed in range(40):
                one.give(seed, {"0": 0.004 * 1.15**seed, "2": 8.0 / 1.4**seed, "4": 0.02})
                if seed % 2:
                    for parameter in one.model.parameters():
                        if parameter.dim() == 2:
                            parameter.grad = torch.outer(parameter.grad[:, 0], parameter.grad[0]) / 4  # type: ignore[index]
                one.update()
        return one.everything, [frozen({k: v for k, v in vars(i).items() if k != "saw"}) for i in session.interventions]

    first = run()
    monkeypatch.setattr(redline.update_limits.UpdateLimits, "_is_surely_under", lambda *_: False)
    assert run() == first
    assert 5 < len(first[1]) < 40


def test_where_norms_say_enough_no_spectrum_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    measure = redline.spectrum_tracker.SpectrumTracker.measure
    monkeypatch.setattr(
        redline.spectrum_tracker.SpectrumTracker, "measure", lambda *asked: (taken.append(1), measure(*asked))[1]
    )
    run = prepared(adamw)
    with run.attach(UpdateClamp()):
        run.step(3)
        assert taken == []
        run.optimizers[0].param_groups[0]["lr"] = 10.0
        run.step(4)
        assert taken == [1, 1], "of updates and of weights"


@EVERY_OPTIMIZER
def test_a_limit_that_nothing_reaches_leaves_the_run_its_own_to_the_bit(optimizers: Optimizers) -> None:
    alone, run = Run(optimizers), Run(optimizers)
    torch.manual_seed(5)
    random_state = torch.get_rng_state()
    with run.attach(UpdateClamp(1e4, "fan"), UpdateClamp(1e4, "weight")) as session:
        for seed in range(6):
            alone.step(seed)
            run.step(seed)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert run.everything == alone.everything
    assert session.interventions == ()


def test_weight_goes_by_the_matrix_as_it_was_before_the_step() -> None:
    """A spike a thousand times as strong would pass by what it makes of it."""
    alone, run = prepared(adamw), prepared(adamw)
    for one in (alone, run):
        one.optimizers[0].param_groups[0]["lr"] *= 1000
    before, rates = run.parameters, run.rates
    alone.step(3)
    own = alone.parameters
    assert all(top(net(before[n], own[n], rates[n].decay)) < 1.1 * top(own[n]) for n in own if own[n].dim() == 2)
    with run.attach(UpdateClamp()) as session:
        run.step(3)
    assert assert_all_held(before, own, run.parameters, 1.0, "weight", rates) == [True] * 3
    (one,) = session.interventions
    assert one.saw["limit"] in [pytest.approx(top(before[f"{k}.weight"]), rel=2e-3) for k in (0, 2, 4)]


@pytest.mark.parametrize("relative_to", ["fan", "weight"])
def test_a_matrix_that_is_zero_has_no_strength_to_go_by(relative_to: Any) -> None:
    """As the second factor of a LoRA is at first; from its second step on it has."""

    def zeroed() -> nn.Module:
        model = plain()
        nn.init.zeros_(model.get_parameter("2.weight"))
        return model

    run = Run(adamw, zeroed)
    limit = 0.5
    with run.attach(UpdateClamp(limit, relative_to)) as session:
        for seed, held in ((1, relative_to == "fan"), (2, True)):
            alone, before, rate = run.uncontrolled(), run.parameters["2.weight"], run.rates["2.weight"]
            alone.step(seed)
            run.step(seed)
            own, actual = alone.parameters["2.weight"], run.parameters["2.weight"]
            assert bool(before.any()) is (seed == 2)
            if held:
                assert assert_held(before, own, actual, limit_of(before, limit, relative_to, rate), rate.decay)
            else:
                assert frozen(actual) == frozen(own)
        if relative_to == "fan":
            assert session.latest.value(CEILING, layer="2.weight") == pytest.approx(fan(before), rel=1e-5)
        else:
            assert CEILING not in session.latest


def test_without_decay_the_whole_update_is_held_and_there_is_no_ceiling() -> None:
    run = Run(lambda model: [torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.0)])
    with run.attach(UpdateClamp(0.5, "fan")) as session:
        for seed in range(4):
            alone, before, rates = run.uncontrolled(), run.parameters, run.rates
            alone.step(seed)
            run.step(seed)
            assert all(assert_all_held(before, alone.parameters, run.parameters, 0.5, "fan", rates))
        assert CEILING not in session.latest
    assert session.notes == ()


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


# The ceiling ------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("kind", LONG)
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


class Decaying(redline.Controller):
    """Decays matrices by decays of its own."""

    per_parameter = True

    def __init__(self, decays: Callable[[int], Mapping[str, float]]) -> None:
        self.decays = decays

    def inspect(self, step: redline.Step) -> Iterable[redline.Decay]:
        wanted = self.decays(step.index)
        layers = [layer for layer in step.layers if layer.name in wanted]
        return [redline.Decay(layers, torch.tensor([wanted[layer.name] for layer in layers]), "so.")] if layers else []


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


# Matrices of every kind -------------------------------------------------------------------------------------------


class Stacks(nn.Module):
    """Experts in one parameter, heads of experts, and position embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(0.3 * torch.randn(4, 7, 5))
        self.heads = nn.Parameter(0.3 * torch.randn(2, 3, 4, 6))
        self.position = nn.Parameter(0.3 * torch.randn(1, 6, 9))
        self.token = nn.Parameter(0.3 * torch.randn(1, 1, 9))


def convolutions() -> nn.Module:
    return nn.ModuleDict(
        {
            "conv": nn.Conv2d(2, 6, 3),
            "up": nn.ConvTranspose2d(6, 4, 2, stride=2),
            "grouped": nn.Conv2d(4, 8, 3, groups=2),
            "line": nn.Conv1d(3, 5, 4),
            "line_up": nn.ConvTranspose1d(4, 6, 3, groups=2),
        }
    )


def whole(tensor: Tensor) -> list[Tensor]:
    return [tensor.flatten(1)]


def turned(tensor: Tensor) -> list[Tensor]:
    return [tensor.transpose(0, 1).flatten(1)]


VIEWS: dict[Any, dict[str, Callable[[Tensor], list[Tensor]]]] = {
    convolutions: {
        "conv.weight": whole,
        "up.weight": turned,
        "grouped.weight": whole,
        "line.weight": whole,
        "line_up.weight": turned,
    },
    Stacks: {
        "experts": list,
        "heads": lambda tensor: list(tensor.flatten(0, 1)),
        "position": lambda tensor: [tensor[0]],
    },
}


@pytest.mark.parametrize("model", VIEWS)
@EITHER_WAY
def test_each_matrix_of_a_convolution_or_of_a_stack_is_held_by_itself(
    model: Callable[[], nn.Module], relative_to: Any
) -> None:
    """In a stack whose other matrices are under the limit these keep their bits."""
    run = Run(lambda model: [torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.5)], model)
    limit, over, started = 2.0 if relative_to == "fan" else 0.3, [], run.parameters
    with run.attach(UpdateClamp(limit, relative_to)) as session:
        for seed in range(12):
            sizes = torch.logspace(-2, 0, len(VIEWS[model])).roll(seed).tolist()
            run.give(seed, dict(zip(VIEWS[model], sizes, strict=True)))
            if model is Stacks:
                for name in ("experts", "heads"):
                    gradient = run.model.get_parameter(name).grad
                    gradient.view(-1, *gradient.shape[-2:])[seed % 3].mul_(30.0)  # type: ignore[union-attr]
            alone, before, rates = run.uncontrolled(), run.parameters, run.rates
            alone.update()
            run.update()
            own, actual = alone.parameters, run.parameters
            for name, before_it in before.items():
                if name not in VIEWS[model]:
                    assert frozen(actual[name]) == frozen(own[name])
                    continue
                view = VIEWS[model][name]
                for one in zip(view(before_it), view(own[name]), view(actual[name]), strict=True):
                    at_most = limit_of(one[0], limit, relative_to, rates[name])
                    over.append(assert_held(*one, at_most, rates[name].decay))
        expected = {
            f"{name}[{k}]" if len(view(started[name])) > 1 else name: max(top(one), limit * fan(one) / 0.5)
            for name, view in VIEWS[model].items()
            for k, one in enumerate(view(started[name]))
        }
        if relative_to == "fan":
            assert session.latest.layers(CEILING) == pytest.approx(expected, rel=2 * TOLERANCE)
    assert 0.1 * len(over) < sum(over) < 0.9 * len(over)


def test_each_matrix_of_a_stack_decays_and_is_capped_by_itself() -> None:
    """A controller puts decays of their own on some of them."""
    decays = {"experts[1]": 2.0, "experts[3]": 0.25, "heads[4]": 1.0}
    run = Run(lambda model: [torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.5)], Stacks)
    limit, started = 2.0, run.parameters
    with run.attach(UpdateClamp(limit, "fan"), Decaying(lambda index: decays)) as session:
        for seed in range(4):
            run.give(seed, {"": 10.0})
            alone, before = run.uncontrolled(), run.parameters
            alone.update()
            run.update()
            own, actual, ceilings = alone.parameters, run.parameters, session.latest.layers(CEILING)
            for name in ("experts", "heads"):
                view = VIEWS[Stacks][name]
                pairs = zip(view(before[name]), view(own[name]), view(actual[name]), view(started[name]), strict=True)
                for k, (before_it, own_it, actual_it, started_it) in enumerate(pairs):
                    rate = Rate(0.1, decays.get(f"{name}[{k}]", 0.5))
                    moved = own_it - (rate.decay - 0.05) * before_it  # the same update, the other decay
                    at_most = limit_of(before_it, limit, "fan", rate)
                    assert assert_held(before_it, moved, actual_it, at_most, rate.decay)
                    expected = max(top(started_it), limit * fan(before_it) / rate.weight_decay)
                    assert ceilings[f"{name}[{k}]"] == pytest.approx(expected, rel=2 * TOLERANCE)


@EITHER_WAY
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_in_other_precisions_it_is_held_to_rounding_and_what_is_under_keeps_its_bits(
    dtype: torch.dtype, relative_to: Any
) -> None:
    """A bfloat16 matrix rounds its update to 1 / 256 of the weight: at a low rate most of it."""
    limit = 1.5 if relative_to == "fan" else 0.2
    run = Run(lambda model: [torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.5)], lambda: plain().to(dtype))
    eps, over = torch.finfo(dtype).eps, []
    with run.attach(UpdateClamp(limit, relative_to)) as session:
        for seed in range(10):
            run.give(seed, {"0": 0.01 * 2**seed, "2": 5.0 / 2**seed})
            alone, before, rates = run.uncontrolled(), run.parameters, run.rates
            alone.update()
            run.update()
            for name, own in alone.parameters.items():
                actual = run.parameters[name]
                assert actual.dtype is dtype
                if own.dim() == 1:
                    assert frozen(actual) == frozen(own)
                    continue
                decay, at_most = rates[name].decay, limit_of(before[name], limit, relative_to, rates[name])
                proposed, committed = net(before[name], own, decay), net(before[name], actual, decay)
                over.append(top(proposed) > at_most)
                if top(proposed) <= at_most * (1 - 2 * TOLERANCE):
                    assert frozen(actual) == frozen(own)
                else:
                    expected = (1 - decay) * before[name].double() + proposed * min(1.0, at_most / top(proposed))
                    allowed = 2 * TOLERANCE * (proposed * at_most / top(proposed)).abs() + eps * expected.abs() / 2
                    assert bool(((actual.double() - expected).abs() <= allowed + 1e-7).all())
                    rounded = float(torch.linalg.norm(eps / 2 * actual.double()))
                    assert top(committed) <= at_most * (1 + TOLERANCE) + rounded
    assert 0 < sum(over) < len(over)
    assert session.notes == ()


def test_models_of_mixed_precision_are_held() -> None:
    def mixed() -> nn.Module:
        model = plain()
        model[0].double()
        model[2].bfloat16()
        return model

    run = Run(lambda model: [torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.5)], mixed)
    with run.attach(UpdateClamp(0.5, "fan"), UpdateClamp(0.1, "weight")) as session:
        for seed in range(3):
            run.give(seed, {"": 10.0})
            before, rates = run.parameters, run.rates
            run.update()
            for name in ("0.weight", "2.weight", "4.weight"):
                committed = net(before[name], run.parameters[name], rates[name].decay)
                slack = top(before[name]) / 100 if before[name].dtype is torch.bfloat16 else 0.0
                assert top(committed) <= 0.5 * 0.1 * fan(committed) * (1 + TOLERANCE) + slack
        assert set(session.latest.layers(CEILING)) == {"0.weight", "2.weight", "4.weight"}


# Steps of other kinds ---------------------------------------------------------------------------------------------


@EITHER_WAY
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_update_that_is_not_finite_is_left_to_guards_and_the_others_are_held(value: float, relative_to: Any) -> None:
    run = prepared(sgdw)
    run.give(1, {"": 50.0})
    run.model.get_parameter("2.weight").grad[0, 0] = value  # type: ignore[index]
    alone, before, rates = run.uncontrolled(), run.parameters, run.rates
    alone.update()
    with run.attach(UpdateClamp(0.5, relative_to)) as session:
        run.update()
        own, actual = alone.parameters, run.parameters
        assert frozen(actual["2.weight"]) == frozen(own["2.weight"])
        for name in ("0.weight", "4.weight"):
            at_most = limit_of(before[name], 0.5, relative_to, rates[name])
            assert assert_held(before[name], own[name], actual[name], at_most, rates[name].decay)
    (one,) = session.interventions
    assert one.saw["matrices"] == 2
    assert math.isfinite(one.saw["sigma"])


@EITHER_WAY
def test_a_rate_that_is_not_a_number_is_left_to_guards(relative_to: Any) -> None:
    alone, run = prepared(adamw), prepared(adamw)
    for one in (alone, run):
        one.optimizers[0].param_groups[0]["lr"] = math.nan
    alone.step(3)
    with run.attach(UpdateClamp(0.1, relative_to)) as session:
        run.step(3)
    assert run.everything == alone.everything
    assert session.interventions == ()


def test_of_what_a_guard_takes_back_or_withholds_nothing_is_told() -> None:
    run = prepared(adamw)
    with run.attach(UpdateClamp(0.5, "fan"), redline.NonFiniteGuard(restore_state=True)) as session:
        run.step(3)
        ceilings, before = session.latest.layers(CEILING), run.everything
        run.give(4, {"": 1e3})
        run.model.get_parameter("2.weight").grad[0, 0] = math.nan  # type: ignore[index]
        run.update()
        assert run.everything == before, "withheld"
        rate = run.optimizers[0].param_groups[0]["lr"]
        run.optimizers[0].param_groups[0]["lr"] = math.inf
        run.step(5)
        run.optimizers[0].param_groups[0]["lr"] = rate
        assert run.everything == before, "taken back"
        assert session.latest.layers(CEILING) == ceilings
        run.step(6)
    assert [(one.step, one.action) for one in session.interventions] == [
        (0, "scale"),
        (1, "withhold"),
        (2, "reject"),
        (3, "scale"),
    ]


@pytest.mark.parametrize("entry", [1e6, 1e18])
def test_an_update_may_be_as_large_as_it_likes(entry: float) -> None:
    """As long as the squares of its entries are finite."""
    run = Run(lambda model: [torch.optim.SGD(model.parameters(), 1.0, weight_decay=0.25)])
    run.give(1, {"2.weight": 0.0})
    run.model.get_parameter("2.weight").grad.fill_(entry)  # type: ignore[union-attr]
    before = run.parameters["2.weight"]
    with run.attach(UpdateClamp(1.0, "fan")):
        run.update()
    assert top(net(before, run.parameters["2.weight"], 0.25)) <= fan(before) * (1 + TOLERANCE)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_grad_scaler_skips_stays_skipped_and_the_others_are_held(fused: bool) -> None:
    """Also where the matrix is so strong that its decay alone, which is not applied, would be over the limit."""

    def optimizers(model: nn.Module) -> list[Optimizer]:
        return [torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.5, fused=fused)]

    def strong() -> nn.Module:
        model = plain()
        model.get_parameter("2.weight").data.mul_(10.0)
        return model

    def step(one: Run, scaler: torch.amp.GradScaler, seed: int, overflow: bool) -> None:
        one.optimizers[0].zero_grad()
        x, y = batch(seed)
        scaler.scale(F.cross_entropy(one.model(x), y)).backward()
        if overflow:
            next(one.model.parameters()).grad.fill_(math.inf)  # type: ignore[union-attr]
        scaler.step(one.optimizers[0])
        scaler.update()

    limit, run = 0.5, Run(optimizers, strong)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with run.attach(UpdateClamp(limit, "fan")) as session:
        for seed, overflow in enumerate([True, False, True, False]):
            alone, before, rates = run.uncontrolled(), run.parameters, run.rates
            twin = torch.amp.GradScaler("cpu", init_scale=2.0**10)
            twin.load_state_dict(scaler.state_dict())
            told = len(session.interventions)
            step(alone, twin, seed, overflow)
            step(run, scaler, seed, overflow)
            assert frozen(scaler.state_dict()) == frozen(twin.state_dict())
            if overflow:
                assert frozen(run.parameters) == frozen(before)
                assert len(session.interventions) == told
            else:
                assert all(assert_all_held(before, alone.parameters, run.parameters, limit, "fan", rates))


@EITHER_WAY
def test_a_matrix_without_gradient_is_left_as_the_optimizer_left_it(relative_to: Any) -> None:
    """It was not decayed either; so nothing of it is over, however strong it is."""
    run = Run(lambda model: [torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.5)])
    run.model.get_parameter("2.weight").data.mul_(10.0)
    with run.attach(UpdateClamp(0.004, relative_to)) as session:
        for seed in range(3):
            run.backward(seed)
            run.model.get_parameter("2.weight").grad = None
            before = run.parameters["2.weight"]
            run.update()
            assert frozen(run.parameters["2.weight"]) == frozen(before)
    assert [one.saw["matrices"] for one in session.interventions] == [2, 2, 2]


def test_matrices_that_are_frozen_or_of_no_optimizer_are_left_out() -> None:
    def optimizers(model: nn.Module) -> list[Optimizer]:
        return [torch.optim.AdamW([p for name, p in model.named_parameters() if not name.startswith("4")], 1e-2)]

    run = Run(optimizers)
    run.model.get_parameter("2.weight").requires_grad_(False)
    before = run.parameters
    with run.attach(UpdateClamp(0.1, "fan")) as session:
        run.step(1)
        assert set(session.latest.layers(CEILING)) == {"0.weight"}
        run.model.get_parameter("2.weight").requires_grad_(True)
        run.step(2)
        assert set(session.latest.layers(CEILING)) == {"0.weight", "2.weight"}
    assert frozen(run.parameters["4.weight"]) == frozen(before["4.weight"])
    assert [one.saw["matrices"] for one in session.interventions] == [1, 2]


def test_accumulated_gradients_make_one_step() -> None:
    alone, run = prepared(adamw), prepared(adamw)

    def step(one: Run) -> None:
        one.optimizers[0].zero_grad()
        for seed in (3, 4, 5):
            x, y = batch(seed)
            (F.cross_entropy(one.model(x), y) / 3).backward()
        one.update()

    before, rates = run.parameters, run.rates
    step(alone)
    with run.attach(UpdateClamp(0.5, "fan")) as session:
        step(run)
    assert assert_all_held(before, alone.parameters, run.parameters, 0.5, "fan", rates) == [True] * 3
    assert len(session.interventions) == 1


@pytest.mark.parametrize("skipped", [0, 1])
def test_of_a_joint_step_that_one_optimizer_skips_the_other_is_held(skipped: int) -> None:
    """As a scaler may have it, or a schedule of its own."""
    alone, run = prepared(muon_and_adamw), prepared(muon_and_adamw)
    before = run.parameters
    stays = ("0", "2") if skipped == 0 else ("4",)
    rates = {n: rate._replace(weight_decay=0.0) if n.startswith(stays) else rate for n, rate in run.rates.items()}
    for one in (alone, run):
        session = one.attach(UpdateClamp(0.1, "fan")) if one is run else None
        one.backward(3)
        one.optimizers[1 - skipped].step()
    assert session is not None
    assert frozen(run.parameters) == frozen(alone.parameters), "open: the other may yet come"
    run.model(batch(4)[0])
    over = assert_all_held(before, alone.parameters, run.parameters, 0.1, "fan", rates)
    assert over == ([False, False, True] if skipped == 0 else [True, True, False])
    assert set(session.latest.layers(CEILING)) == ({"4.weight"} if skipped == 0 else {"0.weight", "2.weight"})
    session.close()
    assert [one.saw["matrices"] for one in session.interventions] == [sum(over)]


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


# On an accelerator ------------------------------------------------------------------------------------------------


@pytest.fixture
def accelerated(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, tensors pass for those of an accelerator wherever Redline asks whether it would have to wait.

    Spectra are then taken as there: for a fixed number of iterations, nobody looking.
    """
    askers = {"is_on_host", "by_parameter", "inspect", "_kept"}
    real = torch._C.TensorBase.device.__get__

    def device(tensor: Tensor) -> Any:
        asking = sys._getframe(1)
        if asking.f_code.co_name in askers and asking.f_globals["__name__"].startswith("redline."):
            return SimpleNamespace(type="accelerator")
        return real(tensor)

    def begin() -> None:
        monkeypatch.setattr(torch.Tensor, "device", property(device), raising=False)
        unwatched = partial(top_singular_values, watched=False)
        monkeypatch.setattr("redline.spectrum_tracker.top_singular_values", unwatched)

    return begin


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


# What it is for ---------------------------------------------------------------------------------------------------


def language_steps(
    optimizers: Optimizers,
    rates: Sequence[float],
    *controllers: redline.Controller,
) -> tuple[list[float], Run, redline.Session]:
    """Losses of the small language model over its bytes, at so many times the rate."""
    run = Run(optimizers, lambda: ByteLM(width=32, layers=1, context=16))
    text, windows = library_bytes(400_000), torch.Generator().manual_seed(0)
    group, losses = run.optimizers[0].param_groups[0], []
    rate = group["lr"]
    with run.attach(*controllers) as session:
        for factor in rates:
            group["lr"] = factor * rate
            x, y = byte_batch(text, 16, 16, windows)
            loss = F.cross_entropy(run.model(x).flatten(0, 1), y.flatten())
            loss.backward()
            run.update()
            run.model.zero_grad()
            losses.append(loss.item())
    return losses, run, session


def test_a_healthy_run_with_a_warm_up_is_left_alone_by_the_defaults() -> None:
    def optimizers(model: nn.Module) -> list[Optimizer]:
        return [torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.1)]

    warm_up = [min(1.0, (step + 1) / 20) for step in range(80)]
    losses, alone, _ = language_steps(optimizers, warm_up)
    clamped, run, session = language_steps(optimizers, warm_up, UpdateClamp())
    assert (UpdateClamp().limit, UpdateClamp().relative_to) == (1.0, "weight")
    assert run.everything == alone.everything
    assert clamped == losses
    assert session.interventions == ()
    assert losses[-1] < 3.3 < losses[0], "it is a run that learns"


@pytest.mark.parametrize(
    ("optimizers", "better", "ends_below"),
    [
        (lambda model: [torch.optim.SGD(model.parameters(), 0.1)], 10, 60.0),
        (lambda model: [torch.optim.AdamW(model.parameters(), 5e-3, weight_decay=0.05)], 100, 4.0),
    ],
    ids=["sgd", "adamw"],
)
def test_one_step_at_ten_thousand_times_the_rate_costs_far_less_with_it(
    optimizers: Optimizers, better: float, ends_below: float
) -> None:
    """It is no StepClamp: gains and biases take the spike whole, and a matrix moves by as much as it is strong.

    Measured 100 steps on, over six seeds: AdamW stands at 3.1 to 3.3 nats with it, at 1,030 to 3,010 without, and at
    2.2 without the spike. SGD, whose gradients have grown with the weights, is at 7 to 31, 660 to NaN, and 2.8: far
    better than without, and lost all the same, since chance is 5.5.
    """
    spiked = [1.0] * 100 + [1e4] + [1.0] * 99
    held, _, session = language_steps(optimizers, spiked, UpdateClamp())
    bare, *_ = language_steps(optimizers, spiked)
    assert held[:101] == bare[:101]
    assert session.interventions[0].step == 100, "nothing before it"
    end, without = (statistics.fmean(losses[-10:]) for losses in (held, bare))
    assert end < ends_below
    assert not without < better * end


# Refusals ---------------------------------------------------------------------------------------------------------


@EITHER_WAY
@pytest.mark.parametrize("limit", [0, 0.0, -1.0, math.nan, math.inf, -math.inf])
def test_a_limit_that_is_not_positive_is_refused(limit: float, relative_to: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"got limit={limit}; expected a positive number"):
        UpdateClamp(limit, relative_to)


@pytest.mark.parametrize("relative_to", ["", "Fan", "muon", None, 1, ["fan"]])
def test_another_measure_is_refused(relative_to: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"got relative_to=.*; expected 'fan' or 'weight'") as refused:
        UpdateClamp(1.0, relative_to)
    assert repr(relative_to) in str(refused.value)
