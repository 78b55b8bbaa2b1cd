"""Gradient accumulation: several forwards and one step, measured on the last of them, plain and in ``no_sync``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from technique_runs import Blocks, R, batch, every_step, reference, sgd
from torch import nn
from torch.optim import Optimizer
from torch_optimizers import muon_and_adamw

import redline

MICRO_BATCHES = 3


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def plain(model: nn.Module) -> tuple[nn.Module, Callable[[], AbstractContextManager[None]]]:
    return model, nullcontext


def distributed(model: nn.Module) -> tuple[nn.Module, Callable[[], AbstractContextManager[None]]]:
    parallel = nn.parallel.DistributedDataParallel(model)
    return parallel, parallel.no_sync


class Run:
    """Accumulates over micro-batches, all but the last without synchronizing."""

    def __init__(
        self,
        how: Callable[[nn.Module], tuple[nn.Module, Callable[[], AbstractContextManager[None]]]] = plain,
        optimizers: Callable[[nn.Module], list[Optimizer]] = lambda model: [sgd(model)],
    ) -> None:
        torch.manual_seed(0)
        self.model = Blocks()
        self.called, self.no_sync = how(self.model)
        self.optimizers = optimizers(self.model)
        self.losses: list[float] = []

    def step(self, first: int, session: redline.Session | None = None) -> None:
        for place in range(MICRO_BATCHES):
            with nullcontext() if place == MICRO_BATCHES - 1 else self.no_sync():
                x, y = batch(first + place)
                loss = F.cross_entropy(self.called(x), y)
                (loss / MICRO_BATCHES).backward()
            self.losses.append(loss.item())
            if session is not None:
                session.observe(loss=loss)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    @property
    def parameters(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]


hows = pytest.mark.parametrize("how", [plain, distributed])


@pytest.mark.usefixtures("process_group")
@hows
@pytest.mark.parametrize("optimizers", [lambda model: [sgd(model)], muon_and_adamw], ids=["one", "two optimizers"])
def test_r_and_loss_are_of_the_last_micro_batch(
    how: Callable[[nn.Module], tuple[nn.Module, Callable[[], AbstractContextManager[None]]]],
    optimizers: Callable[[nn.Module], list[Optimizer]],
) -> None:
    run, alone = Run(how, optimizers), Run(how, optimizers)
    with redline.attach(run.called, run.optimizers, monitors=every_step()) as session:
        torch.manual_seed(1)
        for step in range(3):
            before = copy.deepcopy(run.model)
            run.step(10 * step, session)
            latest = session.latest
            x, _ = batch(10 * step + MICRO_BATCHES - 1)
            assert latest.value(R) == pytest.approx(reference(before, run.model, x), rel=1e-4)
            assert latest.value("redline_loss") == run.losses[-1]
            assert latest.value("redline_steps_total") == step + 1
            assert latest.value("redline_batch_samples") == len(x)
    assert session.notes == ()
    torch.manual_seed(1)
    for step in range(3):
        alone.step(10 * step)
    assert all(torch.equal(*pair) for pair in zip(run.parameters, alone.parameters, strict=True))


@pytest.mark.usefixtures("process_group")
@hows
@pytest.mark.parametrize("attached", ["model", "what is called"])
def test_a_forward_without_synchronization_is_the_steps_own(
    how: Callable[[nn.Module], tuple[nn.Module, Callable[[], AbstractContextManager[None]]]], attached: str
) -> None:
    """The last one may be the only one that a session sees of a step: what comes last counts, wherever it ran."""
    run = Run(how)
    model = run.model if attached == "model" else run.called
    with redline.attach(model, run.optimizers, monitors=[redline.GhostRadius(1, max_samples=None)]) as session:
        before = copy.deepcopy(run.model)
        x, y = batch(0)
        with run.no_sync():
            F.cross_entropy(run.called(x), y).backward()
        run.optimizers[0].step()
        assert session.latest.value(R) == pytest.approx(reference(before, run.model, x), rel=1e-4)


def test_further_micro_batches_do_not_end_a_step_that_has_not_begun() -> None:
    """A schedule of steps, not of forwards: what is due at the next step is armed for all its micro-batches."""
    run = Run()
    with redline.attach(run.model, run.optimizers, monitors=[redline.GhostRadius(2), redline.StepHealth(1)]) as session:
        for step in range(4):
            run.step(10 * step)
            counted = session.latest.series("redline_measurements_total")
            assert counted == {("GhostRadius",): step // 2 + 1, ("StepHealth",): step + 1}
        assert "redline_loss" not in session.latest, "nobody observed one"


def test_a_micro_batch_ends_a_joint_step_of_which_an_optimizer_was_skipped() -> None:
    """Muon steps, AdamW does not: the step ends at the next forward, as the first micro-batch is."""
    run = Run(optimizers=muon_and_adamw)
    with redline.attach(run.model, run.optimizers, monitors=[redline.StepHealth(1)]) as session:
        for place in range(2):
            F.cross_entropy(run.model(batch(place)[0]), batch(place)[1]).backward()
        run.optimizers[0].step()
        assert session.latest.value("redline_steps_total") == 0
        for place in range(2):
            F.cross_entropy(run.model(batch(place)[0]), batch(place)[1]).backward()
            assert session.latest.value("redline_steps_total") == 1


def test_a_loss_that_is_observed_for_the_whole_is_the_steps() -> None:
    run = Run()
    with redline.attach(run.model, run.optimizers, monitors=[redline.StepHealth(1)]) as session:
        total = torch.zeros(())
        for place in range(2):
            x, y = batch(place)
            loss = F.cross_entropy(run.model(x), y) / 2
            loss.backward()
            total += loss.detach()
        session.observe(loss=total)
        run.optimizers[0].step()
        assert session.latest.value("redline_loss") == total.item()
