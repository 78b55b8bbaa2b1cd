"""Names of parameters, and the matrices among them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from redline.errors import ConfigurationError
from redline.host_copy import is_on_host, moved_to
from redline.matrix_shards import why_unmeasurable
from redline.notes import Notes
from redline.numerics.names import plain_name
from redline.optimizers import optimizer_labels

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class MatrixLayer:
    """One matrix to measure: a parameter, or one matrix of a stack of them.

    Attributes:
        name: the label ``layer``: the parameter's qualified name without what wrappers put into it, ``name[e]`` for
            matrix ``e`` of a stack.
        parameter: that name alone.
        d_out: rows.
        d_in: columns; all the input channels and taps of a convolution.
        index: place in the stack, or None.
        stack: shape of the stack.
        transposed: a transposed convolution, whose parameter has its inputs first.
    """

    name: str
    parameter: str
    d_out: int
    d_in: int
    index: int | None = None
    transposed: bool = False
    stack: tuple[int, ...] = ()

    def of(self, tensor: Tensor) -> Tensor:
        """The ``(d_out, d_in)`` view of a tensor of the parameter's shape: the weight itself, or its update."""
        tensor = tensor.detach()
        if self.index is not None:
            tensor = tensor.reshape(-1, self.d_out, self.d_in)[self.index]
        if self.transposed:
            tensor = tensor.transpose(0, 1)
        return tensor.reshape(self.d_out, self.d_in)


def fans(layers: Sequence[MatrixLayer], like: Tensor) -> Tensor:
    """``sqrt(d_out / d_in)`` of each layer, ``(n,)``, on the device and in the dtype of ``like``, without waiting."""
    values = [(layer.d_out / layer.d_in) ** 0.5 for layer in layers]
    return torch.tensor(values, dtype=like.dtype).to(like.device, non_blocking=True)


def by_parameter(
    layers: Sequence[MatrixLayer],
    numbers: Tensor,
    default: Callable[[str], float | Tensor],
) -> dict[str, float | Tensor]:
    """A number a matrix, ``(n,)``, as a number a parameter, which broadcasts against the whole of it.

    Floats for numbers on the host, 0-d tensors for others, and ``(..., 1, 1)`` for a stack of matrices, where
    ``default`` stands for those that are not among the layers.
    """
    values = list(numbers.tolist() if is_on_host(numbers) else numbers)
    found: dict[str, float | Tensor] = {}
    for layer, value in zip(layers, values, strict=True):
        name = layer.parameter
        if layer.index is None:
            found[name] = value
            continue
        if name not in found:
            found[name] = _as_one_of(default(name), numbers).expand(*layer.stack, 1, 1).clone()
        torch.as_tensor(found[name]).view(-1)[layer.index] = value
    return found


def by_layer(layers: Sequence[MatrixLayer], numbers: Mapping[str, float | Tensor], like: Tensor) -> Tensor:
    """The other way round: a number a parameter as one a matrix, ``(n,)``, where and of the dtype that ``like`` is."""
    values = [
        number.reshape(-1)[layer.index or 0] if isinstance(number := numbers[layer.parameter], Tensor) and number.dim()
        else number
        for layer in layers
    ]  # fmt: skip
    if not any(isinstance(value, Tensor) for value in values):
        return torch.tensor(values, dtype=like.dtype).to(like.device, non_blocking=True)
    return torch.stack([_as_one_of(value, like) for value in values])


def _as_one_of(number: float | Tensor, like: Tensor) -> Tensor:
    return moved_to(torch.as_tensor(number, dtype=like.dtype), like)


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by their names in the model as it was before it was wrapped, which may happen at any time."""
    return {plain_name(name): parameter for name, parameter in model.named_parameters()}


def matrix_layers(model: nn.Module, notes: Notes) -> list[MatrixLayer]:
    """All matrices of the model, tied parameters once, in the order of ``named_parameters``.

    Convolutions are ``(out, in * taps)``; a 3-D parameter of any other module is a stack of matrices. Vectors (one
    dimension, or only one that is not 1) are not measured; what cannot be is noted by name.
    """
    convolutions = {
        id(parameter): isinstance(module, _TRANSPOSED)
        for module in model.modules()
        if isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED))
        for parameter in module.parameters()  # the weight, or what a parametrization makes it from
        if tuple(parameter.shape) == _kernel_shape(module)
    }
    layers: list[MatrixLayer] = []
    for name, parameter in named_parameters(model).items():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ConfigurationError(
                f"got the lazy parameter {name!r}, not initialized yet; expected one with a shape: run one forward "
                "pass before attaching."
            )
        if not parameter.is_floating_point():
            notes.add(f"{name} is {parameter.dtype}: only floating-point matrices are measured.")
            continue
        if reason := why_unmeasurable(parameter):
            notes.add(f"{name} {reason}: its spectrum is not measured.")
            continue
        layers += _layers_of(name, parameter, convolutions.get(id(parameter)))
    return layers


def _kernel_shape(module: nn.Module) -> tuple[int, ...]:
    channels = int(module.in_channels), int(module.out_channels)  # type: ignore[arg-type]
    first, second = channels if isinstance(module, _TRANSPOSED) else channels[::-1]
    return (first, second // int(module.groups), *module.kernel_size)  # type: ignore[arg-type,misc]


def _layers_of(name: str, parameter: Tensor, transposed: bool | None) -> list[MatrixLayer]:
    shape = tuple(parameter.shape)
    if parameter.dim() < 2 or parameter.numel() == 0:
        return []
    if transposed is not None:
        d_out, inputs = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
        return [MatrixLayer(name, name, d_out, inputs * math.prod(shape[2:]), transposed=bool(transposed))]
    if parameter.dim() == 2:
        return [MatrixLayer(name, name, shape[0], shape[1])]
    sides = [side for side in shape if side != 1]
    if len(sides) < 2:
        return []  # a class token, a scale: a vector in more dimensions
    if len(sides) == 2:
        return [MatrixLayer(name, name, sides[0], sides[1])]  # such as position embeddings (1, time, width)
    stack = math.prod(shape[:-2])
    return [MatrixLayer(f"{name}[{e}]", name, shape[-2], shape[-1], index=e, stack=shape[:-2]) for e in range(stack)]


class ParameterNames:
    """Qualified names of the parameters that the optimizers hold."""

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer], notes: Notes) -> None:
        self._model, self._notes = model, notes
        self._labels = dict(zip(map(id, optimizers), optimizer_labels(optimizers), strict=True))
        self._names: dict[int, str] = {}
        self._refresh()
        held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        if not held & self._names.keys():
            raise ConfigurationError(
                f"got a model ({type(model).__name__}) none of whose {len(self._names)} parameters is in the "
                "optimizer; expected the model that it trains. Was the optimizer made before the model was copied or "
                "moved?"
            )

    def of(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """The parameters that a step of this optimizer can move, by name."""
        return {n: p for n, p in self.held_by(optimizer).items() if p.requires_grad or p.grad is not None}

    def held_by(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """All parameters of this optimizer, by name; read anew, since groups can be added."""
        found: dict[str, Tensor] = {}
        for g, group in enumerate(optimizer.param_groups):
            for k, parameter in enumerate(group["params"]):
                if id(parameter) not in self._names:
                    self._refresh()
                if id(parameter) not in self._names:
                    name = self._names[id(parameter)] = f"{self._labels[id(optimizer)]}[{g}][{k}]"
                    self._notes.add(
                        f"{name} is in the optimizer but not in the model: it counts in the update's norm, not in the "
                        "ghost radius."
                    )
                found[self._names[id(parameter)]] = parameter
        return found

    def _refresh(self) -> None:
        self._names.update({id(parameter): name for name, parameter in named_parameters(self._model).items()})
