"""One step of a given length along a given direction: its ghost radius, and the logits after it.

Symbols: ``v`` a direction in the parameters, of norm 1; ``tau`` the step's length; ``rho_a`` its ghost radius.
Models are called in the mode they are in and are left as they were, BatchNorm's running averages included.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from redline.numerics import ghost_radius, logit_tangent

Direction = dict[str, Tensor]  # {parameter name: tensor of its shape}


def log_grid(low: int, high: int, per_decade: int) -> list[float]:
    """From ``10**low`` to ``10**high``; whole powers of ten are on it."""
    return [float(f"{10 ** (k / per_decade):.6g}") for k in range(low * per_decade, high * per_decade + 1)]


def unit(tensors: Direction) -> Direction:
    norm = torch.nn.utils.get_total_norm(list(tensors.values()))
    return {name: tensor / norm for name, tensor in tensors.items()}


def descent(model: nn.Module, x: Tensor, y: Tensor, temperature: float = 1.0) -> Direction:
    """``v = -grad / |grad|`` of the cross-entropy of ``logits / temperature``."""
    parameters = dict(model.named_parameters())
    loss = F.cross_entropy(_logits(model, parameters, x) / temperature, y)
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return unit({name: -gradient for name, gradient in zip(parameters, gradients, strict=True)})


def radius(model: nn.Module, x: Tensor, direction: Direction) -> float:
    """``rho_a = pi / max_x Delta_a(x; v)``: the ``tau`` at which a step along ``v`` has ``r = 1``."""
    return ghost_radius(logit_tangent(model, (x,), None, direction).tangent).min().item()


@torch.no_grad()
def logits_after(model: nn.Module, x: Tensor, direction: Direction, tau: float) -> Tensor:
    """Logits at ``theta + tau * v``."""
    return _logits(model, {name: p + tau * direction[name] for name, p in model.named_parameters()}, x)


def _logits(model: nn.Module, parameters: Direction, x: Tensor) -> Tensor:
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}  # BatchNorm's averages would move
    return functional_call(model, {**parameters, **buffers}, (x,))


def accuracy(logits: Tensor, y: Tensor) -> float:
    return (logits.argmax(-1) == y).double().mean().item()


def first(grid: Sequence[float], values: Sequence[float], holds: Callable[[float], bool]) -> float | None:
    """The smallest point of the grid at which it holds of the value; None where it never does."""
    return next((point for point, value in zip(grid, values, strict=True) if holds(value)), None)
