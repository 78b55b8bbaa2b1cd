"""What Redline has to know of optimizers: which may only be watched, their labels, a snapshot of their state."""

from __future__ import annotations

import copy
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from redline.errors import ConfigurationError
from redline.host_copy import moved_to
from redline.ranks import Ranks
from redline.sharding import Sharding, is_sharded, local_part, together

# Wrappers whose inner optimizer is where steps really happen. Lightning and Fabric derive a class from these for each.
_WRAPPERS = {"LightningOptimizer", "_FabricOptimizer", "AcceleratedOptimizer"}

# What stands where an optimizer would, while an engine steps by itself.
_ENGINES = {
    "DeepSpeedOptimizerWrapper": "DeepSpeed",
    "DummyOptim": "DeepSpeed",
    "MegatronLMOptimizerWrapper": "Megatron-LM",
}

# Optimizers that keep the weights a second time and write the parameters from there: a control would be undone.
_SHADOW_CLASSES = (
    "Lookahead",
    "ScheduleFree",
    "FP16_Optimizer",
    "MixedPrecisionOptimizer",
    "FP16Optimizer",
    "BF16_Optimizer",
)
_SHADOW_STATE = ("master_param", "master_params", "master_weight", "slow_param", "slow_params", "slow_buffer", "z")


def raw_optimizers(optimizer: Optimizer | Sequence[Optimizer]) -> list[Optimizer]:
    """The optimizers behind the wrappers of Lightning, Fabric and accelerate.

    Raises:
        ConfigurationError: no optimizer, the same one twice, an engine's, or something that is no torch optimizer.
    """
    given = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
    found: list[Optimizer] = []
    for one in given:
        while classes := {base.__name__ for base in type(one).__mro__} & {*_WRAPPERS, *_ENGINES}:
            if engines := classes & set(_ENGINES):
                refuse_engine(_ENGINES[engines.pop()])
            one = one.optimizer  # type: ignore[attr-defined]
        if not isinstance(one, Optimizer):
            raise ConfigurationError(
                f"got a {type(one).__name__} as optimizer; expected a torch.optim.Optimizer, whose step hooks Redline "
                "uses. Engines that step by themselves (DeepSpeed) cannot be attached to."
            )
        found.append(one)
    if not found or len({id(one) for one in found}) < len(found):
        raise ConfigurationError(
            f"got {len(found)} optimizers, none or one twice; expected one, or a list of distinct ones."
        )
    return found


def refuse_engine(name: str) -> NoReturn:
    """Refuse an engine that steps by itself.

    Raises:
        ConfigurationError: always.
    """
    raise ConfigurationError(
        f"got a run that {name} trains; expected one whose torch.optim.Optimizer takes the steps: {name} moves the "
        "parameters from within its own engine, past the optimizer's hooks, and often from copies in another "
        "precision. Train with DDP to measure it."
    )


def refuse_in_backward(model: nn.Module) -> None:
    """Refuse optimizers that step inside backward, one a parameter: there is no step to watch.

    Raises:
        ConfigurationError: if the model has any.
    """
    for name, parameter in model.named_parameters():
        if getattr(parameter, "_in_backward_optimizers", None):
            raise ConfigurationError(
                f"got {name!r} with an optimizer applied in backward; expected optimizers that step after it: with one "
                "step a parameter there is no joint step to measure."
            )


def refuse_flat_parameters(model: nn.Module) -> None:
    """Refuse ``FullyShardedDataParallel``, which flattens the parameters of a unit into one.

    Raises:
        ConfigurationError: if the model is one, or has one in it.
    """
    for name, module in model.named_modules():
        if any(base.__name__ == "FullyShardedDataParallel" for base in type(module).__mro__):
            raise ConfigurationError(
                f"got FullyShardedDataParallel {f'at {name!r}' if name else 'around the model'}; expected parameters "
                "that keep their shapes: it flattens those of a unit into one vector and cuts that up, so that no "
                "matrix is left to measure. Use fully_shard (FSDP2), which shards each parameter by itself."
            )


def watch_only_reason(optimizer: Optimizer) -> str | None:
    """Why this optimizer may be monitored but not controlled, or None."""
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        return "LBFGS moves the parameters many times within one step, and its line search would not see the control"
    if any(known in name for known in _SHADOW_CLASSES):
        return f"{name} keeps shadow weights and writes the parameters from them, which would undo the control"
    for parameter, state in optimizer.state.items():
        for key, value in state.items() if isinstance(state, dict) else ():
            if key in _SHADOW_STATE or _is_master(value, parameter):
                return (
                    f"{name} keeps shadow weights (state {key!r}) and writes the parameters from them, which would "
                    "undo the control"
                )
    return None


def _is_master(value: Any, parameter: Any) -> bool:
    """Whether a state tensor is the parameter in a wider type, from which it is rounded after each step."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape or value.dim() == 0 or not value.any():
        return False
    return value.dtype.itemsize > parameter.dtype.itemsize and torch.equal(
        value.to(parameter.dtype), parameter.detach()
    )


def optimizer_labels(optimizers: Sequence[Optimizer]) -> list[str]:
    """A label each: the class name, numbered where it occurs twice."""
    return numbered([type(optimizer).__name__ for optimizer in optimizers])


def numbered(names: Sequence[str]) -> list[str]:
    """The names, with ``-2``, ``-3``, ... behind those that occur again."""
    return [
        name if (seen := names[:i].count(name)) == 0 else f"{name}-{seen + 1}" for i, name in enumerate(list(names))
    ]


def gradient_norm(optimizer: Optimizer, parameters: Iterable[Tensor], ranks: Ranks | None = None) -> Tensor | None:
    """L2 norm of the gradients, 0-d, or None if there are none; of DTensors over all of their parts.

    Sparse gradients count by their values; half precision is summed in float32; what a fused optimizer still has to
    unscale under AMP is unscaled.

    Args:
        optimizer: whose gradients they are.
        parameters: that have them.
        ranks: of the run.
    """
    parameters = list(parameters)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if any(map(is_sharded, parameters)):
        norm: Tensor | None = _norm_over(gradients, ranks or Ranks(), local_part(parameters[0]).device)
    else:
        norm = _norm([gradient.detach() for gradient in gradients])
    scale = getattr(optimizer, "grad_scale", None)
    return norm if norm is None or scale is None else norm / scale.to(norm.device)


def _norm_over(gradients: Iterable[Tensor], ranks: Ranks, device: torch.device) -> Tensor:
    parts: dict[float, list[Tensor]] = defaultdict(list)  # by what they count in the sum over ranks
    for gradient in gradients:
        sharding = Sharding.of(gradient, ranks.size) if is_sharded(gradient) else None
        part = local_part(gradient)
        parts[1 / ranks.size if sharding is None else sharding.share].append(
            part if sharding is None else sharding.summed(part)
        )
    squares = [share * norm.double().square() for share, some in parts.items() if (norm := _norm(some)) is not None]
    return ranks.total(moved_to(together(squares).sum().double(), device)).sqrt()


def _norm(gradients: Iterable[Tensor]) -> Tensor | None:
    dense = [g.coalesce().values() if g.layout == torch.sparse_coo else g for g in gradients]
    wide = [g for g in dense if g.dtype not in (torch.float16, torch.bfloat16)]
    norms = [
        torch.linalg.vector_norm(g, dtype=torch.float32) for g in dense if g.dtype in (torch.float16, torch.bfloat16)
    ]
    if wide:
        norms.append(torch.nn.utils.get_total_norm(wide))
    return joint_norm(norms)


def joint_norm(norms: Iterable[Tensor]) -> Tensor | None:
    """L2 norm of several parts, 0-d, or None of none."""
    parts = list(norms)
    return parts[0] if len(parts) == 1 else torch.nn.utils.get_total_norm(parts) if parts else None


def is_stepped_by_scaler() -> bool:
    """Whether a GradScaler is what calls the optimizer: gradients that are not finite are its to skip.

    It leaves no mark on optimizers that are not fused, so the calls that lead here are looked at.
    """
    frame, step = sys._getframe(), torch.amp.GradScaler.step.__code__
    while (caller := frame.f_back) is not None:
        frame = caller
        if frame.f_code is step:
            return bool(frame.f_locals["self"].is_enabled())
    return False


@dataclass
class OptimizerState:
    """A snapshot of an optimizer's state and group settings, to be put back.

    Attributes:
        state: by the parameter's place in the groups, counted through; entries under other keys by their own key.
        groups: settings of each group, but for the parameters.
    """

    state: dict[Any, Any]
    groups: list[dict[str, Any]]

    @classmethod
    def of(cls, optimizer: Optimizer, copy_leaf: Callable[[Any], Any] | None = None) -> OptimizerState:
        """Take a snapshot, of DTensors this rank's part; ``copy_leaf`` makes a copy of a tensor or of anything else."""
        make = copy_leaf or copy_of

        def copied(leaf: Any) -> Any:
            return make(local_part(leaf) if isinstance(leaf, Tensor) and is_sharded(leaf) else leaf)

        places = {parameter: place for place, parameter in enumerate(_parameters(optimizer))}
        return cls(
            {places.get(key, key): tree_map(copied, value) for key, value in optimizer.state.items()},
            [{k: copied(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
        )

    def restore(self, optimizer: Optimizer, *, groups: bool = True) -> None:
        """Put it back: tensors in place where they are still there, entries created since removed.

        Args:
            optimizer: the one it was taken of.
            groups: whether the group settings come back too.
        """
        parameters = _parameters(optimizer)
        kept = {parameters[key] if isinstance(key, int) else key: value for key, value in self.state.items()}
        for key in [key for key in optimizer.state if key not in kept]:
            del optimizer.state[key]
        for key, value in kept.items():
            if isinstance(value, dict):
                _restore(optimizer.state[key], value, key)
            else:
                optimizer.state[key] = copy_of(value)
        for group, settings in zip(optimizer.param_groups, self.groups, strict=False) if groups else ():
            _restore(group, settings, None, spare=("params",))


def copy_of(value: Any) -> Any:
    """A copy of a tensor, where it is, or of anything else."""
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _restore(current: dict[Any, Any], kept: dict[Any, Any], owner: Any, spare: tuple[str, ...] = ()) -> None:
    for key in [key for key in current if key not in kept and key not in spare]:
        del current[key]
    for key, value in kept.items():
        present = current.get(key)
        here = local_part(present) if isinstance(present, Tensor) else None
        if isinstance(value, Tensor) and here is not None and here.shape == value.shape:
            here.copy_(value)
        elif isinstance(value, Tensor) and isinstance(owner, Tensor) and value.dim():
            moved = value.to(owner.device, copy=True)
            current[key] = Sharding.of(owner, 1).whole(moved) if is_sharded(owner) else moved
        else:
            current[key] = copy_of(value)  # the snapshot may be put back again
