"""Taking a logit tangent changes nothing of the model, the random streams or the flags."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tangent_cases import CASES, CLASSES, build, random_direction
from torch import Tensor, nn

from redline.numerics import logit_tangent


def footprint(model: nn.Module) -> dict[str, Any]:
    """Everything that taking a tangent could disturb."""
    backends = torch.backends
    return {
        **{f"parameter {n}": p.detach().clone() for n, p in model.named_parameters()},
        **{f"gradient {n}": None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        **{f"identity {n}": (id(p), p.data_ptr(), p.requires_grad) for n, p in model.named_parameters()},
        **{f"buffer {n}": b.clone() for n, b in model.named_buffers()},
        **{f"mode {n}": m.training for n, m in model.named_modules()},
        **{f"attributes {n}": sorted(vars(m)) for n, m in model.named_modules()},
        "torch stream": torch.get_rng_state(),
        "numpy stream": [torch.as_tensor(np.random.get_state()[1].astype(np.int64)), *np.random.get_state()[2:]],  # noqa: NPY002
        "python stream": random.getstate(),
        "gradients enabled": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "attention fast path": backends.mha.get_fastpath_enabled(),
        "oneDNN": (backends.mkldnn.enabled, backends.mkldnn.deterministic, backends.mkldnn.allow_tf32),
        "attention kernels": (
            backends.cuda.flash_sdp_enabled(),
            backends.cuda.mem_efficient_sdp_enabled(),
            backends.cuda.math_sdp_enabled(),
            backends.cuda.cudnn_sdp_enabled(),
        ),
        "cuDNN": (backends.cudnn.enabled, backends.cudnn.benchmark, backends.cudnn.deterministic),
        "precision of matrix products": torch.get_float32_matmul_precision(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_untouched(before: dict[str, Any], model: nn.Module) -> None:
    after = footprint(model)
    assert before.keys() == after.keys()
    assert [key for key in before if not same(before[key], after[key])] == []


class TestNothingIsChanged:
    @pytest.mark.parametrize("method", ["auto", "math_attention", "finite_difference"])
    @pytest.mark.parametrize("name", [name for name in CASES if CASES[name].method != "finite_difference"])
    def test_of_the_model_the_streams_or_the_flags(self, name, method):
        model, x = build(name)
        for i, module in enumerate(
            model.modules()
        ):  # modes, gradients and requires_grad as a bare train() would lose them
            module.training = i % 3 != 2
        for i, parameter in enumerate(model.parameters()):
            parameter.requires_grad_(i % 2 == 0)
            parameter.grad = torch.ones_like(parameter) if i % 4 == 0 else None
        before, kept = footprint(model), x.clone()
        logit_tangent(model, (x,), {}, random_direction(model), method=method)
        assert_untouched(before, model)
        assert torch.equal(x, kept)

    @pytest.mark.parametrize("method", ["auto", "finite_difference"])
    def test_of_running_statistics(self, method):
        model, x = build("cnn with BatchNorm")
        logit_tangent(model, (x,), {}, random_direction(model), method=method)
        assert int(model[1].num_batches_tracked) == 0
        assert not model[1].running_mean.any()

    @pytest.mark.parametrize("method", ["auto", "finite_difference"])
    def test_of_flags_that_the_user_has_set(self, method):
        model, x = build("lstm")
        fast_path, flash = torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        torch.backends.cuda.enable_flash_sdp(False)
        try:
            with torch.no_grad():
                before = footprint(model)
                logit_tangent(model, (x,), {}, random_direction(model), method=method)
                assert_untouched(before, model)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
            torch.backends.cuda.enable_flash_sdp(flash)

    @pytest.mark.parametrize("method", ["auto", "math_attention", "finite_difference"])
    def test_when_it_fails(self, method):
        model, x = build("transformer")
        before = footprint(model)

        def failing(output):
            random.random()
            np.random.rand()  # noqa: NPY002
            torch.rand(3)
            raise ZeroDivisionError("in the callable")

        with pytest.raises(ZeroDivisionError, match="in the callable"):
            logit_tangent(model, (x,), {}, random_direction(model), logits=failing, method=method)
        assert_untouched(before, model)

    def test_and_training_goes_on_as_if_it_had_not_been_taken(self):
        losses = []
        for watched in (False, True):
            model, x = build("transformer")
            torch.manual_seed(5)
            optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
            course = []
            for _ in range(4):
                loss = F.cross_entropy(model(x), torch.arange(8) % CLASSES)
                loss.backward()
                if watched:
                    logit_tangent(model, (x,), {}, random_direction(model))
                optimizer.step()
                optimizer.zero_grad()
                course.append(loss.item())
            losses.append(course)
        assert losses[0] == losses[1]
        assert not math.isnan(losses[0][-1])
