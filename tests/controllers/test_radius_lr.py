"""RadiusLR: each step is as long as asked, in radii, whatever the optimizers proposed.

``r`` of what was committed is held against a Jacobian in float64; its direction, against an identical run that nobody
controls.
"""

from __future__ import annotations

import copy
import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import ControlledRun, HostReads, frozen
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.optim import Optimizer

import redline
from redline import ConfigurationError, GhostRadius, NonFiniteGuard, RadiusLR, RedlineWarning, RunStoppedError

FEATURES, CLASSES, BATCH = 6, 3, 16
R, COMMITTED, SCALE = "redline_normalized_step_size", "redline_committed_step_size", "redline_step_scale"


# Runs -------------------------------------------------------------------------------------------------------------


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, CLASSES))


def normalizing() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, CLASSES))


EVERY_MODEL = pytest.mark.parametrize("model", [plain, dropping, normalizing], ids=lambda make: make.__name__)


def unlimited(r: float = 1.0, **arguments: Any) -> RadiusLR:
    """As in the paper: without the two limits that go with it."""
    return RadiusLR(r, **{"max_update_to_weight": None, "max_growth": None, **arguments})


def bare_sgd(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.SGD(model.parameters(), 0.1)]


def sgd(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-2)]


def adamw(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.AdamW(model.parameters(), 1e-2)]


def adamw_fused(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.AdamW(model.parameters(), 1e-2, fused=True)]


def muon_and_adamw(model: nn.Module) -> list[Optimizer]:
    parameters = list(model.parameters())
    return [
        torch.optim.Muon([parameter for parameter in parameters if parameter.dim() == 2], 0.02),
        torch.optim.AdamW([parameter for parameter in parameters if parameter.dim() != 2], 1e-2),
    ]


EVERY_OPTIMIZER = pytest.mark.parametrize(
    "optimizers", [bare_sgd, sgd, adamw, adamw_fused, muon_and_adamw], ids=lambda make: make.__name__
)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(BATCH, FEATURES, generator=torch.Generator().manual_seed(seed))
    return x, x[:, :CLASSES].argmax(1)


class Run(ControlledRun):
    """A model with its optimizers; two made alike are alike."""

    def __init__(
        self, optimizers: Callable[[nn.Module], list[Optimizer]] = sgd, model: Callable[[], nn.Module] = plain
    ) -> None:
        torch.manual_seed(0)
        self.model = model()
        self.optimizers = optimizers(self.model)
        self.session: redline.Session | None = None

    def times_rate(self, factor: float) -> Run:
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] *= factor
        return self

    def backward(self, seed: int) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        x, y = batch(seed)
        loss = F.cross_entropy(self.model(x), y)
        if self.session is not None:
            self.session.observe(loss=loss)
        loss.backward()

    def update(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def step(self, seed: int) -> None:
        self.backward(seed)
        self.update()

    def steps_of(self, seeds: Iterable[int]) -> None:
        for seed in seeds:
            self.step(seed)


def prepared(optimizers: Callable[[nn.Module], list[Optimizer]] = sgd, model: Callable[[], nn.Module] = plain) -> Run:
    """Two steps in, so that moments are there."""
    run = Run(optimizers, model)
    run.steps_of([1, 2])
    return run


def spreads(model: nn.Module, before: dict[str, Tensor], after: dict[str, Tensor], x: Tensor) -> np.ndarray:
    """Of each sample's logit tangent along the update, by the whole Jacobian in float64; dropout off."""
    model = copy.deepcopy(model).double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    point = {name: tensor.double() for name, tensor in before.items()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def logits(parameters: dict[str, Tensor]) -> Tensor:
        state = {**parameters, **{name: buffer.clone() for name, buffer in buffers.items()}}
        return functional_call(model, state, (x.double(),))

    jacobian = jacrev(logits)(point)
    tangent = sum((jacobian[name].flatten(2) @ (after[name].double() - point[name]).flatten()) for name in point)
    return (tangent.amax(-1) - tangent.amin(-1)).numpy()


def reference(model: nn.Module, before: dict[str, Tensor], after: dict[str, Tensor], x: Tensor) -> float:
    return float(spreads(model, before, after, x).max() / math.pi)


def assert_scaled(
    actual: dict[str, Tensor], before: dict[str, Tensor], after: dict[str, Tensor], factor: float
) -> None:
    """``theta_before + factor * p`` to the rounding of float32; computed in float64."""
    for name in before:
        update = after[name].double() - before[name].double()
        expected = before[name].double() + factor * update
        bound = 2 * torch.finfo(torch.float32).eps * (expected.abs() + factor * update.abs())
        assert bool(((actual[name].double() - expected).abs() <= bound).all()), name


# The length -------------------------------------------------------------------------------------------------------


@EVERY_OPTIMIZER
@EVERY_MODEL
@pytest.mark.parametrize("rate", [1e-2, 1.0, 1e3], ids=["far shorter", "as it was", "far longer"])
@pytest.mark.parametrize("r", [0.3, 1.0])
def test_the_committed_step_is_of_the_length_asked_for(
    optimizers: Callable[[nn.Module], list[Optimizer]], model: Callable[[], nn.Module], rate: float, r: float
) -> None:
    alone, run = (prepared(optimizers, model).times_rate(rate) for _ in range(2))
    before = run.parameters
    torch.manual_seed(5)
    alone.step(3)
    torch.manual_seed(5)
    with run.attach(unlimited(r, max_samples=None), monitors=[GhostRadius(1, max_samples=None)]) as session:
        run.step(3)
        latest = session.latest
    x = batch(3)[0]
    proposed = reference(alone.model, before, alone.parameters, x)
    assert reference(run.model, before, run.parameters, x) == pytest.approx(r, rel=1e-3)
    assert proposed / r > 10 or rate <= 1
    assert proposed / r < 0.1 or rate >= 1
    (one,) = session.interventions
    assert (one.step, one.controller, one.action) == (0, "RadiusLR", "scale")
    assert one.saw["r"] == pytest.approx(proposed, rel=1e-4)
    assert one.saw["scale"] == pytest.approx(r / proposed, rel=1e-4)
    assert one.saw["brought"] == pytest.approx(r, rel=1e-5)
    norm = math.sqrt(sum(float((alone.parameters[n].double() - before[n].double()).square().sum()) for n in before))
    assert one.saw["update_norm"] == pytest.approx(norm, rel=1e-4)
    assert one.reason == (
        f"r = {one.saw['r']:.3g} was brought to {r:.3g}: the step was scaled by {one.saw['scale']:.3g}."
    )
    assert_scaled(run.parameters, before, alone.parameters, one.saw["scale"])
    assert frozen([o.state_dict() for o in run.optimizers]) == frozen([o.state_dict() for o in alone.optimizers])
    assert frozen(dict(run.model.named_buffers())) == frozen(dict(alone.model.named_buffers()))
    assert latest.value(R) == pytest.approx(proposed, rel=1e-4), "r is of the step as proposed"
    assert latest.value(COMMITTED) == pytest.approx(r, rel=1e-5)
    assert latest.value(SCALE) == one.saw["scale"]


@EVERY_OPTIMIZER
def test_every_step_of_a_run_is_of_that_length(optimizers: Callable[[nn.Module], list[Optimizer]]) -> None:
    """Under a schedule of rates that it does not care about."""
    run, r, longer = prepared(optimizers), 0.5, []
    with run.attach(unlimited(r)) as session:
        for seed in range(3, 13):
            run.times_rate(30 if seed % 2 else 1 / 30)
            before = run.parameters
            run.step(seed)
            assert reference(run.model, before, run.parameters, batch(seed)[0]) == pytest.approx(r, rel=1e-3)
            assert session.latest.value(COMMITTED) == pytest.approx(r, rel=1e-5)
            longer.append(session.latest.value(SCALE) > 1)
    assert 0 < sum(longer) < 10
    assert [one.step for one in session.interventions] == list(range(10)), "it tells of each"
    assert session.latest.value("redline_interventions_total", controller="RadiusLR", action="scale") == 10


@pytest.mark.parametrize("rate", [1e-3, 1e3])
@pytest.mark.parametrize("make", [unlimited, RadiusLR], ids=["without limits", "with them"])
def test_the_rate_in_the_groups_does_not_count(make: Callable[[float], RadiusLR], rate: float) -> None:
    """A factor of 1000 on it, under plain SGD: the same run to rounding."""
    run, other = Run(bare_sgd), Run(bare_sgd).times_rate(rate)
    with run.attach(make(0.5)) as first, other.attach(make(0.5)) as second:
        for seed in range(10):
            run.step(seed)
            other.step(seed)
            ratio = second.latest.value(SCALE) / first.latest.value(SCALE)
            assert ratio == pytest.approx(1 / rate, rel=1e-2)
    # p is a difference of parameters: of a step 1000 times shorter than the one committed, 3 digits fewer are left.
    size = max(float(parameter.abs().max()) for parameter in run.parameters.values())
    for name, parameter in run.parameters.items():
        torch.testing.assert_close(other.parameters[name], parameter, rtol=0, atol=max(1, 1 / rate) * 3e-6 * size)
    moved = max(
        float((p - q).abs().max()) for p, q in zip(run.model.parameters(), Run().model.parameters(), strict=True)
    )
    assert moved > 0.5


def test_the_share_of_one_group_against_another_stays() -> None:
    def optimizers(model: nn.Module) -> list[Optimizer]:
        first, *others = model.parameters()
        return [torch.optim.SGD([{"params": [first], "lr": 0.3}, {"params": others, "lr": 0.1}])]

    run = Run(optimizers)
    before = run.parameters
    with run.attach(unlimited()) as session:
        run.step(1)
    scale = session.latest.value(SCALE)
    for name, parameter in run.model.named_parameters():
        assert parameter.grad is not None
        lr = 0.3 if name == "0.weight" else 0.1
        torch.testing.assert_close(parameter.detach(), before[name] - scale * lr * parameter.grad)


def test_the_default_is_one_radius_by_the_maximum_of_32_samples() -> None:
    one = RadiusLR()
    assert (one.r, one.max_samples, one.max_update_to_weight, one.max_growth) == (1.0, 32, 0.3, 1.02)
    run = Run()
    before = run.parameters
    one = unlimited()
    with run.attach(one):
        run.step(1)
    assert reference(run.model, before, run.parameters, batch(1)[0]) == pytest.approx(1, rel=1e-3)


def test_a_step_that_is_of_that_length_already_is_left_as_it_is() -> None:
    probe = prepared()
    with probe.attach(unlimited()) as session:
        probe.step(3)
    alone, exact = prepared(), prepared()
    alone.step(3)
    with exact.attach(unlimited(session.interventions[0].saw["r"])) as session:
        exact.step(3)
    for name, parameter in exact.parameters.items():
        torch.testing.assert_close(parameter, alone.parameters[name], rtol=1e-6, atol=1e-7)
    assert session.latest.value(SCALE) == pytest.approx(1, abs=1e-6)


# The limits that go with it ---------------------------------------------------------------------------------------


def stack() -> nn.Module:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Parameter(torch.randn(3, FEATURES, FEATURES))
            self.head = nn.Linear(FEATURES, CLASSES)
            self.zero = nn.Linear(FEATURES, CLASSES, bias=False)
            nn.init.zeros_(self.zero.weight)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(torch.einsum("eij,bj->bi", self.experts, x))
            return self.head(x) + self.zero(x)

    return Stack()


def matrices(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {name: tensor.double() for name, tensor in tensors.items() if tensor.dim() == 2}
    for name, tensor in tensors.items():
        found.update({f"{name}[{e}]": one.double() for e, one in enumerate(tensor)} if tensor.dim() == 3 else {})
    return found


def sigma(tensor: Tensor) -> float:
    return float(torch.linalg.matrix_norm(tensor.double(), 2))


def decaying(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.5)]


@pytest.mark.parametrize("optimizers", [bare_sgd, decaying, muon_and_adamw], ids=lambda make: make.__name__)
@pytest.mark.parametrize("model", [plain, stack], ids=lambda make: make.__name__)
@pytest.mark.parametrize("most", [0.1, 0.3])
def test_no_matrix_is_pushed_harder_than_its_share_of_itself_and_the_rest_keeps_its_length(
    optimizers: Callable[[nn.Module], list[Optimizer]], model: Callable[[], nn.Module], most: float
) -> None:
    """Net of decoupled decay, which stays whole and goes by the rate that results."""
    if optimizers is muon_and_adamw and model is stack:
        pytest.skip("Muon takes matrices only")
    decay = {bare_sgd: 0.0, decaying: 1e-2 * 0.5, muon_and_adamw: 0.02 * 0.1}[optimizers]  # type: ignore[index]
    run, held, free = Run(optimizers, model), 0, 0
    with run.attach(RadiusLR(4.0, max_update_to_weight=most, max_growth=None)) as session:
        for seed in range(4):
            alone, before = run.uncontrolled(), run.parameters
            alone.step(seed)
            run.step(seed)
            proposed, after, scale = alone.parameters, run.parameters, session.latest.value(SCALE)
            told = {one.saw["matrices"]: one for one in session.interventions if "matrices" in one.saw}
            for name in before.keys() - {n.split("[")[0] for n in matrices(before)}:
                wanted = before[name] + scale * (proposed[name] - before[name])
                torch.testing.assert_close(after[name], wanted, rtol=1e-5, atol=1e-6)
            w, p, q = matrices(before), matrices(proposed), matrices(after)
            for name in w:
                net = scale * (p[name] - w[name] + decay * w[name])
                strength = sigma(w[name])
                over = strength > 0 and sigma(net) > most * strength
                factor = min(1.0, most * strength / sigma(net)) if strength > 0 else 1.0
                wanted = w[name] + factor * net - scale * decay * w[name]
                torch.testing.assert_close(q[name], wanted, rtol=0, atol=2e-3 * float((factor * net).abs().max()))
                if over:
                    assert sigma(q[name] - w[name] + scale * decay * w[name]) <= most * strength * (1 + 1e-5)
                held, free = held + over, free + (not over)
            assert told
    assert held > 5
    assert free > 0 or model is plain
    last = [one for one in session.interventions if one.step == 3]
    assert [one.action for one in last] == ["scale", "scale"], "the step, and single matrices"
    assert re.match(r"sigma_1 of the update was over the limit in \d matrices, most in ", last[1].reason)
    assert last[1].saw["limit"] / last[1].saw["sigma"] == pytest.approx(last[1].saw["scale"])
    assert "redline_committed_step_size" not in session.latest, "r of what is left is not known"


def test_matrices_under_the_limit_keep_the_step_that_they_would_have_without_it() -> None:
    runs = []
    for most in (None, 100.0):
        run = Run()
        with run.attach(RadiusLR(0.3, max_update_to_weight=most)) as session:
            run.steps_of(range(4))
        runs.append((run.everything, [one.reason for one in session.interventions]))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("growth", [1.02, 1.5])
def test_the_rate_that_results_grows_by_so_much_from_one_step_to_the_next_and_falls_at_once(growth: float) -> None:
    run, last, slow = prepared(adamw), math.inf, 0
    with run.attach(RadiusLR(0.5, max_update_to_weight=None, max_growth=growth)) as session:
        for seed in range(3, 23):
            if seed == 12:
                run.times_rate(100)
            if seed == 14:
                run.times_rate(1 / 100)
            alone, before = run.uncontrolled(), run.parameters
            alone.step(seed)
            run.step(seed)
            wanted = 0.5 / reference(alone.model, before, alone.parameters, batch(seed)[0])
            lr = run.optimizers[0].param_groups[0]["lr"]
            scale = min(wanted, growth * last / lr)
            assert session.latest.value(SCALE) == pytest.approx(scale, rel=1e-4)
            one = session.interventions[-1]
            assert one.saw["brought"] == pytest.approx(one.saw["r"] * scale, rel=1e-4)
            assert session.latest.value(COMMITTED) == pytest.approx(one.saw["brought"], rel=1e-5)
            assert f"was brought to {one.saw['brought']:.3g}: the step was scaled by {scale:.3g}." in one.reason
            slow += scale < wanted
            last = scale * lr
    assert 1 < slow < 18


def test_steps_that_were_not_measured_do_not_count_as_a_scale() -> None:
    run = Run()
    with run.attach(RadiusLR(0.5, max_growth=1.1)) as session:
        run.step(1)
        scale = session.latest.value(SCALE)
        rate = run.optimizers[0].param_groups[0]["lr"]
        run.optimizers[0].param_groups[0]["lr"] = 0.0
        run.step(2)
        assert session.latest.value(SCALE) == 1
        run.optimizers[0].param_groups[0]["lr"] = rate / 1000
        run.step(3)
        assert scale < session.latest.value(SCALE) <= 1.1 * 1000 * scale * (1 + 1e-5)


def test_one_step_far_too_long_does_not_stop_the_run_for_good() -> None:
    """The scale may fall at once; a fall by 1000 is made up for in ``log(1000) / log(1.02) = 349`` steps."""
    run, lengths = prepared(), []
    with run.attach(RadiusLR(0.5, max_update_to_weight=None)) as session:
        for seed in range(400):
            x, y = batch(seed)
            run.optimizers[0].zero_grad()
            (F.cross_entropy(run.model(x), y) * (1000 if seed == 20 else 1)).backward()
            run.update()
            lengths.append(session.latest.value(COMMITTED))
    assert np.median(lengths[10:20]) > 0.05
    assert np.median(lengths[50:60]) < 0.5 * np.median(lengths[10:20])
    assert np.median(lengths[-20:]) > 0.05


# Reductions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["max", 1.0, 1, 0.9, 0.5, 0.1])
@pytest.mark.parametrize("rate", [1e-2, 1e2])
def test_it_goes_by_the_quantile_asked_for(reduction: Any, rate: float) -> None:
    run = prepared().times_rate(rate)
    before = run.parameters
    with run.attach(unlimited(0.7, reduction=reduction)):
        run.step(3)
    each = np.sort(spreads(run.model, before, run.parameters, batch(3)[0])) / math.pi
    place = math.ceil((1 if reduction == "max" else reduction) * BATCH - 1e-9) - 1
    assert each[place] == pytest.approx(0.7, rel=1e-3)
    assert each[-1] > 0.71 or place == BATCH - 1


@pytest.mark.parametrize("samples", [1, 4, 5, 16, 100, None])
def test_it_goes_by_so_many_samples_spread_over_the_batch(samples: int | None) -> None:
    run = prepared()
    before = run.parameters
    with run.attach(unlimited(0.7, max_samples=samples)):
        run.step(3)
    each = spreads(run.model, before, run.parameters, batch(3)[0]) / math.pi
    used = min(samples or BATCH, BATCH)
    assert max(each[k * BATCH // used] for k in range(used)) == pytest.approx(0.7, rel=1e-3)
    assert each.max() > 0.75 or used > 5


def test_where_batch_statistics_couple_the_samples_it_goes_by_the_whole_batch() -> None:
    run = prepared(sgd, normalizing)
    before = run.parameters
    with run.attach(unlimited(0.7, max_samples=4)):
        run.step(3)
    assert reference(run.model, before, run.parameters, batch(3)[0]) == pytest.approx(0.7, rel=1e-3)


def test_positions_that_do_not_count_or_whose_logits_are_nan_are_left_out() -> None:
    def masked(output: Tensor) -> tuple[Tensor, Tensor]:
        return output, torch.arange(len(output)) % 2 > 0

    def broken(output: Tensor) -> Tensor:
        return output * torch.where(torch.arange(len(output)).unsqueeze(1) % 2 > 0, 1.0, math.nan)

    def both(output: Tensor) -> tuple[Tensor, Tensor]:
        place = torch.arange(len(output))
        return output * torch.where(place.unsqueeze(1) % 4 > 0, 1.0, math.nan), place % 4 != 2

    ends = []
    for logits in (masked, broken, both):
        run = prepared()
        before = run.parameters
        with run.attach(unlimited(0.7), logits=logits):
            run.step(3)
        each = spreads(run.model, before, run.parameters, batch(3)[0]) / math.pi
        assert each[1::2].max() == pytest.approx(0.7, rel=1e-3)
        ends.append(run.everything)
    assert ends[0] == ends[1] == ends[2]


# Steps that have no length to go by -------------------------------------------------------------------------------


@EVERY_OPTIMIZER
def test_a_step_that_moves_nothing_is_left_alone(optimizers: Callable[[nn.Module], list[Optimizer]]) -> None:
    """As at the start of a warm-up from 0; the next is of the length asked for."""
    alone, run = Run(optimizers).times_rate(0), Run(optimizers).times_rate(0)
    with run.attach(unlimited()) as session:
        for seed in (1, 2):
            alone.step(seed)
            run.step(seed)
            assert run.everything == alone.everything
            assert session.latest.value(COMMITTED) == 0
            assert session.latest.value(SCALE) == 1
        assert session.interventions == ()
        for optimizer in run.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 1e-3
        before = run.parameters
        run.step(3)
    assert reference(run.model, before, run.parameters, batch(3)[0]) == pytest.approx(1, rel=2e-3)


class Beside(nn.Module):
    """Has a parameter that the logits do not depend on, but the loss does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = plain()
        self.beside = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_a_step_that_moves_no_logit_is_left_alone() -> None:
    def step(run: Run) -> None:
        run.optimizers[0].zero_grad()
        (0 * run.model(batch(1)[0]).sum() + run.model.get_parameter("beside").square().sum()).backward()
        run.update()

    alone, run = Run(bare_sgd, Beside), Run(bare_sgd, Beside)
    step(alone)
    with run.attach(unlimited()) as session:
        step(run)
    assert run.everything == alone.everything
    assert session.interventions == ()


@pytest.mark.parametrize("rate", [1e-30, 1e-38, 1e-40])
def test_a_step_that_hardly_moves_a_logit_does_not_end_the_run(rate: float) -> None:
    """Its factor may be more than a float32 holds."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.SGD(model.parameters(), rate)
    with redline.attach(model, optimizer, monitors=[], controllers=[unlimited()]):
        F.cross_entropy(model(torch.randn(8, 4)), torch.arange(8) % 3).backward()
        optimizer.step()
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_of_a_step_that_is_infinitely_too_long_nothing_is_committed() -> None:
    """As under StepClamp: the update is finite, the logits' tangent along it is not."""
    run = Run(bare_sgd, lambda: nn.Linear(4, 3)).times_rate(1e-9)
    before = frozen(run.parameters)
    x = 1e25 * torch.ones(1, 4)
    with run.attach(unlimited()) as session:
        F.cross_entropy(run.model(x), run.model(x).argmin(-1)).backward()
        run.update()
        assert frozen(run.parameters) == before
        assert session.latest.value(COMMITTED) == 0


def test_a_step_of_which_no_position_says_anything_is_left_alone() -> None:
    alone, run = Run(), Run()
    with run.attach(unlimited(), logits=lambda output: output * math.nan) as session:
        for seed in (1, 2):
            alone.step(seed)
            run.step(seed)
    assert run.everything == alone.everything
    assert session.interventions == ()


@EVERY_OPTIMIZER
@pytest.mark.parametrize("rate", [math.nan, math.inf])
def test_an_update_that_is_not_finite_is_rejected(
    optimizers: Callable[[nn.Module], list[Optimizer]], rate: float
) -> None:
    run = prepared(optimizers)
    before = frozen(run.parameters)
    with run.attach(unlimited()) as session:
        run.times_rate(rate)
        with pytest.raises(RunStoppedError, match=r"RadiusLR rejected step 0: the update was not finite \(norm"):
            run.step(3)
    assert frozen(run.parameters) == before
    assert [one.action for one in session.interventions] == ["reject"]


def test_a_rejected_step_is_no_step_where_a_guard_restores_the_state() -> None:
    alone, run = prepared(adamw), prepared(adamw)
    with run.attach(unlimited(0.5), NonFiniteGuard(restore_state=True)) as session:
        before = run.everything
        run.times_rate(math.nan)
        run.step(3)
        for one in run.optimizers:
            one.param_groups[0]["lr"] = 1e-2
        assert run.everything == before
        run.step(4)
    with alone.attach(unlimited(0.5)):
        alone.step(4)
    assert run.everything == alone.everything
    assert [one.action for one in session.interventions] == ["reject", "scale"]


@pytest.mark.parametrize("others", [[], [NonFiniteGuard()]], ids=["alone", "with a guard"])
def test_a_model_never_called_in_training_mode_is_refused_at_the_first_step(others: list[Any]) -> None:
    alone, run = Run(), Run()
    alone.model.eval()
    run.model.eval()
    alone.step(1)
    with (
        run.attach(*others, unlimited()) as session,
        pytest.warns(RedlineWarning, match="was not called in training mode"),
        pytest.raises(
            ConfigurationError,
            match=r"got no logits to measure the first step by .*Pass module= and logits= to attach, or leave RadiusLR "
            r"out if the loss is no cross-entropy\.",
        ),
    ):
        run.step(1)
    assert run.everything == alone.everything, "the step is the optimizer's own"
    assert session.interventions == ()


def test_a_step_without_a_forward_is_left_alone_once_one_was_measured() -> None:
    run = Run()
    with run.attach(unlimited()) as session:
        run.step(1)
        alone = run.uncontrolled()
        for seed in (2, 3):
            for one in (alone, run):
                for k, parameter in enumerate(one.model.parameters()):
                    generator = torch.Generator().manual_seed(10 * seed + k)
                    parameter.grad = torch.randn(parameter.shape, generator=generator)
            alone.update()
            if seed == 2:
                with pytest.warns(RedlineWarning, match="was not called in training mode"):
                    run.update()
            else:
                run.update()  # said once; again would be an error here
        assert run.everything == alone.everything
        assert session.latest.measured_at[redline.Series(COMMITTED)] == 0
        assert session.latest.value(SCALE) == 1
    assert len(session.interventions) == 1


@pytest.mark.parametrize("resumed", [False, True])
def test_only_the_first_step_of_a_run_may_be_refused(resumed: bool) -> None:
    """Not that of a run which goes on, but that of the next run under the same controller."""
    control, run = unlimited(), Run()
    with run.attach(control) as session:
        run.step(1)
        state = session.state_dict()
    run.model.eval()
    with run.attach(control) as session:
        if resumed:
            session.load_state_dict(state)
            with pytest.warns(RedlineWarning, match="was not called in training mode"):
                run.step(2)
        else:
            with (
                pytest.warns(RedlineWarning, match="was not called in training mode"),
                pytest.raises(ConfigurationError, match="got no logits to measure the first step by"),
            ):
                run.step(2)


def test_a_loss_that_is_no_cross_entropy_is_refused_when_it_is_observed() -> None:
    run = Run()
    untouched = run.everything
    x, y = batch(1)
    with run.attach(unlimited()) as session:
        loss = F.mse_loss(run.model(x), F.one_hot(y, CLASSES).float())
        with pytest.raises(ConfigurationError, match=r"got a loss made by MseLoss; expected a cross-entropy"):
            session.observe(loss=loss)
    assert run.everything == untouched


# State ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizers", [bare_sgd, adamw_fused, muon_and_adamw], ids=lambda make: make.__name__)
@EVERY_MODEL
def test_a_run_may_be_cut_after_every_step(
    optimizers: Callable[[nn.Module], list[Optimizer]], model: Callable[[], nn.Module]
) -> None:
    through, run = Run(optimizers, model), Run(optimizers, model)

    def step(run: Run, seed: int) -> None:
        torch.manual_seed(seed)
        run.step(seed)

    with through.attach(unlimited(0.5)) as whole:
        for seed in range(8):
            step(through, seed)
    session = run.attach(unlimited(0.5))
    for seed in range(8):
        step(run, seed)
        file = io.BytesIO()
        torch.save([part.state_dict() for part in (run.model, *run.optimizers, session)], file)
        session.close()
        run = Run(optimizers, model)
        session = run.attach(unlimited(0.5))
        file.seek(0)
        for part, state in zip((run.model, *run.optimizers, session), torch.load(file, weights_only=True), strict=True):
            part.load_state_dict(state)
    assert run.everything == through.everything
    assert frozen([vars(one) for one in session.interventions]) == frozen([vars(one) for one in whole.interventions])
    assert frozen(session.state_dict()["control"]) == frozen(whole.state_dict()["control"])
    session.close()


def wide() -> nn.Module:
    """Wider than what is decomposed exactly, so that warm starts show."""
    return nn.Sequential(nn.Linear(FEATURES, 72), nn.Tanh(), nn.Linear(72, 80), nn.Tanh(), nn.Linear(80, CLASSES))


def test_a_run_whose_matrices_are_held_may_be_cut() -> None:
    through = Run(adamw, wide)
    with through.attach(RadiusLR(4.0)) as whole:
        through.steps_of(range(6))
    assert any("matrices" in one.saw for one in whole.interventions if one.step > 2)
    run = Run(adamw, wide)
    session = run.attach(RadiusLR(4.0))
    run.steps_of(range(3))
    states = copy.deepcopy([part.state_dict() for part in (run.model, *run.optimizers, session)])
    session.close()
    run = Run(adamw, wide)
    session = run.attach(RadiusLR(4.0))
    for part, state in zip((run.model, *run.optimizers, session), states, strict=True):
        part.load_state_dict(state)
    run.steps_of(range(3, 6))
    assert run.everything == through.everything
    assert frozen(session.state_dict()["control"]) == frozen(whole.state_dict()["control"])
    session.close()


@pytest.mark.parametrize("model", [plain, wide], ids=lambda make: make.__name__)
def test_it_can_be_used_in_one_session_after_another(model: Callable[[], nn.Module]) -> None:
    used, ends = RadiusLR(2.0), []
    for one, rate in ((used, 1000.0), (used, 1.0), (RadiusLR(2.0), 1.0)):
        run = Run(adamw, model).times_rate(rate)
        with run.attach(one) as session:
            run.steps_of(range(4))
        ends.append((run.everything, frozen(session.state_dict()["control"])))
    assert ends[1] == ends[2] != ends[0]


# On an accelerator ------------------------------------------------------------------------------------------------


@pytest.fixture
def accelerated(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, tensors pass for those of an accelerator, whose values nobody on the host knows."""

    def begin() -> None:
        for module in ("interventions", "control", "parameters", "update_limits"):
            monkeypatch.setattr(f"redline.{module}.is_on_host", lambda tensor: False)

    return begin


@EVERY_OPTIMIZER
@EVERY_MODEL
def test_on_an_accelerator_the_run_is_the_same(
    optimizers: Callable[[nn.Module], list[Optimizer]],
    model: Callable[[], nn.Module],
    accelerated: Callable[[], None],
) -> None:
    def run() -> tuple[Any, ...]:
        one = Run(optimizers, model)
        torch.manual_seed(5)
        with one.attach(unlimited(0.3)) as session:
            for seed in range(6):
                one.times_rate(0 if seed == 3 else 1).step(seed)
                for optimizer in one.optimizers if seed == 3 else ():
                    for group in optimizer.param_groups:
                        group["lr"] = 1e-2
            read = [session.latest.value(name) for name in (SCALE, COMMITTED)]
            counted = session.latest.series("redline_interventions_total")
        return one.everything, repr(session.interventions), read, counted

    on_host = run()
    accelerated()
    on_device = run()
    for what, host, device in zip(("run", "trace", "gauges", "counters"), on_host, on_device, strict=True):
        assert device == host, what


@EVERY_MODEL
def test_on_an_accelerator_it_waits_for_nothing(
    model: Callable[[], nn.Module], accelerated: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    import redline.interventions
    import redline.readings

    accelerated()
    copies: list[int] = []
    for module in (redline.interventions, redline.readings):
        bring = module.to_host
        monkeypatch.setattr(module, "to_host", lambda tensors, bring=bring: (copies.append(1), bring(tensors))[1])
    run = Run(adamw_fused, model)
    with run.attach(unlimited(0.5)) as session:
        run.step(0)  # the first tangent is checked once
        for seed in range(1, 6):
            run.backward(seed)
            copies.clear()
            with HostReads() as reads:
                run.update()
            assert (reads.seen, copies) == ([], [])
        assert [one.step for one in session.interventions] == list(range(6))


# Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [0, 0.0, -1.0, math.nan, math.inf, -math.inf])
def test_a_length_that_is_not_positive_is_refused(r: float) -> None:
    with pytest.raises(ConfigurationError, match=rf"got r={r}; expected a positive number of radii, such as 1\."):
        RadiusLR(r)


@pytest.mark.parametrize("reduction", [0, 0.0, -0.1, 1.0001, 2, math.nan, "min", "0.5", None])
def test_a_quantile_outside_0_to_1_is_refused(reduction: Any) -> None:
    with pytest.raises(
        ConfigurationError,
        match=rf"got reduction={reduction!r}; expected 'max' or a quantile in \(0, 1\], such as 0\.99\.",
    ):
        RadiusLR(reduction=reduction)


@pytest.mark.parametrize("most", [0, -0.3, math.nan, math.inf])
def test_a_limit_on_matrices_that_is_not_positive_is_refused(most: float) -> None:
    with pytest.raises(
        ConfigurationError,
        match=rf"got max_update_to_weight={most}; expected a positive number, such as 0\.3, or None\.",
    ):
        RadiusLR(max_update_to_weight=most)


@pytest.mark.parametrize("growth", [1, 1.0, 0.5, 0, -1.02, math.nan, math.inf])
def test_a_growth_of_one_or_less_is_refused(growth: float) -> None:
    with pytest.raises(
        ConfigurationError, match=rf"got max_growth={growth}; expected more than 1, such as 1\.02, or None\."
    ):
        RadiusLR(max_growth=growth)


@pytest.mark.parametrize("samples", [0, -1])
def test_fewer_than_one_sample_is_refused(samples: int) -> None:
    with pytest.raises(ConfigurationError, match=f"got max_samples={samples}; expected at least 1, or None"):
        RadiusLR(max_samples=samples)


def test_an_output_without_logits_is_refused_at_the_first_step_and_nothing_is_scaled() -> None:
    class Answering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = plain()

        def forward(self, x: Tensor) -> Any:
            return SimpleNamespace(scores=self.net(x))

    def step(run: Run) -> None:
        x, y = batch(1)
        F.cross_entropy(run.model(x).scores, y).backward()
        run.update()

    alone, run = Run(sgd, Answering), Run(sgd, Answering)
    step(alone)
    with run.attach(RadiusLR()) as session, pytest.raises(ConfigurationError, match=r"as logits; .*`logits=`"):
        step(run)
    assert run.everything == alone.everything, "the step is the optimizer's own"
    assert session.interventions == ()


def test_a_step_by_one_optimizer_of_two_is_of_that_length_too() -> None:
    """The other was skipped: it ends with the next forward."""
    run = Run(muon_and_adamw)
    before = run.parameters
    with run.attach(unlimited(0.5)):
        run.backward(1)
        run.optimizers[0].step()
        run.model(batch(2)[0])
    assert reference(run.model, before, run.parameters, batch(1)[0]) == pytest.approx(0.5, rel=1e-3)


def test_under_accumulation_it_goes_by_the_last_micro_batch() -> None:
    run = Run()
    before = run.parameters
    with run.attach(unlimited(0.5)):
        for seed in (3, 4, 5):
            x, y = batch(seed)
            (F.cross_entropy(run.model(x), y) / 3).backward()
        run.update()
    each = [reference(run.model, before, run.parameters, batch(seed)[0]) for seed in (3, 4, 5)]
    assert each[-1] == pytest.approx(0.5, rel=1e-3)
    assert len({round(r, 2) for r in each}) > 1


def test_the_length_can_follow_a_schedule_of_the_users() -> None:
    """``r`` is a plain attribute."""
    run, control = Run(), unlimited(1.0)
    lengths: Sequence[float] = [1.0, 0.5, 0.25]
    with run.attach(control) as session:
        for seed, length in enumerate(lengths):
            control.r = length
            run.step(seed)
            assert session.latest.value(COMMITTED) == pytest.approx(length, rel=1e-5)
