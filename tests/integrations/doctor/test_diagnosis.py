"""What is said of a model ahead of its run: held against the model, and against a run that is then made."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import redline
from redline.errors import ConfigurationError
from redline.integrations.doctor.diagnosis import Diagnosis, examine
from redline.integrations.doctor.subject import load


def diagnosis_of(name: str, **options: Any) -> Diagnosis:
    return examine(load(f"doctor_models:{name}", **options))


@pytest.fixture(scope="module")
def mlp() -> Diagnosis:
    return diagnosis_of("mlp", shape=(8, 12))


# What is measured ----------------------------------------------------------------------------------------------------


def test_matrices_and_the_rest(mlp: Diagnosis):
    coverage = mlp.coverage
    assert [layer.name for layer in coverage.matrices] == ["0.weight", "3.weight", "5.weight"]
    assert coverage.shapes == {(16, 16): 1, (16, 12): 1, (4, 16): 1}
    assert coverage.largest.name == "3.weight"
    assert dict(coverage.others) == {"0.bias": 16, "2.weight": 16, "2.bias": 16, "3.bias": 16, "5.bias": 4}
    assert mlp.gaps == ()


def test_what_was_said_is_what_a_run_measures(mlp: Diagnosis):
    model = copy.deepcopy(mlp.subject.model)
    optimizer = torch.optim.AdamW(model.parameters())
    with redline.attach(model, optimizer) as session:
        F.cross_entropy(model(*mlp.subject.args), torch.arange(8) % 4).backward()
        optimizer.step()
    snapshot = session.latest
    names = {layer.name for layer in mlp.coverage.matrices}
    assert set(snapshot.layers("redline_weight_spectral_norm")) == names
    assert set(snapshot.layers("redline_update_spectral_norm")) == names
    assert session.report().step_sizes.method == {mlp.tangents.method: 1}


def test_tied_frozen_unused_and_parametrized_parameters_are_told_of():
    found = diagnosis_of("Tied", shape=(4, 5), dtype="int64", high=20)
    words = " ".join(found.coverage.remarks)
    assert "head.weight is embedding.weight" in words
    assert "frozen.weight, frozen.bias" in words
    assert "normed" in words
    assert set(found.costs.unmoved) == {"unused.weight", "unused.bias"}
    assert [layer.name for layer in found.coverage.matrices].count("embedding.weight") == 1


def test_what_cannot_be_measured_is_a_gap():
    found = diagnosis_of("Quantized", shape=(4, 12))
    assert len(found.gaps) == 1
    assert "codes is torch.int8" in found.gaps[0]
    assert "codes" not in dict(found.coverage.others)
    assert "No weight matrix was found" in diagnosis_of("vectors_only", shape=(4, 12)).gaps[0]


def test_lazy_parameters_are_initialized_on_the_copy():
    subject = load("doctor_models:Lazy", shape=(4, 12))
    assert [layer.name for layer in examine(subject).coverage.matrices] == ["inner.weight"]
    assert isinstance(subject.model.inner.weight, nn.parameter.UninitializedParameter)


# How r is taken ------------------------------------------------------------------------------------------------------


def test_forward_mode_is_used_where_it_works_and_agrees_with_the_difference(mlp: Diagnosis):
    forward, math, difference = mlp.tangents.trials
    assert mlp.tangents.method == forward.method == "forward_mode"
    assert forward.error < 0.02
    assert (forward.works, math.works, difference.works) == (True, True, True)
    assert mlp.tangents.logits == (8, 4)


@pytest.mark.parametrize(
    ("name", "options", "method", "reason"),
    [
        ("language_model", {"shape": (4, 8), "dtype": "int64", "high": 256}, "math_attention", "scaled_dot_product"),
        ("Recurrent", {"shape": (4, 5, 6)}, "math_attention", "mkldnn"),
        ("CustomKernel", {"shape": (4, 12)}, "finite_difference", "jvp"),
    ],
)
def test_the_rung_that_works_is_the_one_a_run_uses(name: str, options: dict[str, Any], method: str, reason: str):
    found = diagnosis_of(name, **options)
    assert found.tangents.method == method
    first = found.tangents.trials[0]
    assert not first.works
    assert reason in first.reason
    fallbacks = found.costs.snapshot.series("redline_tangent_fallbacks_total")
    assert [labels[0] for labels, count in fallbacks.items() if count] == [method]
    assert found.gaps == ()


def test_batch_norm_is_said_to_need_the_whole_batch():
    found = diagnosis_of("batch_norm", shape=(40, 12))
    assert any("whole batch" in remark for remark in found.coverage.remarks)
    assert found.costs.snapshot.value("redline_tangent_samples") == 40


def test_logits_of_a_callable_and_keyword_inputs():
    found = diagnosis_of("KeywordsOnly", inputs="doctor_models:keyword_inputs", logits="doctor_models:second")
    assert (found.tangents.logits, found.gaps) == ((8, 4), ())


def test_a_mask_of_positions_is_told_of(mlp: Diagnosis):
    logits = "doctor_models:second_and_mask"
    found = diagnosis_of("KeywordsOnly", inputs="doctor_models:keyword_inputs", logits=logits)
    assert (found.tangents.masked, mlp.tangents.masked, found.gaps) == (True, False, ())


def test_a_single_logit_works():
    assert diagnosis_of("OneLogit", shape=(8, 12)).gaps == ()


# What it costs -------------------------------------------------------------------------------------------------------


def test_costs_are_those_of_each_default_monitor_on_its_schedule(mlp: Diagnosis):
    costs = {cost.what: cost for cost in mlp.costs.costs}
    assert list(costs)[:4] == [type(monitor).__name__ for monitor in redline.monitors.default_monitors()]
    assert [cost.per_step for cost in mlp.costs.costs[:4]] == [0.02, 0.02, 0.02, 1.0]
    assert all(cost.seconds > 0 for cost in mlp.costs.costs[:4])
    assert mlp.costs.plain > 0
    assert mlp.costs.share == pytest.approx(sum(c.seconds * c.per_step for c in costs.values()) / mlp.costs.plain)


def test_memory_is_that_of_the_copies(mlp: Diagnosis):
    size = sum(parameter.numel() for parameter in mlp.subject.model.parameters())
    memory = mlp.memory
    assert memory.parameters == memory.controlled_step == 4 * size
    assert memory.due_step == 2 * 4 * size + 4 * 8 * 12
    tensors = len(list(mlp.subject.model.parameters()))
    assert memory.snapshot == 3 * 4 * size + 4 * tensors  # AdamW counts steps in a float32 a parameter


def test_what_is_kept_between_steps_is_what_a_session_keeps():
    found = diagnosis_of("mlp", shape=(64, 12))
    assert found.memory.between_steps == 4 * 12 * 4  # the four samples that bound, of 12 float32; the rest is small


def test_half_precision_updates_are_wide():
    subject = load("doctor_models:mlp", shape=(8, 12), dtype="bfloat16")
    subject.model.bfloat16()
    found = examine(subject)
    size = sum(parameter.numel() for parameter in subject.model.parameters())
    assert found.memory.due_step == (2 + 4) * size + 2 * 8 * 12
    assert found.memory.controlled_step == 2 * size


# Left alone, and refused ---------------------------------------------------------------------------------------------


def test_the_model_and_random_numbers_are_left_alone():
    subject = load("doctor_models:batch_norm", shape=(8, 12))
    subject.model.eval()
    before = copy.deepcopy(subject.model.state_dict())
    random = torch.get_rng_state()
    inputs = subject.args[0].clone()
    examine(subject)
    assert all(torch.equal(value, before[name]) for name, value in subject.model.state_dict().items())
    assert not subject.model.training
    assert all(parameter.grad is None for parameter in subject.model.parameters())
    assert not subject.model._forward_pre_hooks
    assert torch.equal(subject.args[0], inputs)
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mlp", {"shape": (8, 11)}, "calling Sequential on its example inputs failed with RuntimeError: mat1 and mat2"),
        ("KeywordsOnly", {"inputs": "doctor_models:keyword_inputs"}, "got a str as logits; .*--logits"),
        ("Frozen", {"shape": (8, 12)}, "without a parameter that requires gradients"),
    ],
)
def test_what_cannot_work_is_refused(name: str, options: dict[str, Any], message: str):
    with pytest.raises(ConfigurationError, match=message):
        diagnosis_of(name, **options)


def test_a_model_that_cannot_be_trained_is_a_gap_and_the_rest_is_still_told():
    found = diagnosis_of("NoGradient", shape=(8, 12))
    assert found.costs is None
    assert found.memory.between_steps is None
    assert "a step of training on the example batch failed with RuntimeError" in found.gaps[0]
    assert len(found.coverage.matrices) == 1
