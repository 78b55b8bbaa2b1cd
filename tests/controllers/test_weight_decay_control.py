"""WeightDecayControl: each matrix is held where it is to be, by a decay of its own.

Singular values are held against full SVDs; what is committed, against an identical run that nobody controls; the decays
against the equation in the class's docstring, in float64.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import ControlledRun, HostReads, frozen
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

import redline
from redline import ConfigurationError, UpdateClamp, WeightDecayControl, WeightSpectrum
from redline.numerics import top_singular_values

IN_FORCE = "redline_weight_decay_in_force"
SIGMA = "redline_weight_spectral_norm"
FEATURES, CLASSES, BATCH = 6, 3, 16
BODY, HEAD = "body.weight", "head.weight"


# Runs to rest -----------------------------------------------------------------------------------------------------


class Invariant(nn.Module):
    """Indifferent to the scale of its matrices: each is followed by an RMS norm. The readout does not train."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(2))
        self.register_buffer("readout", 3 * torch.randn(10, width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.rms_norm(layer(x), (x.shape[-1],))
        return x @ self.readout.T


LAYERS = ["layers.0.weight", "layers.1.weight"]


def true_sigma(tensor: Tensor) -> float:
    return float(torch.linalg.matrix_norm(tensor.detach().double(), 2))


def trained(
    width: int,
    lr: float,
    weight_decay: float,
    steps: int,
    *controllers: redline.Controller,
    monitors: Sequence[redline.Monitor] = (),
    schedule: Callable[[Optimizer], LRScheduler] | None = None,
) -> tuple[np.ndarray, redline.Session]:
    """``sigma_1`` of both layers at every tenth step, ``(steps / 10, 2)``, and the session, closed."""
    torch.manual_seed(0)
    model = Invariant(width)
    optimizer = torch.optim.AdamW(model.parameters(), lr, (0.9, 0.95), weight_decay=weight_decay, fused=True)
    scheduler = schedule(optimizer) if schedule else None
    generator = torch.Generator().manual_seed(1)
    found = []
    with redline.attach(model, optimizer, monitors=monitors, controllers=controllers) as session:
        for index in range(steps):
            x = torch.randn(32, width, generator=generator)
            y = torch.randint(0, 10, (32,), generator=generator)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            if scheduler is not None:
                scheduler.step()
            if index % 10 == 9:
                found.append([true_sigma(layer.weight) for layer in model.layers])
    return np.array(found), session


def end(sigmas: np.ndarray, share: float = 1 / 3) -> np.ndarray:
    """The mean over the last part of a run, a number a layer."""
    return sigmas[-int(share * len(sigmas)) :].mean(0)


def test_without_control_sigma_1_at_rest_goes_with_the_root_of_lr_over_wd() -> None:
    """The law of arXiv 2510.15262 that the control builds on."""
    points = [(0.005, 0.5), (0.01, 0.3), (0.02, 0.2), (0.03, 0.1), (0.05, 0.05), (0.1, 0.04)]
    ratios = np.array([lr / wd for lr, wd in points])
    assert ratios.max() / ratios.min() >= 30
    at_rest = []
    for lr, wd in points:
        sigmas, _ = trained(16, lr, wd, int(5 / (lr * wd)))
        quarter = len(sigmas) // 4
        third, last = sigmas[2 * quarter : 3 * quarter].mean(), sigmas[3 * quarter :].mean()
        assert third == pytest.approx(last, rel=0.07), "it is at rest"
        at_rest.append(end(sigmas, 1 / 2))
    for layer in range(2):
        exponent, _ = np.polyfit(np.log(ratios), np.log(np.array(at_rest)[:, layer]), 1)
        assert exponent == pytest.approx(0.5, abs=0.05)


def test_it_brings_three_widths_to_the_same_strength() -> None:
    target, widths = 4.0, (32, 64, 128)
    held, free, decays = [], [], []
    for width in widths:
        sigmas, session = trained(width, 0.01, 0.5, 1500, WeightDecayControl(dict.fromkeys(LAYERS, target)))
        held.append(end(sigmas))
        decays.append(list(session.latest.layers(IN_FORCE).values()))
        free.append(end(trained(width, 0.01, 0.5, 900)[0]))
    assert (np.max(held, 0) / np.min(held, 0) < 1.05).all()
    np.testing.assert_allclose(held, target, rtol=0.05)
    assert (np.max(free, 0) / np.min(free, 0) > 2).all(), "by themselves they part"
    assert (np.diff(decays, axis=0) > 0).all(), "the wider, the more decay that takes"


def test_it_holds_what_a_reference_run_came_to() -> None:
    sigmas, reference = trained(16, 0.02, 0.2, 1000, monitors=[WeightSpectrum(1)])
    target = reference.latest.layers(SIGMA)
    assert list(target) == LAYERS
    assert list(target.values()) == pytest.approx(list(sigmas[-1]), rel=1e-3)
    found, _ = trained(24, 0.01, 0.05, 1200, WeightDecayControl(target))
    np.testing.assert_allclose(end(found), list(target.values()), rtol=0.03)
    free, _ = trained(24, 0.01, 0.05, 1200)
    assert (np.abs(end(free) / list(target.values()) - 1) > 0.2).all()


def test_it_holds_a_matrix_where_it_stood_when_it_was_frozen() -> None:
    sigmas, _ = trained(16, 0.01, 0.05, 1000, WeightDecayControl(freeze_at=200))
    free, _ = trained(16, 0.01, 0.05, 1000)
    frozen_at = free[19]
    np.testing.assert_array_equal(sigmas[:20], free[:20])
    np.testing.assert_allclose(end(sigmas), frozen_at, rtol=0.03)
    assert (end(free) > 1.2 * frozen_at).all()


def test_it_holds_them_under_a_cosine_schedule_with_a_warm_up_from_zero() -> None:
    """From when they got there to where the rate is 0 again."""

    def schedule(optimizer: Optimizer) -> LRScheduler:
        return LambdaLR(optimizer, lambda k: min(k / 50, 0.5 * (1 + math.cos(math.pi * k / 1500))))

    control = WeightDecayControl(dict.fromkeys(LAYERS, 2.0))
    sigmas, session = trained(48, 0.005, 0.1, 1500, control, schedule=schedule)
    np.testing.assert_allclose(sigmas[60:], 2.0, rtol=0.07)
    np.testing.assert_allclose(end(sigmas), 2.0, rtol=0.03)
    assert all(math.isfinite(value) for one in session.interventions for value in one.saw.values())
    free, _ = trained(48, 0.005, 0.1, 1500, schedule=schedule)
    assert (np.abs(end(free) / 2 - 1) > 0.2).all()


def test_a_decay_at_a_bound_stays_there_and_is_read() -> None:
    for bounds, target, at in (((0.0, 0.6), 1.0, 0.6), ((0.3, 5.0), 9.0, 0.3)):
        control = WeightDecayControl(dict.fromkeys(LAYERS, target), bounds=bounds)
        sigmas, session = trained(16, 0.02, 0.5, 500, control)
        assert session.latest.layers(IN_FORCE) == pytest.approx(dict.fromkeys(LAYERS, at))
        assert [one.saw["weight_decay"] for one in session.interventions[3:]] == [pytest.approx(at)] * 22
        free, _ = trained(16, 0.02, at, 500)
        np.testing.assert_allclose(end(sigmas), end(free), rtol=0.1, err_msg="as with that decay in the groups")


# Short runs -------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Two matrices, and vectors that nobody holds."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


class Stack(nn.Module):
    """A convolution, and a stack of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3)
        self.experts = nn.Parameter(torch.randn(3, 4, 4))
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x.reshape(-1, 2, 3)).flatten(1)
        return self.head(torch.tanh(torch.einsum("eij,bj->bi", self.experts, x)))


class Lion(Optimizer):
    """Chen et al. (arXiv 2302.06675), by hand: sign updates with decoupled decay."""

    def __init__(self, parameters: Iterable[Tensor], lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            fast, slow = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(group["lr"] * torch.sign(momentum.lerp(parameter.grad, 1 - fast)))
                momentum.lerp_(parameter.grad, 1 - slow)


def adamw(model: nn.Module, **settings: Any) -> list[Optimizer]:
    return [torch.optim.AdamW(model.parameters(), **{"lr": 2e-2, "weight_decay": 0.3, **settings})]


def adamw_fused(model: nn.Module) -> list[Optimizer]:
    return adamw(model, fused=True)


def adamw_foreach(model: nn.Module) -> list[Optimizer]:
    return adamw(model, foreach=True)


def adamw_with_a_rate_in_a_tensor(model: nn.Module) -> list[Optimizer]:
    return adamw(model, lr=torch.tensor(2e-2), foreach=False)


def adamw_in_groups(model: nn.Module) -> list[Optimizer]:
    """Whose rates and decays differ."""
    parameters = list(model.parameters())
    groups = [
        {"params": parameters[:2], "lr": 1e-2, "weight_decay": 0.7},
        {"params": parameters[2:], "lr": 4e-2, "weight_decay": 0.2},
    ]
    return [torch.optim.AdamW(groups)]


def sgd(model: nn.Module) -> list[Optimizer]:
    """Without momentum, so that its decay is decoupled."""
    return [torch.optim.SGD(model.parameters(), 0.2, weight_decay=0.1)]


def lion(model: nn.Module) -> list[Optimizer]:
    return [Lion(model.parameters(), 1e-2, 0.5)]


def muon_and_adamw(model: nn.Module) -> list[Optimizer]:
    body, *rest = model.parameters()
    return [torch.optim.Muon([body], 0.05, weight_decay=0.2), torch.optim.AdamW(rest, 2e-2, weight_decay=0.3)]


EVERY_OPTIMIZER = pytest.mark.parametrize(
    "optimizers",
    [
        adamw,
        adamw_fused,
        adamw_foreach,
        adamw_with_a_rate_in_a_tensor,
        adamw_in_groups,
        sgd,
        lion,
        muon_and_adamw,
    ],
    ids=lambda make: make.__name__,
)


class Run(ControlledRun):
    """A model with its optimizers; two made alike are alike."""

    def __init__(
        self,
        optimizers: Callable[[nn.Module], list[Optimizer]] = adamw,
        model: Callable[[], nn.Module] = Net,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        torch.manual_seed(0)
        self.model = model().to(dtype)
        self.dtype = dtype
        self.optimizers = optimizers(self.model)
        self.session: redline.Session | None = None

    def backward(self, seed: int) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        x = torch.randn(BATCH, FEATURES, generator=torch.Generator().manual_seed(seed)).to(self.dtype)
        F.cross_entropy(self.model(x).float(), x[:, :CLASSES].argmax(1)).backward()  # can be learned

    def step(self, seed: int) -> None:
        self.backward(seed)
        for optimizer in self.optimizers:
            optimizer.step()

    def steps(self, first: int, last: int) -> None:
        for seed in range(first, last):
            self.step(seed)

    def group_of(self, name: str) -> dict[str, Any]:
        parameter = self.model.get_parameter(name)
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        return next(group for group in groups if any(one is parameter for one in group["params"]))

    def in_force(self) -> dict[str, float]:
        assert self.session is not None
        return self.session.latest.layers(IN_FORCE)


def assert_decayed_by(
    actual: Tensor, before: Tensor, proposed: Tensor, lr: float, group_decay: float, decay: float
) -> None:
    """``W + q - lr wd W`` with ``q`` the update net of the group's decay; in float64, to the rounding of the dtype."""
    w, p = before.double(), proposed.double() - before.double()
    expected = w + (p + lr * group_decay * w) - lr * decay * w
    bound = 2 * torch.finfo(actual.dtype).eps * (w.abs() + p.abs() + lr * (decay + group_decay) * w.abs())
    assert bool(((actual.double() - expected).abs() <= bound).all())


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


# The feedback -----------------------------------------------------------------------------------------------------


class Feedback:
    """The equation of the docstring for one matrix, in float64 and with true singular values."""

    def __init__(
        self, target: float, group_decay: float, every: int, horizon: int, bounds: tuple[float, float] = (0.0, 10.0)
    ) -> None:
        self.target, self.decay, self.every, self.horizon, self.bounds = target, group_decay, every, horizon, bounds
        self.at: int | None = None
        self.x: float | None = None
        self.rates: list[float] = []
        self.shrunk = 0.0

    def decide(self, index: int, weight: Tensor, lr: float, *, moves: bool = True) -> float:
        """The decay in force at a step; ``lr``: that the matrix is moved with, if it is moved."""
        if self.at is None or index >= self.at + self.every:
            self.at = index
            if moves:
                self.measure(true_sigma(weight) ** 2, lr)
        in_force = min(self.decay, 1 / (self.every * lr)) if lr else self.decay
        if moves:
            self.rates.append(lr)
            self.shrunk += lr * in_force
        return in_force

    def measure(self, x: float, lr: float) -> None:
        rate = float(np.mean(self.rates)) if self.rates else lr
        if self.x is None:
            self.growth = 2 * lr * self.decay * x
        else:
            self.growth *= min((rate / self.rate) ** 2, 1.0) if self.rate else 1.0
            kept = math.exp(-2 * self.shrunk)
            mean = (1 - kept) / (2 * self.shrunk) if self.shrunk else 1.0  # of exp(-2 s) over the interval
            self.growth = (self.growth + max((x - self.x * kept) / (len(self.rates) * mean), 0.0)) / 2
        wanted = self.growth + (x - self.target**2) / self.horizon
        self.decay = float(np.clip(wanted / (2 * rate * x) if rate and x else self.decay, *self.bounds))
        self.x, self.rate, self.rates, self.shrunk = x, rate, [], 0.0


def cosine(optimizer: Optimizer) -> LRScheduler:
    return CosineAnnealingLR(optimizer, 40)


def from_zero(optimizer: Optimizer) -> LRScheduler:
    """0 at the start, and 0 again in the midst."""
    return LambdaLR(optimizer, lambda step: [0.0, 0.0, 0.0, 0.0, 0.2, 0.6, 1.0, 1.5, 0.0, 0.3][step % 10])


@EVERY_OPTIMIZER
@pytest.mark.parametrize("schedule", [None, cosine, from_zero], ids=["constant", "cosine", "from zero"])
def test_the_decays_are_those_of_the_equation(
    optimizers: Callable[[nn.Module], list[Optimizer]], schedule: Callable[[Optimizer], LRScheduler] | None
) -> None:
    run, every, horizon, bounds = Run(optimizers), 3, 30, (0.02, 4.0)
    target = {BODY: 1.05, HEAD: 0.95}
    feedback = {
        name: Feedback(sigma, run.group_of(name)["weight_decay"], every, horizon, bounds)
        for name, sigma in target.items()
    }
    schedulers = [schedule(optimizer) for optimizer in run.optimizers] if schedule else []
    seen = set()
    with run.attach(WeightDecayControl(target, every=every, horizon=horizon, bounds=bounds)) as session:
        for index in range(32):
            before = run.parameters
            run.step(index)
            expected = {
                name: one.decide(index, before[name], float(run.group_of(name)["lr"])) for name, one in feedback.items()
            }
            assert run.in_force() == pytest.approx(expected, rel=2e-3, abs=2e-3)
            seen |= {round(value, 3) for value in expected.values()}
            for scheduler in schedulers:
                scheduler.step()
    assert len(seen) > 3
    assert [one.step for one in session.interventions] == list(range(0, 32, every))


def test_the_first_decision_takes_the_groups_decay_for_that_of_rest() -> None:
    """So that a matrix at its target keeps it, and another's is off by what is to shrink in the horizon."""
    run = Run()
    sigma = {name: true_sigma(run.parameters[name]) for name in (BODY, HEAD)}
    with run.attach(WeightDecayControl({BODY: sigma[BODY], HEAD: sigma[HEAD] / 2}, horizon=200)):
        run.step(0)
        decays = run.in_force()
    assert decays[BODY] == pytest.approx(0.3, rel=1e-4)
    assert decays[HEAD] == pytest.approx(0.3 + 0.75 / 200 / (2 * 2e-2), rel=1e-4)


@pytest.mark.parametrize("horizon", [50, 200])
def test_a_difference_from_the_target_shrinks_by_e_in_the_horizon(horizon: int) -> None:
    """Where nothing but the decay moves a matrix: its gradients are 0."""
    torch.manual_seed(0)
    model = nn.Linear(8, 8, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    x0 = true_sigma(model.weight) ** 2
    target = 0.6 * x0
    control = WeightDecayControl({"weight": target**0.5}, every=5, horizon=horizon)
    with redline.attach(model, optimizer, monitors=[], controllers=[control]):
        for index in range(1, 2 * horizon + 1):
            (0 * model(torch.ones(1, 8)).sum()).backward()
            optimizer.step()
            if index % horizon == 0:
                left = (true_sigma(model.weight) ** 2 - target) / (x0 - target)
                assert left == pytest.approx(math.exp(-index / horizon), rel=0.1)


def test_a_matrix_below_its_target_is_not_decayed_and_where_nothing_grows_nothing_is_made_to() -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 8, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, weight_decay=0.5)
    before = model.weight.detach().clone()
    with redline.attach(model, optimizer, monitors=[], controllers=[WeightDecayControl({"weight": 99.0})]) as session:
        for _ in range(30):
            (0 * model(torch.ones(1, 8)).sum()).backward()
            optimizer.step()
        assert session.latest.layers(IN_FORCE) == {"weight": 0.0}
    torch.testing.assert_close(model.weight.detach(), before, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bounds", [(0.05, 0.2), (0.5, 0.9)], ids=["below the group's", "above the group's"])
@pytest.mark.parametrize("first_rate", [0.02, 0.0])
def test_the_decay_is_within_its_bounds_at_every_step(bounds: tuple[float, float], first_rate: float) -> None:
    """The first as well, and where there is no rate to go by."""
    run = Run(partial(adamw, lr=first_rate))
    read = []
    with run.attach(WeightDecayControl({BODY: 0.1, HEAD: 9.0}, every=2, horizon=2, bounds=bounds)):
        for seed in range(8):
            run.step(seed)
            read.append(list(run.in_force().values()))
            for group in run.optimizers[0].param_groups:
                group["lr"] = 0.02
    assert bounds[0] * (1 - 1e-6) <= np.min(read) <= np.max(read) <= bounds[1] * (1 + 1e-6)
    assert np.min(read) == pytest.approx(bounds[0])
    assert np.max(read) == pytest.approx(bounds[1])


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
