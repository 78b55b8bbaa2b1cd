"""NonFiniteGuard: a step with a NaN in its gradients never happened."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from non_finite_guard_runs import (
    CLASSES,
    EVERY_OPTIMIZER,
    Run,
    Spoil,
    actions,
    adamw,
    bad_batch,
    batch,
    gradients_of,
    is_finite,
)
from torch import Tensor, nn
from torch.optim import Optimizer
from torch_optimizers import adamw_fused, sgd

from redline import NonFiniteGuard

BAD: dict[str, tuple[Callable[[int], tuple[Tensor, Tensor]], Spoil | None]] = {
    "a NaN in the batch": (bad_batch, None),
    "a NaN in a matrix": (batch, gradients_of(math.nan, "body.weight")),
    "a NaN in a vector": (batch, gradients_of(math.nan, "norm.bias")),
    "an infinity": (batch, gradients_of(-math.inf, "head.bias")),
    "infinities that make no NaN": (batch, gradients_of(math.inf, "body.weight", "head.bias")),
    "a norm that overflows": (batch, gradients_of(3e38, "body.weight", "head.bias")),
}


@EVERY_OPTIMIZER
@pytest.mark.parametrize("bad", BAD)
def test_a_withheld_step_never_happened(optimizers: Callable[[nn.Module], list[Optimizer]], bad: str) -> None:
    make, spoil = BAD[bad]
    run, alone = Run(optimizers), Run(optimizers)
    with run.attach() as session:
        for seed in (1, 2):
            run.step(batch(seed))
            alone.step(batch(seed))
        before = run.everything
        assert before == alone.everything
        run.step(make(3), spoil)
        assert run.everything == before
        for seed in (4, 5):
            run.step(batch(seed))
            alone.step(batch(seed))
    assert run.everything == alone.everything
    assert actions(session) == [(2, "withhold")]
    assert session.latest.value("redline_steps_total") == 5


@EVERY_OPTIMIZER
def test_without_the_guard_the_bad_step_reaches_the_model(
    optimizers: Callable[[nn.Module], list[Optimizer]],
) -> None:
    """So that the test above says something."""
    run = Run(optimizers)
    run.step(batch(1))
    run.step(bad_batch(2))
    assert not is_finite(run.model)


@EVERY_OPTIMIZER
def test_a_withheld_first_step_leaves_no_state(optimizers: Callable[[nn.Module], list[Optimizer]]) -> None:
    run, alone = Run(optimizers), Run(optimizers)
    with run.attach():
        run.step(bad_batch(1))
        assert run.everything == alone.everything
        assert not any(optimizer.state for optimizer in run.optimizers)
        run.step(batch(2))
    alone.step(batch(2))
    assert run.everything == alone.everything


def test_the_gradients_are_there_again_after_a_withheld_step() -> None:
    run = Run()
    with run.attach():
        run.step(batch(1), gradients_of(math.nan, "head.bias"))
        gradients = {name: parameter.grad for name, parameter in run.model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    assert math.isnan(gradients["head.bias"][-1])  # type: ignore[index]


@EVERY_OPTIMIZER
def test_a_run_without_incident_is_its_own_to_the_bit(
    optimizers: Callable[[nn.Module], list[Optimizer]],
) -> None:
    run, alone = Run(optimizers), Run(optimizers)
    with run.attach(NonFiniteGuard(restore_state=True)) as session:
        for seed in range(4):
            run.step(batch(seed))
            alone.step(batch(seed))
    assert run.everything == alone.everything
    assert session.interventions == ()
    assert session.latest.value("redline_step_scale") == 1


@pytest.mark.parametrize("bad", [1, 2, 3])
def test_accumulation_is_withheld_as_a_whole(bad: int) -> None:
    """Three forwards a step, of which any can be the bad one: running statistics go back to before the first."""

    def step(run: Run, seeds: tuple[int, ...], broken: int = 0) -> None:
        run.optimizers[0].zero_grad()
        for seed in seeds:
            x, y = bad_batch(seed) if seed == broken else batch(seed)
            (F.cross_entropy(run.model(x), y) / len(seeds)).backward()
        run.optimizers[0].step()

    run, alone = Run(adamw), Run(adamw)
    with run.attach() as session:
        step(run, (11, 12, 13))
        step(alone, (11, 12, 13))
        before = run.everything
        step(run, (1, 2, 3), broken=bad)
        assert run.everything == before
        step(run, (21, 22, 23))
        step(alone, (21, 22, 23))
    assert run.everything == alone.everything
    assert actions(session) == [(1, "withhold")]


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("optimizers", [sgd, adamw, adamw_fused], ids=lambda make: make.__name__)
def test_a_step_by_closure_is_withheld_too(optimizers: Callable[[nn.Module], list[Optimizer]], keyword: bool) -> None:
    def step(run: Run, data: tuple[Tensor, Tensor]) -> float:
        def closure() -> Tensor:
            run.optimizers[0].zero_grad()
            loss = F.cross_entropy(run.model(data[0]), data[1])
            loss.backward()
            return loss.detach()

        return float(run.optimizers[0].step(closure=closure) if keyword else run.optimizers[0].step(closure))

    run, alone = Run(optimizers), Run(optimizers)
    with run.attach() as session:
        step(run, batch(1))
        step(alone, batch(1))
        before = run.everything
        assert math.isnan(step(run, bad_batch(2)))
        assert run.everything == before
        assert step(run, batch(3)) == step(alone, batch(3))
    assert run.everything == alone.everything
    assert actions(session) == [(1, "withhold")]


class Words(nn.Module):
    """Its embedding has sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 4, sparse=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x).mean(1))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_sparse_gradients_are_guarded(value: float) -> None:
    def optimizers(model: nn.Module) -> list[Optimizer]:
        return [
            torch.optim.SparseAdam([model.get_parameter("embedding.weight")], 1e-2),
            torch.optim.AdamW([model.get_parameter("head.weight"), model.get_parameter("head.bias")], 1e-2),
        ]

    def words(seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, 20, (8, 5), generator=generator), torch.randint(0, CLASSES, (8,), generator=generator)

    def spoil(model: nn.Module) -> None:
        gradient = model.get_parameter("embedding.weight").grad
        assert gradient is not None
        assert gradient.is_sparse
        gradient._values()[2, 1] = value

    run, alone = Run(optimizers, Words), Run(optimizers, Words)
    with run.attach() as session:
        run.step(words(1))
        alone.step(words(1))
        before = run.everything
        run.step(words(2), spoil)
        assert run.everything == before
        run.step(words(3))
        alone.step(words(3))
    assert run.everything == alone.everything
    (one,) = session.interventions
    assert "(1 of 3 parameters, the first embedding.weight)" in one.reason


def test_a_step_without_a_forward_is_withheld_and_leaves_the_running_statistics_alone() -> None:
    """Those kept ahead of an earlier step's forward are no longer the ones to go back to."""
    run = Run()
    with run.attach() as session:
        run.step(batch(1))
        before = run.everything
        for parameter in run.model.parameters():
            parameter.grad = torch.full_like(parameter, math.nan)
        run.optimizers[0].step()
    assert actions(session) == [(1, "withhold")]
    assert run.everything == before


def test_running_statistics_ahead_of_the_module_that_gives_the_logits_come_back_too() -> None:
    run = Run()
    with run.attach(module="head") as session:
        run.step(batch(1))
        before = run.everything
        run.step(bad_batch(2))
    assert actions(session) == [(1, "withhold")]
    assert run.parameters == before["parameters"]
    assert run.buffers == before["buffers"]
