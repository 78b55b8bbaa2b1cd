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
    """One joint step over the parameters it is told of, by name.

    Scales gather until ``commit`` writes them: up to then the parameters are as the optimizer left them.
    """

    def __init__(self) -> None:
        self.parameters: dict[str, Tensor] = {}
        self.before: dict[str, Tensor] = {}
        self._factors: dict[str, float | Tensor] = {}
        self._withheld: dict[Tensor, Tensor] = {}

    def save(self, parameters: Mapping[str, Tensor]) -> None:
        """Keep ``theta_before`` of parameters that are about to move; what is kept already stays."""
        for name, parameter in parameters.items():
            if name not in self.before:
                self.parameters[name] = parameter
                self.before[name] = parameter.detach().clone()

    def update(self) -> dict[str, Tensor]:
        """``p``, by name: what the optimizer did, times what was decided so far; float32 for half precision."""
        return {name: self._scaled_update(name) for name in self.parameters}

    def scale(self, factor: float | Tensor, names: Iterable[str] | None = None) -> None:
        """Decide to commit ``factor`` times what is left of the update of all parameters, or of the named ones.

        A 0-d tensor is never waited for.
        """
        for name in self.parameters if names is None else names:
            self._factors[name] = factor * self._factors.get(name, 1.0)

    def commit(self) -> None:
        """Write ``theta_before + factor * p``.

        With 1 a parameter stays as the optimizer left it, bit for bit; with 0 it is as it was before.
        """
        for name, factor in self._factors.items():
            parameter, before = self.parameters[name].detach(), self.before[name]
            if isinstance(factor, Tensor):
                factor = factor.to(parameter.device, non_blocking=True)
                moved = (_wide(before) + self._scaled_update(name)).to(parameter.dtype)
                moved = torch.where(factor == 0, before, moved)
                parameter.copy_(torch.where(factor == 1, parameter, moved))
            elif factor == 0:
                parameter.copy_(before)
            elif factor != 1:
                parameter.copy_(_wide(before) + self._scaled_update(name))
        self._factors = {}

    def _scaled_update(self, name: str) -> Tensor:
        factor = self._factors.get(name, 1.0)
        before = _wide(self.before[name])
        update = _wide(self.parameters[name].detach()) - before
        if isinstance(factor, Tensor):
            factor = factor.to(update.device, non_blocking=True)
            return torch.where(factor == 0, 0.0, factor.to(update.dtype) * update)
        if factor == 0:
            return torch.zeros_like(before)  # also of an update that is not finite
        return update if factor == 1 else factor * update

    def withhold(self, parameters: Iterable[Tensor]) -> None:
        """Set gradients aside, so that the optimizer skips these parameters: no decay, no state change."""
        for parameter in parameters:
            if parameter.grad is not None and parameter not in self._withheld:
                self._withheld[parameter], parameter.grad = parameter.grad, None

    def return_gradients(self) -> None:
        """Put gradients that were set aside back, unless there are newer ones by now."""
        for parameter, gradient in self._withheld.items():
            if parameter.grad is None:
                parameter.grad = gradient
        self._withheld.clear()

    def close(self) -> None:
        """End the step: gradients go back, copies go."""
        self.return_gradients()
        self.parameters, self.before, self._factors = {}, {}, {}


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in _LOW_PRECISION else tensor
