"""What the tests of the studies share."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

STUDIES = Path(__file__).resolve().parents[2] / "examples" / "studies"


@pytest.fixture(scope="session")
def short_form(tmp_path_factory) -> Callable[[str], dict[str, Any]]:
    """Runs a study's short form, once, as a user would start it, and reads its JSON: ``short_form("temperature")``."""
    pages: dict[str, dict[str, Any]] = {}

    def run(name: str) -> dict[str, Any]:
        if name not in pages:
            out = tmp_path_factory.mktemp(name)
            done = subprocess.run(
                [sys.executable, str(STUDIES / f"{name}.py"), "--quick", "--out", str(out)],
                env={**os.environ, "PYTHONWARNINGS": "default"},
                capture_output=True,
                text=True,
                timeout=600,
            )
            assert done.returncode == 0, done.stderr
            assert (out / f"{name}.png").stat().st_size > 10_000
            pages[name] = json.loads((out / f"{name}.json").read_text())
        return pages[name]

    return run


@pytest.fixture(scope="session")
def load_study() -> Iterator[Callable[[str], ModuleType]]:
    """A study, or what studies share, as a module: ``load_study("one_step")``."""
    sys.path.insert(0, str(STUDIES))
    yield importlib.import_module
    sys.path.remove(str(STUDIES))


@pytest.fixture(scope="module")
def page(request: pytest.FixtureRequest, short_form: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """The short form of the study that a test file is named for."""
    return short_form(request.path.stem.removeprefix("test_"))


@pytest.fixture(scope="module")
def study(request: pytest.FixtureRequest, load_study: Callable[[str], ModuleType]) -> ModuleType:
    """That study, as a module."""
    return load_study(request.path.stem.removeprefix("test_"))


@pytest.fixture(scope="session")
def slow_spread() -> Callable[[nn.Module, Tensor, dict[str, Tensor]], float]:
    """The largest tangent spread by a central difference in float64; the model is one without buffers."""

    def spread(model: nn.Module, x: Tensor, direction: dict[str, Tensor]) -> float:
        def logits(t: float) -> Tensor:
            moved = {name: p.detach().double() + t * direction[name].double() for name, p in model.named_parameters()}
            return functional_call(model, moved, (x.double(),))

        with torch.no_grad():
            tangent = (logits(1e-6) - logits(-1e-6)) / 2e-6
        return (tangent.amax(-1) - tangent.amin(-1)).max().item()

    return spread
