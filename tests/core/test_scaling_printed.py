"""Transfer to another width: what is refused, and what is printed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scaling_models import (
    INF,
    LONG,
    NAN,
    quiet,
    seeded,  # noqa: F401 around every test
    show,
    split,
    trainable,
)
from torch import nn

from redline import ConfigurationError
from redline.integrations.demo.models import LlamaLM
from redline.scaling import classify, transfer

# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 0}, r"got width=0; expected the model's width, at least 1"),
        ({"width": -64}, r"got width=-64; expected"),
        ({"width": 0.5}, r"got width=0.5; expected"),
        ({"width": NAN}, r"got width=nan; expected"),
        ({"width": INF}, r"got width=inf; expected"),
        ({"base_width": 0}, r"got base_width=0; expected the width it was tuned at, at least 1"),
        ({"base_width": -16}, r"got base_width=-16; expected"),
        ({"base_width": NAN}, r"got base_width=nan; expected"),
        ({"base_width": INF}, r"got base_width=inf; expected"),
        ({"lr": -0.1}, r"got lr=-0.1; expected what was tuned at width 16, 0 or more"),
        ({"lr": NAN}, r"got lr=nan; expected"),
        ({"lr": INF}, r"got lr=inf; expected"),
        ({"weight_decay": -0.1}, r"got weight_decay=-0.1; expected what was tuned at width 16"),
        ({"weight_decay": NAN}, r"got weight_decay=nan; expected"),
        ({"weight_decay": INF}, r"got weight_decay=inf; expected"),
    ],
    ids=str,
)
def test_numbers_that_cannot_work_are_refused(arguments: dict[str, Any], message: str):
    with pytest.raises(ConfigurationError, match=message):
        quiet(LlamaLM(64, layers=1), **arguments)


@pytest.mark.parametrize(
    "setting", [{"lr": NAN}, {"lr": INF}, {"lr": -0.1}, {"weight_decay": NAN}, {"weight_decay": -1.0}]
)
def test_numbers_of_own_groups_that_cannot_work_are_refused(setting: dict[str, float]):
    """AdamW checks its defaults only, not the groups'."""
    model = LlamaLM(64, layers=1)
    with pytest.raises(ConfigurationError, match=rf"got .*{next(iter(setting))}.*expected"):
        quiet(model, groups=[{"params": model.parameters(), **setting}])


@pytest.mark.parametrize("width", [0, -1, NAN])
def test_classify_refuses_such_a_width(width: float):
    with pytest.raises(ConfigurationError, match="got width="):
        classify(nn.Linear(4, 4), width)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "given", [lambda model: model.parameters(), lambda model: [{"params": []}], lambda model: None]
)
def test_what_is_no_model_is_refused(given: Callable[[nn.Module], Any]):
    with pytest.raises(ConfigurationError, match=r"as model; expected a torch.nn.Module.* go into groups="):
        quiet(given(nn.Linear(4, 4)))


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(lambda model: model.parameters(), id="parameters"),
        pytest.param(lambda model: list(model.parameters()), id="a list of parameters"),
        pytest.param(lambda model: {"params": model.parameters()}, id="one group, not in a list"),
        pytest.param(lambda model: [{"lr": 0.1}], id="a group without parameters"),
    ],
)
def test_what_are_no_groups_is_refused(given: Callable[[nn.Module], Any]):
    model = nn.Linear(64, 64)
    with pytest.raises(ConfigurationError, match=r"got .*group.*expected"):
        quiet(model, groups=given(model))


def test_groups_that_are_scaled_already_are_refused():
    model = LlamaLM(64, layers=1)
    groups = quiet(model)
    optimizer = torch.optim.AdamW(groups)
    renamed = [{**group, "name": f"mine {k}"} for k, group in enumerate(groups)]
    for again, name in ((groups, "matrix-like"), (optimizer.param_groups, "matrix-like"), (renamed, "mine 0")):
        with pytest.raises(ConfigurationError, match="scaled already, by a width 4 times the base; expected") as caught:
            quiet(model, groups=again)
        assert f"group 0 ('{name}')" in str(caught.value)
        assert "width 16" in str(caught.value)


def test_one_scaled_group_among_others_is_refused():
    model = LlamaLM(64, layers=1)
    inner, outer = split(model)
    scaled = quiet(model, groups=[{"params": inner, "name": "blocks"}])
    with pytest.raises(ConfigurationError, match=r"group 2 \('blocks vector-like'\), which is scaled already"):
        quiet(model, groups=[{"params": outer}, {"params": [scaled[0]["params"][0]]}, scaled[1]])


def test_scaled_groups_are_refused_at_the_same_width_too():
    model = LlamaLM(64, layers=1)
    with pytest.raises(ConfigurationError, match="scaled already, by a width 1 times the base"):
        quiet(model, groups=quiet(model, base_width=64))


def test_parameters_of_another_model_are_refused():
    model, other = LlamaLM(64, layers=1), LlamaLM(64, layers=2)
    groups = [{"params": model.head.parameters()}, {"params": [model.norm.weight, *other.parameters()]}]
    with pytest.raises(ConfigurationError, match="group 1 with 21 parameters that LlamaLM does not have") as caught:
        quiet(model, groups=groups)
    assert "(256, 64)" in str(caught.value)
    assert "expected groups over the model's own" in str(caught.value)


def test_a_lazy_parameter_is_refused():
    with pytest.raises(ConfigurationError, match=r"lazy parameter 'weight'.*expected one with a shape"):
        quiet(nn.LazyLinear(64))


# What is printed -----------------------------------------------------------------------------------------------------


def test_one_row_for_all_that_differ_in_numbers_only(written: Callable[[], list[str]]):
    show(LlamaLM(64, layers=3))
    assert [" ".join(line.split()) for line in written()] == [
        "From width 16 to 64",
        "parameters shape taken for lr decay because",
        "embedding.weight 256×64 vector-like 0.02 0 embedding",
        "blocks.*.norm_attention.weight ×3 64 vector-like 0.02 0 vector",
        "blocks.*.norm_feedforward.weight ×3 64 vector-like 0.02 0 vector",
        *(
            f"blocks.*.{name}.weight ×3 {shape} matrix-like 0.005 0.2 fan-in {fan_in}"
            for name, shape, fan_in in (
                ("query", "64×64", 64),
                ("key", "64×64", 64),
                ("value", "64×64", 64),
                ("out", "64×64", 64),
                ("gate", "170×64", 64),
                ("up", "170×64", 64),
                ("down", "64×170", 170),
            )
        ),
        "norm.weight 64 vector-like 0.02 0 vector",
        "head.weight 256×64 matrix-like 0.005 0.2 fan-in 64",
    ]


@pytest.mark.usefixtures("columns")
def test_nothing_is_printed_unasked(written: Callable[[], list[str]]):
    quiet(LlamaLM(64, layers=1))
    classify(LlamaLM(64, layers=1), 64)
    assert written() == []


def test_it_is_printed_by_default(written: Callable[[], list[str]]):
    transfer(nn.Linear(64, 64), base_width=16, width=64, lr=0.02, weight_decay=0.1)
    assert len(written()) == 4


def test_rows_that_differ_in_more_than_numbers_stand_apart(written: Callable[[], list[str]]):
    model = nn.Sequential(
        nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 128), nn.Linear(128, 64), nn.LayerNorm(64)
    )
    show(model, vector_like=["1.weight"])
    weights = [line.split()[:-1] for line in written() if line.startswith("*.weight")]
    assert weights == [
        ["*.weight", "64×64", "matrix-like", "0.005", "0.2", "fan-in"],
        ["*.weight", "64×64", "vector-like", "0.02", "0", "as", "you"],
        ["*.weight", "128×64", "matrix-like", "0.005", "0.2", "fan-in"],
        ["*.weight", "64×128", "matrix-like", "0.005", "0.2", "fan-in"],
        ["*.weight", "64", "vector-like", "0.02", "0"],
    ]


def test_numbers_within_a_name_are_part_of_it(written: Callable[[], list[str]]):
    show(nn.ModuleDict({"conv1": nn.Linear(64, 64, bias=False), "conv2": nn.Linear(64, 64, bias=False)}))
    assert [line.split()[0] for line in written()[2:]] == ["conv1.weight", "conv2.weight"]


def test_what_is_in_no_group_says_so(written: Callable[[], list[str]]):
    model = LlamaLM(64, layers=1)
    show(model, groups=[{"params": model.head.parameters(), "lr": 0.4}])
    lines = written()
    assert sum("in no group" in line for line in lines) == len(trainable(model)) - 1
    (head,) = (line for line in lines if line.startswith("head.weight"))
    assert head.split()[3:5] == ["0.1", "0.2"]


def test_frozen_parameters_have_no_row(written: Callable[[], list[str]]):
    model = LlamaLM(64, layers=1)
    model.embedding.requires_grad_(False)
    show(model)
    assert not any("embedding" in line for line in written())


def nested(path: str, module: nn.Module) -> nn.Module:
    """A model whose one module is at this path."""
    for part in reversed(path.split(".")):
        outer = nn.Module()
        outer.add_module(part, module)
        module = outer
    return module


def test_long_names_are_folded_not_cut(written: Callable[[], list[str]], columns: int):
    show(nested(LONG, nn.Linear(64, 64, bias=False)))
    lines = written()
    assert "…" not in "".join(lines)
    text = "".join(line[: lines[1].index("shape")].replace("×1", "").strip() for line in lines[2:])
    assert text == f"{LONG.replace('23', '*')}.weight"
    if columns == 120:
        assert len(lines) == 3, "there is room for it"
    assert "64×64" in lines[2]
    assert "matrix-like" in lines[2]
    assert "fan-in 64" in lines[2]


def test_a_name_is_no_markup(written: Callable[[], list[str]]):
    model = nn.Module()
    model.register_parameter("w[red]", nn.Parameter(torch.randn(64, 64)))
    show(model)
    assert any(line.startswith("w[red] ") for line in written())
