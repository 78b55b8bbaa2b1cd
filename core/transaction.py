"""The step transaction: ``theta_before``, the update the optimizer proposed, and what is committed of it.

It reads what the optimizer did and never re-derives it, so it is the same for every optimizer. Copies live from
``save`` to ``close``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

_LOW_PRECISION = (torch.float16, torch.bfloat16)


class StepTransaction:
    """One joint step over the parameters it is told of, by name."""

    def __init__(self) -> None:
        self.parameters: dict[str, Tensor] = {}
        self.before: dict[str, Tensor] = {}
        self._withheld: dict[Tensor, Tensor] = {}

    def save(self, parameters: Mapping[str, Tensor]) -> None:
        """Keep ``theta_before`` of parameters that are about to move; what is kept already stays."""
        for name, parameter in parameters.items():
            if name not in self.before:
                self.parameters[name] = parameter
                self.before[name] = parameter.detach().clone()

    def update(self) -> dict[str, Tensor]:
        """``p = theta - theta_before`` as the parameters stand now, by name; float32 for half-precision parameters."""
        return {
            name: _wide(parameter.detach()) - _wide(self.before[name]) for name, parameter in self.parameters.items()
        }

    def scale(self, factor: float, names: Iterable[str] | None = None) -> None:
        """Commit ``theta_before + factor * p`` for all parameters, or the named ones.

        With 1 the parameters stay as the optimizer left them, bit for bit; with 0 they are as they were before.
        """
        if factor == 1:
            return
        for name in self.parameters if names is None else names:
            parameter, before = self.parameters[name].detach(), self.before[name]
            if factor == 0:
                parameter.copy_(before)
            else:
                wide = _wide(before)
                parameter.copy_(wide + factor * (_wide(parameter) - wide))

    def withhold(self, parameters: Iterable[Tensor]) -> None:
        """Set gradients aside, so that the optimizer skips these parameters: no decay, no state change."""
        for parameter in parameters:
            if parameter.grad is not None and parameter not in self._withheld:
                self._withheld[parameter], parameter.grad = parameter.grad, None

    def return_gradients(self) -> None:
        """Put gradients that were set aside back."""
        for parameter, gradient in self._withheld.items():
            parameter.grad = gradient
        self._withheld.clear()

    def close(self) -> None:
        """End the step: gradients go back, copies go."""
        self.return_gradients()
        self.parameters, self.before = {}, {}


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in _LOW_PRECISION else tensor
