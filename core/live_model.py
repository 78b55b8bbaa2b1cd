"""A model in training, read as it stands at any moment; of what lies in parts, this rank's."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from redline.numerics.names import plain_name
from redline.parameters import ParameterNames, named_parameters
from redline.sharding import is_sharded, local_part


class LiveModel:
    """Reads parameters, gradients and buffers by name, anew each time: they can be wrapped, added and replaced."""

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer], names: ParameterNames) -> None:
        """``names``: of what the optimizers hold."""
        self._model, self._optimizers, self._names = model, optimizers, names

    def parameters(self) -> dict[str, Tensor]:
        """All of them as they are, DTensors too; those that only the optimizers hold among them."""
        held = [self._names.held_by(optimizer) for optimizer in self._optimizers]
        return {**named_parameters(self._model), **{name: one for some in held for name, one in some.items()}}

    def weights(self) -> dict[str, Tensor]:
        """The model's parameters."""
        return {name: local_part(parameter) for name, parameter in named_parameters(self._model).items()}

    def gradients(self) -> dict[str, Tensor | None]:
        """Of the model's parameters, by name."""
        named = named_parameters(self._model)
        return {name: None if one.grad is None else local_part(one.grad) for name, one in named.items()}

    def training_state(self) -> dict[str, Tensor]:
        """What training changes: the parameters that the optimizers move, and the buffers."""
        moved = {
            name: parameter
            for optimizer in self._optimizers
            for name, parameter in self._names.held_by(optimizer).items()
            if parameter.requires_grad or parameter in optimizer.state  # frozen for now, as Lightning toggles them
        }
        live = {**moved, **{plain_name(name): one for name, one in self._model.named_buffers()}}
        return {name: local_part(one) if is_sharded(one) else one for name, one in live.items()}
