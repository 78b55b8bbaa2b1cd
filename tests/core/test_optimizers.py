"""Optimizers: what is behind wrappers, what may only be watched, gradients' norms, and snapshots of state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.optim import Optimizer

from redline import ConfigurationError
from redline.optimizers import (
    OptimizerState,
    gradient_norm,
    numbered,
    optimizer_labels,
    raw_optimizers,
    refuse_flat_parameters,
    refuse_in_backward,
    watch_only_reason,
)


def sgd(**options: Any) -> torch.optim.SGD:
    return torch.optim.SGD([nn.Parameter(torch.ones(3))], 0.1, **options)


# Wrappers and labels ----------------------------------------------------------------------------------


class LightningOptimizer:
    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer


class AcceleratedOptimizer(LightningOptimizer):
    pass


class _FabricOptimizer(LightningOptimizer):
    pass


def test_optimizers_are_taken_out_of_their_wrappers() -> None:
    one, other = sgd(), sgd()
    assert raw_optimizers(one) == [one]
    assert raw_optimizers([one, other]) == [one, other]
    assert raw_optimizers((LightningOptimizer(one), _FabricOptimizer(other))) == [one, other]  # type: ignore[arg-type]
    assert raw_optimizers(AcceleratedOptimizer(LightningOptimizer(one))) == [one]  # type: ignore[arg-type]


class FabricSGD(_FabricOptimizer, torch.optim.SGD):
    """Fabric and Lightning make a class like this for each wrapper; it passes for the optimizer itself."""


def test_optimizers_are_taken_out_of_wrappers_that_pass_for_them() -> None:
    one = sgd()
    assert raw_optimizers(FabricSGD(one)) == [one]  # type: ignore[arg-type]


class DeepSpeedOptimizerWrapper(AcceleratedOptimizer):
    pass


class MegatronLMOptimizerWrapper(AcceleratedOptimizer):
    pass


@pytest.mark.parametrize(
    ("wrapper", "name"), [(DeepSpeedOptimizerWrapper, "DeepSpeed"), (MegatronLMOptimizerWrapper, "Megatron-LM")]
)
def test_engines_are_refused_by_name(wrapper: Any, name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"got a run that {name} trains; expected .* Train with DDP"):
        raw_optimizers(wrapper(sgd()))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "got 0 optimizers, none or one twice"),
        ("SGD", "got a str as optimizer; expected a torch.optim.Optimizer"),
        (nn.Linear(2, 2), "got a Linear as optimizer; .* Engines that step by themselves"),
        ([None], "got a NoneType as optimizer"),
        (LightningOptimizer("DeepSpeed"), "got a str as optimizer"),
    ],
)
def test_what_is_no_optimizer_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        raw_optimizers(given)


def test_same_optimizer_twice_is_refused_in_its_wrapper_too() -> None:
    one = sgd()
    with pytest.raises(ConfigurationError, match="got 2 optimizers, none or one twice"):
        raw_optimizers([one, LightningOptimizer(one)])  # type: ignore[list-item]


def test_labels_are_numbered_where_they_occur_again() -> None:
    assert numbered(["A", "B", "A", "A", "B"]) == ["A", "B", "A-2", "A-3", "B-2"]
    assert numbered([]) == []
    assert optimizer_labels([sgd(), sgd()]) == ["SGD", "SGD-2"]


def test_optimizer_in_backward_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    refuse_in_backward(model)
    _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.1})
    with pytest.raises(ConfigurationError, match=r"got '0\.weight' with an optimizer applied in backward"):
        refuse_in_backward(model)


def test_flat_parameters_are_refused_by_name():
    class FullyShardedDataParallel(nn.Module):
        """Torch's own needs a process group."""

    refuse_flat_parameters(nn.Linear(2, 2))
    with pytest.raises(ConfigurationError, match=r"FullyShardedDataParallel around the model.* no matrix is left"):
        refuse_flat_parameters(FullyShardedDataParallel())
    with pytest.raises(ConfigurationError, match=r"FullyShardedDataParallel at '1\.0'"):
        refuse_flat_parameters(nn.Sequential(nn.Linear(2, 2), nn.Sequential(FullyShardedDataParallel())))


# Watch only -------------------------------------------------------------------------------------------


def stepped(optimizer: Optimizer, steps: int = 2) -> Optimizer:
    for step in range(steps):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.full_like(parameter, 0.3 + step)
        optimizer.step(lambda: torch.tensor(1.0))
    return optimizer


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.Adam(p, 0.1, amsgrad=True),
        lambda p: torch.optim.AdamW(p, 0.1, fused=True),
        lambda p: torch.optim.RMSprop(p, 0.1, centered=True, momentum=0.9),
        lambda p: torch.optim.Adagrad(p),
        lambda p: torch.optim.Adafactor(p),
        lambda p: torch.optim.Muon(p),
        lambda p: torch.optim.NAdam(p),
    ],
)
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_ordinary_optimizers_may_be_controlled(make: Any, steps: int) -> None:
    parameters = [nn.Parameter(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))]
    assert watch_only_reason(stepped(make(parameters), steps)) is None


def test_lbfgs_may_be_watched_only() -> None:
    reason = watch_only_reason(torch.optim.LBFGS([nn.Parameter(torch.ones(3))]))
    assert reason is not None
    assert "LBFGS moves the parameters many times within one step" in reason


@pytest.mark.parametrize("name", ["Lookahead", "AdamWScheduleFree", "SGDScheduleFree", "FP16_Optimizer"])
def test_classes_known_to_keep_shadow_weights_may_be_watched_only(name: str) -> None:
    optimizer = type(name, (torch.optim.SGD,), {})([nn.Parameter(torch.ones(3))], 0.1)
    reason = watch_only_reason(optimizer)
    assert reason is not None
    assert f"{name} keeps shadow weights" in reason


@pytest.mark.parametrize("key", ["master_param", "slow_buffer", "z"])
def test_known_keys_of_shadow_weights_are_found(key: str) -> None:
    optimizer = stepped(sgd(momentum=0.9))
    (parameter,) = optimizer.state
    optimizer.state[parameter][key] = torch.randn(3)
    reason = watch_only_reason(optimizer)
    assert reason is not None
    assert repr(key) in reason


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_master_weights_are_found_under_any_key(dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.randn(5, 4).to(dtype))
    optimizer = torch.optim.SGD([parameter], 0.1)
    precise = parameter.detach().float() * (1 + 1e-5)
    optimizer.state[parameter]["anything"] = precise
    reason = watch_only_reason(optimizer)
    assert reason is not None
    assert "'anything'" in reason
    optimizer.state[parameter]["anything"] = precise + 1
    assert watch_only_reason(optimizer) is None


# Gradient norm ----------------------------------------------------------------------------------------


def with_gradients(*gradients: Tensor | None) -> list[Tensor]:
    parameters: list[Tensor] = []
    for gradient in gradients:
        parameter = nn.Parameter(torch.zeros(3 if gradient is None else gradient.shape).to(_dtype(gradient)))
        parameter.grad = gradient
        parameters.append(parameter)
    return parameters


def _dtype(gradient: Tensor | None) -> torch.dtype:
    return torch.float32 if gradient is None else gradient.dtype


def test_norm_is_that_over_all_parameters() -> None:
    gradients = [torch.randn(4, 5), torch.randn(7), torch.randn(2, 3, 4)]
    expected = torch.cat([gradient.double().flatten() for gradient in gradients]).norm()
    norm = gradient_norm(sgd(), with_gradients(*gradients, None))
    assert norm is not None
    assert norm.dim() == 0
    assert float(norm) == pytest.approx(float(expected), rel=1e-6)


def test_norm_without_gradients_is_none() -> None:
    assert gradient_norm(sgd(), with_gradients(None, None)) is None
    assert gradient_norm(sgd(), []) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    gradients = [torch.full((1000,), 300.0, dtype=dtype), torch.full((100_000,), 0.01, dtype=dtype), torch.ones(5)]
    expected = torch.cat([gradient.double().flatten() for gradient in gradients]).norm()
    norm = gradient_norm(sgd(), with_gradients(*gradients))
    assert norm is not None
    assert float(norm) == pytest.approx(float(expected), rel=1e-4)


def test_sparse_gradients_count_by_their_values() -> None:
    indices = torch.tensor([[0, 2, 2]])  # row 2 twice: its parts add up first
    gradient = torch.sparse_coo_tensor(indices, torch.tensor([[3.0], [1.0], [3.0]]), (4, 1))
    norm = gradient_norm(sgd(), with_gradients(gradient))
    assert float(norm) == pytest.approx(5.0)  # type: ignore[arg-type]


def test_norm_is_unscaled_where_a_fused_optimizer_is_still_to_do_it() -> None:
    optimizer = sgd()
    optimizer.grad_scale = torch.tensor(128.0)  # type: ignore[attr-defined]
    assert float(gradient_norm(optimizer, with_gradients(torch.tensor([384.0])))) == 3.0  # type: ignore[arg-type]
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    assert float(gradient_norm(optimizer, with_gradients(torch.tensor([384.0])))) == 384.0  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_norm_of_what_is_not_finite_is_not_finite(value: float) -> None:
    norm = gradient_norm(sgd(), with_gradients(torch.ones(3), torch.tensor([value])))
    assert norm is not None
    assert not norm.isfinite()


# Snapshots of state -----------------------------------------------------------------------------------


def test_snapshot_is_put_back_in_place() -> None:
    optimizer = stepped(torch.optim.Adam([nn.Parameter(torch.ones(3))], torch.tensor(0.1)))
    (parameter,) = optimizer.state
    moment = optimizer.state[parameter]["exp_avg"]
    before = {key: value.clone() for key, value in optimizer.state[parameter].items()}
    snapshot = OptimizerState.of(optimizer)
    stepped(optimizer)
    optimizer.param_groups[0]["lr"].fill_(7.0)
    optimizer.param_groups[0]["betas"] = (0.0, 0.0)
    optimizer.state[parameter]["extra"] = 1
    optimizer.param_groups[0]["extra"] = 1
    assert not torch.equal(moment, before["exp_avg"])
    snapshot.restore(optimizer)
    assert optimizer.state[parameter]["exp_avg"] is moment, "whoever holds the tensor sees it restored"
    assert optimizer.state[parameter].keys() == before.keys()
    assert all(torch.equal(optimizer.state[parameter][key], value) for key, value in before.items())
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.1)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    assert "extra" not in optimizer.param_groups[0]
    assert optimizer.param_groups[0]["params"] == [parameter]


def test_snapshot_of_no_state_removes_what_came_since() -> None:
    optimizer = sgd(momentum=0.9)
    snapshot = OptimizerState.of(optimizer)
    stepped(optimizer)
    assert optimizer.state
    snapshot.restore(optimizer)
    assert not optimizer.state


def test_snapshot_brings_back_what_was_removed_since() -> None:
    optimizer = stepped(sgd(momentum=0.9))
    (parameter,) = optimizer.state
    before = optimizer.state[parameter]["momentum_buffer"].clone()
    snapshot = OptimizerState.of(optimizer)
    del optimizer.state[parameter]
    snapshot.restore(optimizer)
    assert torch.equal(optimizer.state[parameter]["momentum_buffer"], before)


def test_snapshot_can_be_put_back_twice() -> None:
    optimizer = stepped(sgd(momentum=0.9))
    (parameter,) = optimizer.state
    before = optimizer.state[parameter]["momentum_buffer"].clone()
    snapshot = OptimizerState.of(optimizer)
    for _ in range(2):
        stepped(optimizer)
        snapshot.restore(optimizer)
        assert torch.equal(optimizer.state[parameter]["momentum_buffer"], before)
