"""Telling a loss that is no cross-entropy by the graph that autograd recorded of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from redline.errors import ConfigurationError

_CROSS_ENTROPY = (
    "NllLoss", "LogSoftmax", "BinaryCrossEntropy", "LogSigmoid", "Logsumexp", "Softplus", "CtcLoss",
    "LogBackward",  # of a softmax, it may be
)  # fmt: skip
_REGRESSION = ("MseLoss", "SmoothL1Loss", "HuberLoss")
_MOST_NODES = 10_000


def refuse_other_losses(loss: Tensor | float) -> None:
    """Refuse a loss that is plainly a regression: cross-entropy's radius says nothing of it.

    Where the graph does not tell (compiled or custom functions, a loss written out by hand) nothing is refused.

    Args:
        loss: with the graph that leads to it, as it is before ``backward``.

    Raises:
        ConfigurationError: the graph has a regression loss and nothing of a cross-entropy.
    """
    names = _functions(loss.grad_fn) if isinstance(loss, Tensor) else set()
    found = [kind for kind in _REGRESSION if any(name.startswith(kind) for name in names)]
    if found and not any(name.startswith(_CROSS_ENTROPY) for name in names):
        raise ConfigurationError(
            f"got a loss made by {found[0]}; expected a cross-entropy of the model's output: the clamp holds the step "
            "inside cross-entropy's convergence radius, which says nothing of this loss. Leave the clamp out; the "
            "guards work with any loss."
        )


def _functions(root: Any) -> set[str]:
    """Names of the functions that lead to a result."""
    names: set[str] = set()
    seen: set[Any] = set()
    waiting = [root]
    while waiting and len(seen) < _MOST_NODES:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names.add(node.name())
        waiting += [parent for parent, _ in node.next_functions]
    return names
