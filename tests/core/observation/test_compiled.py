"""Observing alone changes nothing: models and optimizer steps that are compiled."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from observed_runs import Attention, Convolutional, Run, adam, assert_unchanged, sgd
from torch import Tensor, nn
from torch.optim import Optimizer


class Compiling:
    """Compiles the model midway."""

    def __init__(self, backend: str, **options: Any) -> None:
        self.backend, self.options = backend, options

    def __call__(self, run: Run) -> None:
        torch.compiler.reset()
        run.called = torch.compile(run.model, backend=self.backend, **self.options)  # type: ignore[assignment]


@pytest.mark.parametrize("kind", [Convolutional, Attention])
def test_model_compiled_midway_is_unchanged(kind: type[nn.Module], capsys: pytest.CaptureFixture[str]) -> None:
    assert_unchanged(capsys, steps=10, kind=kind, midway=Compiling("aot_eager"))


def test_model_compiled_ahead_is_unchanged(capsys: pytest.CaptureFixture[str]) -> None:
    assert_unchanged(capsys, steps=10, prepare=Compiling("aot_eager"))


def test_model_compiled_in_place_is_unchanged(capsys: pytest.CaptureFixture[str]) -> None:
    def compiled_in_place(run: Run) -> None:
        torch.compiler.reset()
        run.model.compile(backend="aot_eager")

    assert_unchanged(capsys, steps=10, midway=compiled_in_place)


def test_model_compiled_as_one_graph_is_unchanged(capsys: pytest.CaptureFixture[str]) -> None:
    """``fullgraph=True`` refuses graph breaks: a hook that breaks the graph would end the run."""
    assert_unchanged(capsys, steps=10, midway=Compiling("aot_eager", fullgraph=True))


def compiled_step(run: Run) -> None:
    """Compile the optimizer's step, as is recommended to fuse it."""
    torch.compiler.reset()
    (optimizer,) = run.optimizers
    step = optimizer.step

    @torch.compile(backend="aot_eager")
    def compiled() -> None:
        step()

    def loop(run: Run) -> Tensor:
        loss = run.loss()
        run.observe(loss)
        loss.backward()
        compiled()
        return loss

    run.loop = loop


@pytest.mark.parametrize("optimizers", [sgd, adam])
def test_compiled_optimizer_step_is_unchanged(
    optimizers: Callable[[nn.Module], list[Optimizer]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert_unchanged(capsys, steps=10, optimizers=optimizers, midway=compiled_step)


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))), reason="inductor needs a C++ compiler")
def test_model_compiled_by_inductor_is_unchanged(capsys: pytest.CaptureFixture[str]) -> None:
    assert_unchanged(capsys, steps=8, midway=Compiling("inductor"))
