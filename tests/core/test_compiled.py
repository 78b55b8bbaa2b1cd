"""Compiled models and compiled optimizer steps: measured as the eager run is, and compiled as if nobody watched."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from technique_runs import FEATURES, LABELS, Blocks, R, Trained, batch, sgd, train
from torch import nn
from torch._dynamo.utils import counters
from torch.optim import Optimizer

import redline

BACKEND: dict[str, Any] = {"backend": "aot_eager"}


@pytest.fixture(autouse=True)
def compiling_anew() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def wrapped(model: nn.Module) -> nn.Module:
    return torch.compile(model, **BACKEND)  # type: ignore[no-any-return]


def in_place(model: nn.Module) -> nn.Module:
    model.compile(**BACKEND)
    return model


def blocks_wrapped(model: Blocks) -> nn.Module:
    for place, block in enumerate(model.layers):
        model.layers[place] = torch.compile(block, **BACKEND)
    return model


def blocks_in_place(model: Blocks) -> nn.Module:
    for block in model.layers:
        block.compile(**BACKEND)
    return model


@cache
def eager(warm: int = 0, module: str | None = None) -> Trained:
    return train(watched=True, warm=warm, module=module)


def compilations() -> tuple[int, Counter[str]]:
    """Graphs compiled since the last time, and where graphs broke."""
    found = counters["stats"]["unique_graphs"], Counter(counters["graph_break"])
    counters.clear()
    torch.compiler.reset()
    return found


def one_step(model: nn.Module, optimizer: Optimizer, seed: int) -> None:
    F.cross_entropy(model(batch(seed)[0]), batch(seed)[1]).backward()
    optimizer.step()
    optimizer.zero_grad()


BEFORE, AFTER, WARM = {"when": "ahead"}, {"when": "afterwards"}, {"when": "ahead", "warm": 2}


@pytest.mark.parametrize(
    ("how", "case"),
    [
        (wrapped, BEFORE),
        (wrapped, AFTER),
        (wrapped, WARM),
        (in_place, BEFORE),
        (in_place, WARM),
        (blocks_wrapped, BEFORE),
        (blocks_wrapped, AFTER),
        (blocks_wrapped, WARM),
        (blocks_in_place, AFTER),
        (blocks_in_place, WARM),
    ],
)
def test_it_is_measured_as_the_eager_run_and_compiled_as_if_nobody_watched(
    how: Callable[[Any], nn.Module], case: dict[str, Any]
) -> None:
    arguments = {case["when"]: how, "warm": case.get("warm", 0)}
    alone = train(watched=False, **arguments)
    expected = compilations()
    watched = train(watched=True, **arguments)
    assert watched.equals(alone)
    assert watched.losses == alone.losses
    assert compilations() == expected
    assert expected[0] > 0, "or else nothing was compiled"
    assert watched.notes == ()
    assert watched.labels == LABELS, "without _orig_mod"
    assert watched.differences(eager(arguments["warm"])) == []


@pytest.mark.parametrize("how", [wrapped, blocks_wrapped])
def test_steps_that_are_measured_and_steps_that_are_not_run_the_same_graph(how: Callable[[Any], nn.Module]) -> None:
    def sometimes() -> list[redline.Monitor]:
        return [redline.WeightSpectrum(3), redline.UpdateSpectrum(2), redline.GhostRadius(2)]

    with torch._dynamo.config.patch(error_on_recompile=True):
        assert train(watched=True, ahead=how, monitors=sometimes, steps=7).steps == 7


@pytest.mark.parametrize("how", [blocks_wrapped, blocks_in_place])
def test_a_compiled_block_can_be_named_as_what_gives_the_logits(how: Callable[[Any], nn.Module]) -> None:
    watched = train(watched=True, ahead=how, module="layers.1")
    assert watched.notes == ()
    assert watched.differences(eager(module="layers.1")) == []


def sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.Tanh(), nn.Linear(8, 5))


def as_one_graph(model: nn.Module) -> nn.Module:
    return torch.compile(model, fullgraph=True, **BACKEND)  # type: ignore[no-any-return]


@pytest.mark.parametrize("warm", [0, 2])
def test_a_compiled_container_of_torchs_own_is_measured_through_what_is_called(warm: int) -> None:
    """``nn.Sequential``'s call is inlined, its hooks with it: Redline's are on the compiled module around it."""
    plain = train(sequential, watched=True, warm=warm)
    watched = train(sequential, watched=True, ahead=as_one_graph, warm=warm)
    assert watched.differences(plain) == []
    assert watched.labels == {"0.weight", "2.weight"}
    assert watched.equals(train(sequential, watched=False, ahead=as_one_graph, warm=warm))


@pytest.mark.filterwarnings("ignore::redline.RedlineWarning")
def test_a_graph_that_runs_past_a_later_hook_is_told_of_not_guessed() -> None:
    model = sequential()
    called, optimizer = as_one_graph(model), sgd(model)
    one_step(called, optimizer, 0)
    with redline.attach(model, optimizer, monitors=[redline.GhostRadius(1), redline.UpdateSpectrum(1)]) as session:
        one_step(called, optimizer, 1)
        assert R not in session.latest
        assert session.latest.layers("redline_update_spectral_norm").keys() == {"0.weight", "2.weight"}
        (note,) = session.notes
    assert "the model was not called in training mode" in note


def test_a_compiled_function_that_calls_the_model_is_measured() -> None:
    expected = eager()
    torch.manual_seed(0)
    model = Blocks()
    optimizer = sgd(model)

    @torch.compile(**BACKEND)
    def loss_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(x), y)

    with redline.attach(model, optimizer, monitors=[redline.GhostRadius(1, max_samples=None)]) as session:
        for step in range(4):
            loss = loss_of(*batch(100 + step))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert loss.item() == pytest.approx(expected.losses[step])
            r = {series: value for series, value in expected.readings[step].items() if series.metric == R}
            assert list(r.values()) == pytest.approx([session.latest.value(R)], rel=1e-4)


def adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), 1e-2)


def as_method(optimizer: Optimizer) -> Callable[[], Any]:
    return torch.compile(optimizer.step, **BACKEND)  # type: ignore[no-any-return]


def as_attribute(optimizer: Optimizer) -> Callable[[], Any]:
    optimizer.step = torch.compile(optimizer.step, **BACKEND)  # type: ignore[method-assign]
    return optimizer.step


@pytest.mark.parametrize(("optimizer", "how", "warm"), [(sgd, as_method, 0), (adamw, as_attribute, 2)])
def test_a_compiled_step_is_measured(
    optimizer: Callable[[nn.Module], Optimizer], how: Callable[[Optimizer], Callable[[], Any]], warm: int
) -> None:
    arguments: dict[str, Any] = {"optimizer": optimizer, "warm": warm}
    alone = train(watched=False, compiled_step=how, **arguments)
    graphs, _ = compilations()
    watched = train(watched=True, compiled_step=how, **arguments)
    assert watched.equals(alone)
    assert compilations()[0] == graphs > 0
    assert watched.steps == 4
    assert watched.notes == ()
    assert watched.differences(train(watched=True, **arguments)) == []


@pytest.mark.slow  # it compiles C++
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))), reason="inductor needs a C++ compiler")
def test_by_inductor_it_is_measured_as_the_eager_run() -> None:
    def without_dropout() -> nn.Module:  # inductor draws its own
        return Blocks(dropout=0.0)

    def by_inductor(model: nn.Module) -> nn.Module:
        return torch.compile(model, backend="inductor")  # type: ignore[no-any-return]

    watched = train(without_dropout, watched=True, ahead=by_inductor)
    assert watched.differences(train(without_dropout, watched=True)) == []
