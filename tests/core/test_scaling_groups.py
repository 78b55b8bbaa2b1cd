"""Transfer to another width: its groups in optimizers, and beside groups of one's own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scaling_models import (
    cases,
    matrix_like,
    quiet,
    rates,
    seeded,  # noqa: F401 around every test
    split,
    trainable,
)
from torch import Tensor, nn

import redline
from redline.integrations.demo.models import LlamaLM

# Groups in optimizers ------------------------------------------------------------------------------------------------


@cases
def test_every_parameter_is_in_one_group(build: Callable[[int], nn.Module], expected: set[str]):
    model = build(64)
    groups = quiet(model)
    assert rates(model, groups).keys() == trainable(model)
    assert [group["name"] for group in groups] == ["matrix-like", "vector-like"][: len(groups)]
    assert rates(model, groups[:1]).keys() == expected


def test_frozen_parameters_are_in_no_group():
    model = LlamaLM(64, layers=1)
    model.embedding.requires_grad_(False)
    model.blocks.requires_grad_(False)
    assert rates(model, quiet(model)).keys() == {"norm.weight", "head.weight"}


def test_there_is_no_empty_group():
    assert [group["name"] for group in quiet(nn.Linear(64, 3, bias=False))] == ["matrix-like"]
    assert [group["name"] for group in quiet(nn.LayerNorm(64))] == ["vector-like"]
    assert quiet(nn.ReLU()) == []


def loss_of(model: nn.Module, batch: int = 2) -> Tensor:
    tokens, targets = torch.randint(256, (2, batch, 8))
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


def test_adamw_steps_at_the_rates_and_decays_of_the_rule():
    """Its first step moves each entry by the rate, against the gradient's sign, and shrinks it by rate times decay."""
    model = LlamaLM(64, layers=1).double()
    nn.init.normal_(model.head.weight)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(quiet(model), eps=1e-30)
    loss_of(model).backward()
    optimizer.step()
    matrices = matrix_like(model, 64)
    for name, parameter in model.named_parameters():
        lr, decay = (0.005, 0.2) if name in matrices else (0.02, 0.0)
        assert parameter.grad is not None
        expected = (1 - lr * decay) * before[name] - lr * parameter.grad.sign()
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-9, atol=1e-12)


def test_the_optimizers_own_defaults_do_not_get_through():
    model = LlamaLM(64, layers=1)
    optimizer = torch.optim.AdamW(quiet(model), lr=5.0, weight_decay=7.0)
    assert {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups} == {(0.005, 0.2), (0.02, 0.0)}


def test_muon_takes_the_matrices_and_redline_reads_the_groups_by_name():
    model = LlamaLM(64, layers=1)
    groups = {group["name"]: group for group in quiet(model)}
    muon = torch.optim.Muon([groups["matrix-like"]])
    adamw = torch.optim.AdamW([groups["vector-like"]])
    with redline.attach(model, [muon, adamw], monitors=[redline.StepHealth()]) as session:
        loss_of(model).backward()
        muon.step()
        adamw.step()
    assert session.latest.series("redline_learning_rate") == {
        ("Muon", "matrix-like"): pytest.approx(0.005),
        ("AdamW", "vector-like"): pytest.approx(0.02),
    }
    assert session.latest.value("redline_weight_decay", optimizer="Muon", group="matrix-like") == pytest.approx(0.2)
    assert session.latest.value("redline_weight_decay", optimizer="AdamW", group="vector-like") == 0


def read_by_redline(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Rates by the label ``group``, after one step."""
    with redline.attach(model, optimizer, monitors=[redline.StepHealth()]) as session:
        loss_of(model).backward()
        optimizer.step()
    return {group: value for (_, group), value in session.latest.series("redline_learning_rate").items()}


def test_names_of_groups_are_redlines_labels():
    model = LlamaLM(64, layers=1)
    labels = read_by_redline(model, torch.optim.AdamW(quiet(model)))
    assert labels == {"matrix-like": pytest.approx(0.005), "vector-like": pytest.approx(0.02)}


def test_a_schedule_keeps_the_ratio():
    model = LlamaLM(64, layers=1)
    optimizer = torch.optim.AdamW(quiet(model))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    for step in range(4):
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
            [0.005 / (step + 1), 0.02 / (step + 1)]
        )
        optimizer.step()
        schedule.step()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [pytest.approx(0.2), 0]


def test_a_cosine_schedule_ends_at_the_same_share_of_each_rate():
    model = LlamaLM(64, layers=1)
    optimizer = torch.optim.AdamW(quiet(model))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for _ in range(5):
        optimizer.step()
        schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.0025, 0.01])


def test_an_optimizer_of_such_groups_can_be_saved_and_loaded():
    model = LlamaLM(64, layers=1)
    optimizer = torch.optim.AdamW(quiet(model))
    loss_of(model).backward()
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    other = torch.optim.AdamW(quiet(model, lr=1.0))
    other.load_state_dict(state)
    assert [(group["name"], group["lr"]) for group in other.param_groups] == [
        ("matrix-like", pytest.approx(0.005)),
        ("vector-like", pytest.approx(0.02)),
    ]


def test_the_model_is_left_as_it_was():
    model = LlamaLM(64, layers=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    random = torch.get_rng_state()
    quiet(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


# Groups of one's own -------------------------------------------------------------------------------------------------


def test_own_rates_and_decays_are_scaled_instead():
    model = LlamaLM(64, layers=1)
    inner, outer = split(model)
    groups = [{"params": inner, "lr": 0.1}, {"params": outer, "weight_decay": 0.4}]
    found = rates(model, quiet(model, groups=groups))
    assert found.keys() == trainable(model)
    assert found["blocks.0.gate.weight"] == pytest.approx((0.025, 0.2))
    assert found["blocks.0.norm_attention.weight"] == (0.1, 0.0)
    assert found["head.weight"] == pytest.approx((0.005, 0.8))
    assert found["embedding.weight"] == (0.02, 0.0)


def test_own_names_and_settings_are_kept():
    model = LlamaLM(64, layers=1)
    inner, outer = split(model)
    groups = [{"params": inner, "name": "blocks", "betas": (0.8, 0.9)}, {"params": outer, "name": "rest", "eps": 1e-5}]
    made = quiet(model, groups=groups)
    assert [(group["name"], group.get("betas"), group.get("eps")) for group in made] == [
        ("blocks matrix-like", (0.8, 0.9), None),
        ("blocks vector-like", (0.8, 0.9), None),
        ("rest matrix-like", None, 1e-5),
        ("rest vector-like", None, 1e-5),
    ]
    labels = read_by_redline(model, torch.optim.AdamW(made))
    assert labels.keys() == {group["name"] for group in made}


def test_groups_without_names_have_labels_of_their_own():
    """Or the last of them hides the others' rates from Redline."""
    model = LlamaLM(64, layers=1)
    inner, outer = split(model)
    optimizer = torch.optim.AdamW(quiet(model, groups=[{"params": inner, "lr": 0.1}, {"params": outer}]))
    assert sorted(read_by_redline(model, optimizer).values()) == pytest.approx([0.005, 0.02, 0.025, 0.1])


def test_own_groups_are_not_changed():
    model = LlamaLM(64, layers=1)
    inner, outer = split(model)
    groups = [{"params": inner, "lr": 0.1, "betas": [0.9, 0.95]}, {"params": outer}]
    before = [dict(group) for group in groups]
    quiet(model, groups=groups)
    assert groups == before
    assert all(group["params"] is kept["params"] for group, kept in zip(groups, before, strict=True))


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(lambda model: [{"params": model.parameters()}], id="a generator"),
        pytest.param(lambda model: ({"params": p} for p in model.parameters()), id="single tensors"),
        pytest.param(lambda model: ({"params": list(split(model)[k])} for k in (0, 1)), id="a generator of groups"),
        pytest.param(lambda model: [{"params": tuple(model.parameters())}], id="a tuple"),
        pytest.param(lambda model: [{"params": list(model.named_parameters())}], id="with names, as torch allows"),
        pytest.param(lambda model: torch.optim.AdamW(model.parameters(), lr=9.0).param_groups, id="of an optimizer"),
    ],
)
def test_parameters_may_be_given_as_torch_takes_them(given: Callable[[nn.Module], Any]):
    model = LlamaLM(64, layers=1)
    made = quiet(model, groups=given(model))
    found = rates(model, torch.optim.AdamW(made).param_groups)
    assert found.keys() == trainable(model)
    assert found["head.weight"][0] in (pytest.approx(0.005), pytest.approx(9.0 / 4))


def test_groups_of_an_optimizer_keep_its_settings():
    model = LlamaLM(64, layers=1)
    tuned = torch.optim.AdamW(model.parameters(), lr=0.04, weight_decay=0.3, betas=(0.8, 0.9), amsgrad=True)
    made = torch.optim.AdamW(quiet(model, groups=tuned.param_groups))
    assert [(group["lr"], group["weight_decay"], group["betas"], group["amsgrad"]) for group in made.param_groups] == [
        (0.01, 0.6, (0.8, 0.9), True),
        (0.04, 0.0, (0.8, 0.9), True),
    ]


def test_a_schedule_on_groups_of_a_scheduled_optimizer_starts_from_the_scaled_rates():
    """A scheduler leaves ``initial_lr`` in the groups, and the next one starts from what it finds there."""
    model = LlamaLM(64, layers=1)
    tuned = torch.optim.AdamW(model.parameters(), lr=0.02)
    torch.optim.lr_scheduler.LambdaLR(tuned, lambda step: 1.0)
    optimizer = torch.optim.AdamW(quiet(model, groups=tuned.param_groups))
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.005, 0.02])


def test_groups_of_an_optimizer_that_knows_names_keep_each_its_own():
    model = LlamaLM(64, layers=1)
    tuned = torch.optim.AdamW(model.named_parameters(), lr=0.02)
    optimizer = torch.optim.AdamW(quiet(model, groups=tuned.param_groups))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        if "param_names" in group:
            assert group["param_names"] == [names[id(parameter)] for parameter in group["params"]]


def test_frozen_parameters_of_own_groups_are_left_out():
    model = LlamaLM(64, layers=1)
    model.embedding.requires_grad_(False)
    found = rates(model, quiet(model, groups=[{"params": model.parameters()}]))
    assert found.keys() == trainable(model)


def test_a_part_of_the_model_may_be_in_no_group():
    model = LlamaLM(64, layers=1)
    assert rates(model, quiet(model, groups=[{"params": model.head.parameters()}])).keys() == {"head.weight"}
    assert quiet(model, groups=[]) == []
    assert quiet(model, groups=[{"params": []}]) == []


@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_however_the_model_is_split_each_parameter_is_scaled_once_and_by_its_kind(data: st.DataObject):
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Conv1d(1, 2, 3), nn.Linear(8, 2))
    for parameter in model.parameters():
        parameter.requires_grad_(data.draw(st.booleans()))
    owner = [data.draw(st.integers(0, 2)) for _ in model.parameters()]
    parts = [[p for p, mine in zip(model.parameters(), owner, strict=True) if mine == k] for k in range(3)]
    own = [0.1, 0.2, 0.3]
    groups = [{"params": part, "lr": lr} for part, lr in zip(parts, own, strict=True)]
    found = rates(model, quiet(model, base_width=1, width=4, groups=groups))
    expected = {}
    for (name, parameter), mine in zip(model.named_parameters(), owner, strict=True):
        if parameter.requires_grad:
            matrix = name in {"1.weight", "4.weight"}
            expected[name] = (own[mine] / 4, 0.2) if matrix else (own[mine], 0.0)
    assert found == {name: pytest.approx(pair) for name, pair in expected.items()}
