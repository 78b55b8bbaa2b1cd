"""Averaged copies of a model: they average what was committed, and what they compute is not the model's."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from technique_runs import LABELS, Blocks, R, batch, every_step, reference, sgd
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import redline
from redline.hooks import ForwardHook

DECAY = 0.9


def averaged(model: nn.Module) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, meddle: Callable[[Tensor], Any] = len) -> None:
    x, y = batch(seed)
    loss = F.cross_entropy(model(x), y)
    meddle(x)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def values(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


# What is averaged -------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", ["before", "after"])
def test_what_a_clamp_committed_is_averaged(made: str) -> None:
    """The step is cut before ``optimizer.step()`` returns, so the average never sees what the optimizer proposed."""
    torch.manual_seed(0)
    model = Blocks(dropout=0.0)
    average = averaged(model)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    clamp = redline.StepClamp(max_r=0.1, max_samples=None, stale_after=1)
    with redline.attach(model, optimizer, monitors=[], controllers=[clamp]) as session:
        average = averaged(model) if made == "after" else average
        expected: list[Tensor] = []
        for seed in range(5):
            before = copy.deepcopy(model)
            step(model, optimizer, seed)
            assert reference(before, model, batch(seed)[0]) == pytest.approx(0.1, rel=1e-3)
            average.update_parameters(model)
            now = values(model)
            expected = [DECAY * e + (1 - DECAY) * p for e, p in zip(expected, now, strict=True)] if expected else now
        assert len(session.interventions) == 5
    for ours, theirs in zip(values(average), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


# What copies compute ----------------------------------------------------------------------------------


@pytest.mark.parametrize("made", ["before", "after"])
@pytest.mark.parametrize(
    "make",
    [
        averaged,
        copy.deepcopy,
        lambda model: checkpoint_wrapper(copy.deepcopy(model)),
        lambda model: torch.compile(copy.deepcopy(model), backend="eager"),
    ],
    ids=["averaged", "copied", "copied and checkpointed", "copied and compiled"],
)
def test_what_a_copy_computes_in_training_is_not_the_models(make: Callable[[nn.Module], nn.Module], made: str) -> None:
    """A mean teacher: it predicts, in training mode and with gradients, between the student's forward and step."""

    def run(taught: bool) -> tuple[list[float], list[Tensor], tuple[str, ...]]:
        torch.manual_seed(0)
        model = Blocks(dropout=0.0)
        teacher = make(model) if made == "before" else None
        optimizer = sgd(model)
        found = []
        with redline.attach(model, optimizer, monitors=[redline.GhostRadius(1, max_samples=None)]) as session:
            teacher = make(model) if teacher is None else teacher

            def teach(x: Tensor) -> None:
                teacher(torch.full_like(x, 1e3)).sum().backward()

            for seed in range(3):
                step(model, optimizer, seed, teach if taught else len)
                found.append(session.latest.value(R))
                if isinstance(teacher, AveragedModel):
                    teacher.update_parameters(model)
            assert session.latest.value("redline_steps_total") == 3
            return found, values(model), session.notes

    (r, parameters, notes), (r_alone, alone, _) = run(taught=True), run(taught=False)
    assert r == r_alone
    assert all(torch.equal(*pair) for pair in zip(parameters, alone, strict=True))
    assert notes == ()


def test_a_teacher_that_is_part_of_the_model_is_not_taken_for_it() -> None:
    """As a LightningModule holds them: the whole is not called itself, the teacher only without gradients."""
    torch.manual_seed(0)
    model = nn.Module()
    model.net = Blocks(dropout=0.0)
    model.teacher = averaged(model.net)
    optimizer = sgd(model.net)
    with redline.attach(model, optimizer, monitors=[redline.GhostRadius(1, max_samples=None)]) as session:
        for seed in range(3):
            before = copy.deepcopy(model.net)

            def teach(x: Tensor) -> None:
                with torch.no_grad():
                    model.teacher(torch.full_like(x, 1e3))

            step(model.net, optimizer, seed, teach)
            assert session.latest.value(R) == pytest.approx(reference(before, model.net, batch(seed)[0]), rel=1e-4)
            model.teacher.update_parameters(model.net)
        assert session.notes == ()


# Copies made midway -----------------------------------------------------------------------------------


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


WRAPPERS = {
    "bare": lambda model: model,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled in place": in_place,
    "checkpointed": checkpoint_wrapper,
    "distributed": nn.parallel.DistributedDataParallel,
}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, saved])
def test_a_copy_made_midway_is_inert_and_the_run_goes_on(
    wrap: Callable[[nn.Module], nn.Module], duplicate: Callable[[nn.Module], nn.Module]
) -> None:
    def run(copied: bool) -> tuple[list[float], list[Tensor]]:
        torch.compiler.reset()
        torch.manual_seed(0)
        called = wrap(Blocks(dropout=0.0))
        optimizer = sgd(called)
        with redline.attach(called, optimizer, monitors=every_step()) as session:
            found = []
            for seed in range(4):
                step(called, optimizer, seed)
                found.append(session.latest.value(R))
                if seed == 1 and copied:
                    twin = duplicate(called)
                    assert all(torch.equal(*pair) for pair in zip(values(twin), values(called), strict=True))
                    of_twin = sgd(twin)
                    for further in range(2):
                        step(twin, of_twin, 50 + further)
                    assert session.latest.value("redline_steps_total") == 2
            assert session.notes == ()
        return found, values(called)

    (r, parameters), (r_alone, alone) = run(copied=True), run(copied=False)
    assert r == r_alone
    assert all(torch.equal(*pair) for pair in zip(parameters, alone, strict=True))


def test_a_copy_can_be_watched_by_a_session_of_its_own() -> None:
    torch.manual_seed(0)
    model = Blocks(dropout=0.0)
    optimizer = sgd(model)
    with redline.attach(model, optimizer, monitors=every_step()) as session:
        step(model, optimizer, 0)
        twin = copy.deepcopy(model)
        of_twin = sgd(twin)
        with redline.attach(twin, of_twin, monitors=every_step()) as of_copy:
            before = copy.deepcopy(twin)
            step(twin, of_twin, 1)
            assert of_copy.latest.value(R) == pytest.approx(reference(before, twin, batch(1)[0]), rel=1e-4)
            assert of_copy.latest.layers("redline_weight_spectral_norm").keys() == LABELS
        assert session.latest.value("redline_steps_total") == 1
    assert not any(isinstance(h, ForwardHook) for m in model.modules() for h in m._forward_pre_hooks.values())


# BatchNorm --------------------------------------------------------------------------------------------


class Normalizing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("whose", ["average", "model"])
def test_new_batchnorm_statistics_are_no_training(whose: str) -> None:
    """``update_bn`` calls a model in training mode, without gradients, over the whole data."""

    def run(watched: bool) -> tuple[list[Tensor], list[Tensor], list[float]]:
        torch.manual_seed(0)
        model = Normalizing()
        average, optimizer, found = averaged(model), sgd(model), []
        monitors = [redline.GhostRadius(1)] if watched else []
        with redline.attach(model, optimizer, monitors=monitors) as session:
            for seed in range(4):

                def renew(x: Tensor) -> None:
                    update_bn([torch.full_like(x, 1e3), 7.0 + x], average if whose == "average" else model)

                # Of the model's own statistics its backward makes use.
                step(model, optimizer, seed, renew if whose == "average" else len)
                average.update_parameters(model)
                renew(batch(seed)[0])
                if watched:
                    found.append(session.latest.value(R))
                    assert session.latest.value("redline_steps_total") == seed + 1
            assert session.notes == ()
        return values(model), [buffer.clone() for one in (model, average) for buffer in one.buffers()], found

    (parameters, buffers, r), (alone, buffers_alone, _) = run(watched=True), run(watched=False)
    assert all(torch.equal(*pair) for pair in zip(parameters, alone, strict=True))
    assert all(torch.equal(*pair) for pair in zip(buffers, buffers_alone, strict=True))
    assert max(r) < 10, "inputs of 1000 would be far over the redline"
    torch.manual_seed(0)
    model = Normalizing()
    optimizer = sgd(model)
    with redline.attach(model, optimizer, monitors=[redline.GhostRadius(1)]) as session:
        for seed in range(4):
            step(model, optimizer, seed)
            assert session.latest.value(R) == pytest.approx(r[seed], rel=1e-5)


def test_new_batchnorm_statistics_end_no_joint_step() -> None:
    """Renewed between two optimizers' steps, where a forward in training would end what the first began."""
    torch.manual_seed(0)
    model = Normalizing()
    first, *others = model.parameters()
    optimizers = [torch.optim.SGD(one, 0.1) for one in ([first], others)]
    with redline.attach(model, optimizers, monitors=[redline.StepHealth(1)]) as session:
        x, y = batch(0)
        F.cross_entropy(model(x), y).backward()
        optimizers[0].step()
        update_bn([x, x], model)
        assert session.latest.value("redline_steps_total") == 0
        optimizers[1].step()
        assert session.latest.value("redline_steps_total") == 1
