"""Models and inputs as named on the command line, and what cannot be had."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import doctor_models
import pytest
import torch

from redline.errors import ConfigurationError
from redline.integrations.doctor.subject import load


def test_a_factory_of_model_and_inputs():
    subject = load("doctor_models:with_inputs")
    assert [tensor.shape for tensor in subject.args] == [(8, 12)]
    assert (subject.kwargs, subject.logits) == ({}, None)


def test_a_class_and_a_model_that_is_there_already():
    assert type(load("doctor_models:OneLogit", shape=(2, 12)).model).__name__ == "OneLogit"
    assert load("doctor_models:INSTANCE", shape=(2, 12)).model is doctor_models.INSTANCE


@pytest.mark.parametrize("inputs", ["positional_inputs", "keyword_inputs"])
def test_inputs_of_a_callable(inputs: str):
    subject = load("doctor_models:mlp", inputs=f"doctor_models:{inputs}")
    x = subject.kwargs["x"] if subject.kwargs else subject.args[0]
    assert torch.equal(x, torch.ones(8, 12))


def test_inputs_given_apart_go_before_the_factorys_own():
    assert load("doctor_models:with_inputs", shape=(3, 12)).args[0].shape == (3, 12)


def test_random_inputs_are_of_the_shape_and_dtype_and_the_same_each_time():
    one, other = (load("doctor_models:mlp", shape=(400, 12)).args[0] for _ in range(2))
    assert torch.equal(one, other)
    assert one.std() == pytest.approx(1.0, abs=0.05)
    tokens = load("doctor_models:language_model", shape=(64, 8), dtype="int64", high=5).args[0]
    assert (tokens.dtype, tokens.shape, set(tokens.flatten().tolist())) == (torch.int64, (64, 8), set(range(5)))


def test_drawing_inputs_leaves_the_runs_random_numbers_alone():
    before = torch.get_rng_state()
    load("doctor_models:INSTANCE", shape=(4, 12))
    load("doctor_models:INSTANCE", shape=(4, 12), dtype="int64", high=9)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_working_directory_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "of_here.py").write_text("import torch\ndef build():\n    return torch.nn.Linear(2, 2)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert isinstance(load("of_here:build", shape=(1, 2)).model, torch.nn.Linear)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "doctor_models"}, "got 'doctor_models' as MODEL; expected package.module:name"),
        ({"name": ":mlp"}, "expected package.module:name"),
        (
            {"name": "no_such_module:mlp"},
            "importing no_such_module for MODEL failed with ModuleNotFoundError: No module",
        ),
        ({"name": "doctor_models:mpl"}, "doctor_models has no 'mpl'; expected one of its callables, such as"),
        ({"name": "doctor_models:NOT_CALLABLE"}, "got a int at doctor_models:NOT_CALLABLE; expected a callable"),
        ({"name": "doctor_models:broken"}, "calling doctor_models:broken raised RuntimeError: the checkpoint is gone;"),
        ({"name": "doctor_models:integers"}, "got a Tensor from doctor_models:integers; expected a torch.nn.Module"),
        ({"name": "doctor_models:mlp"}, "got no inputs for doctor_models:mlp; expected example inputs"),
        ({"name": "doctor_models:mlp", "inputs": "doctor_models:broken"}, "expected a callable without arguments that"),
        ({"name": "doctor_models:mlp", "shape": (2, 12), "dtype": "float31"}, "got dtype 'float31'"),
        ({"name": "doctor_models:mlp", "shape": (2, 12), "dtype": "nn"}, "got dtype 'nn'"),
        ({"name": "doctor_models:mlp", "shape": (2, 12), "dtype": "int64", "high": 0}, "got high=0"),
        ({"name": "doctor_models:mlp", "shape": (2, 12), "logits": "doctor_models:thrid"}, "as --logits, but"),
    ],
)
def test_what_cannot_be_had_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        load(**options)


def test_a_module_that_raises_as_it_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "bursts.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(ConfigurationError, match="importing bursts for MODEL failed with ZeroDivisionError"):
        load("bursts:build")
