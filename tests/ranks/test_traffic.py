"""What is sent at a step is what docs/scale_plan.py says, and nothing besides."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from processes import on_ranks
from rank_traffic import sent
from rank_training import model

from redline.notes import Notes
from redline.parameters import matrix_layers

DOCS = Path(__file__).resolve().parents[2] / "docs"


def of_docs(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def planned(which: str, size: int, rounds: list[list[int]], *, sharded: bool) -> list[Any]:
    plan, net = of_docs("scale_plan"), model()
    matrices = [(layer.d_out, layer.d_in) for layer in matrix_layers(net, Notes())]
    shapes = [tuple(parameter.shape) for parameter in net.parameters()]
    filled_up = [math.ceil(shape[0] / size) * size * math.prod(shape[1:]) for shape in shapes]
    count = sum(filled_up)
    dims = [dict(net.named_parameters())[layer.parameter].dim() for layer in matrix_layers(net, Notes())]
    spectrum = []
    for own in rounds:  # of weights, or of updates and of weights
        # What has more than two dimensions is split along the first, so that each matrix of it is whole on some rank.
        split = [place for place, dim in enumerate(dims) if sharded and dim == 2]
        if split:
            spectrum += plan.spectra([matrices[k] for k in split], [own[k] for k in split], sharded=True, watched=True)
        if left := len(matrices) - len(split):
            spectrum += plan.spectra(matrices[:left], own[:left], sharded=False, watched=True)
    return {
        "health": lambda: plan.every_step(sharded=sharded),
        "weights": lambda: [*spectrum, *plan.frobenius_norms(len(matrices))],
        "updates": lambda: [*spectrum, *plan.update_norms(len(shapes))],
        "radius": lambda: [
            *plan.update_norms(len(shapes)),
            *plan.tangent(count, len(shapes), len(net.blocks) + 1, size, sharded=sharded),
        ],
    }[which]()


@pytest.mark.parametrize(("how", "size"), [("ddp", 2), ("fsdp", 2), ("fsdp", 4)])
@pytest.mark.parametrize("which", ["health", "weights", "updates", "radius"])
def test_bytes_and_messages_are_those_of_the_plan(which: str, how: str, size: int):
    told = on_ranks(sent, size, how, which)[0]
    plan = planned(which, size, told["rounds"], sharded=how == "fsdp")
    assert told["bytes"] == pytest.approx(sum(one.bytes for one in plan), rel=0.1)
    assert told["messages"] == pytest.approx(sum(one.count for one in plan), rel=0.1)


def test_the_page_has_the_plan():
    sys.path.insert(0, str(DOCS))
    page = of_docs("render_scale")
    assert page.PAGE.read_text() == page.page(), "run: python docs/render_scale.py"
