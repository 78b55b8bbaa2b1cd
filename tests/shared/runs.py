"""What tests of controllers share: a run to attach to, its state bit by bit, and who waits for the device."""

from __future__ import annotations

import copy
from typing import Any

from bits import frozen
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import Self

import redline


class ControlledRun:
    """A model with its optimizers; what a file's own run is made of besides says how it steps."""

    model: nn.Module
    optimizers: list[Optimizer]
    session: redline.Session | None

    def attach(self, *controllers: redline.Controller, **arguments: Any) -> redline.Session:
        arguments = {"monitors": [], **arguments}
        self.session = redline.attach(self.model, self.optimizers, controllers=controllers, **arguments)
        return self.session

    def uncontrolled(self) -> Self:
        """A copy, which nobody watches."""
        twin = copy.copy(self)
        twin.model, twin.optimizers = copy.deepcopy((self.model, self.optimizers))
        twin.session = None
        return twin

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    @property
    def everything(self) -> Any:
        return frozen(self.model.state_dict()), [frozen(optimizer.state_dict()) for optimizer in self.optimizers]


class HostReads(TorchDispatchMode):
    """Counts the operations for which the host would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name in ("aten::_local_scalar_dense", "aten::item", "aten::equal", "aten::nonzero", "aten::is_nonzero"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))
