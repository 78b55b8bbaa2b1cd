"""The step transaction: ``theta_before``, the update the optimizer proposed, and what is committed of it.

It reads what the optimizer did and never re-derives it, so it is the same for every optimizer. Copies live from
``save`` to ``close``. What is to be committed of a parameter is ``alpha * p + beta * theta_before``: 1 and 0 is the
optimizer's own step; ``beta`` is how decoupled decay is kept, or changed, apart from the rest of ``p``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from redline.host_copy import moved_to
from redline.sharding import local_part

_LOW_PRECISION = (torch.float16, torch.bfloat16)


class _Share(NamedTuple):
    """Numbers, or tensors that broadcast against the parameter."""

    alpha: float | Tensor
    beta: float | Tensor


_ALL = _Share(1.0, 0.0)
_NONE = _Share(0.0, 0.0)


class StepTransaction:
    """One joint step over the parameters it is told of, by name.

    Decisions gather until ``commit`` writes them: up to then the parameters are as the optimizer left them. A tensor
    that is given as a number, 0-d or broadcasting against the parameter, is never waited for. Of a DTensor it moves the
    part that lies on this rank, and all its tensors are such parts.
    """

    def __init__(self) -> None:
        self.parameters: dict[str, Tensor] = {}
        self.before: dict[str, Tensor] = {}
        self._shares: dict[str, _Share] = {}
        self._withheld: dict[Tensor, Tensor] = {}

    def save(self, parameters: Mapping[str, Tensor]) -> None:
        """Keep ``theta_before`` of parameters that are about to move; what is kept already stays."""
        for name, parameter in parameters.items():
            if name not in self.before:
                self.parameters[name] = parameter
                self.before[name] = local_part(parameter).clone()

    def update(self) -> dict[str, Tensor]:
        """What is left of ``p``, by name, after what was decided so far; float32 for half precision."""
        return {name: self._left_of_update(name) for name in self.parameters}

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """The same, one tensor after the other, so that no more than one need be there at a time."""
        return ((name, self._left_of_update(name)) for name in self.parameters)

    def scale(self, factor: float | Tensor, names: Iterable[str] | None = None) -> None:
        """Decide to commit ``factor`` times what is left of the update of all parameters, or of the named ones."""
        for name in self.parameters if names is None else names:
            share = self._shares.get(name, _ALL)
            self._shares[name] = _Share(times(factor, share.alpha), times(factor, share.beta))

    def scale_net(self, name: str, factor: float | Tensor, decay: float | Tensor) -> None:
        """The same of one parameter's update net of decoupled decay: ``decay = lr * wd`` in force stays whole."""
        share = self._shares.get(name, _ALL)
        self._shares[name] = _Share(times(factor, share.alpha), times(factor, share.beta) + times(factor - 1, decay))

    def shrink(self, name: str, decay: float | Tensor) -> None:
        """Decide to shrink one parameter by ``decay`` times ``theta_before`` besides; less than 0 lets it grow."""
        share = self._shares.get(name, _ALL)
        self._shares[name] = _Share(share.alpha, share.beta - decay)

    def commit(self) -> None:
        """Write what was decided.

        What stays the optimizer's whole update is left as the optimizer left it, bit for bit; with nothing of it a
        parameter is as it was before.
        """
        for name, (alpha, beta) in self._shares.items():
            parameter, before = local_part(self.parameters[name]), self.before[name]
            if isinstance(alpha, Tensor) or isinstance(beta, Tensor):
                alpha, beta = _on(parameter, alpha), _on(parameter, beta)
                moved = (_wide(before) + self._left_of_update(name)).to(parameter.dtype)
                moved = torch.where((alpha == 0) & (beta == 0), before, moved)
                parameter.copy_(torch.where((alpha == 1) & (beta == 0), parameter, moved))
            elif (alpha, beta) == _NONE:
                parameter.copy_(before)
            elif alpha == 1 and beta != 0:
                parameter.copy_(_wide(parameter) + beta * _wide(before))
            elif alpha != 1:
                parameter.copy_(_wide(before) + self._left_of_update(name))
        self._shares = {}

    def _left_of_update(self, name: str) -> Tensor:
        alpha, beta = self._shares.get(name, _ALL)
        before = _wide(self.before[name])
        update = _part(alpha, _wide(local_part(self.parameters[name])) - before)
        return update + _part(beta, before) if isinstance(beta, Tensor) or beta != 0 else update

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
        self.parameters, self.before, self._shares = {}, {}, {}


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in _LOW_PRECISION else tensor


def _on(tensor: Tensor, number: float | Tensor) -> Tensor:
    """A number on a tensor's device."""
    return moved_to(torch.as_tensor(number), tensor.device)


def _part(factor: float | Tensor, tensor: Tensor) -> Tensor:
    """A factor of a whole tensor, in its dtype; 0 where the factor is, also of what is not finite."""
    if isinstance(factor, Tensor):
        factor = _on(tensor, factor)
        return torch.where(factor == 0, 0.0, factor.to(tensor.dtype) * tensor)
    if factor == 0:
        return torch.zeros_like(tensor)
    return tensor if factor == 1 else factor * tensor


def times(factor: float | Tensor, number: float | Tensor) -> float | Tensor:
    """The product of two numbers; 0 where the factor is, also of one that is not finite."""
    if not isinstance(number, Tensor) and number == 0:
        return 0.0
    if isinstance(factor, Tensor):
        return torch.where(factor == 0, 0.0, factor * number)
    return factor * number if factor else 0.0
