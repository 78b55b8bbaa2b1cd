"""The guard against values that are not finite: a NaN does not reach the parameters, nor the optimizer's state."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch

from redline.controller import Controller, Reject, RunOutline, Stop, Withhold
from redline.errors import ConfigurationError
from redline.monitor import Need
from redline.step import Step


class NonFiniteGuard(Controller):
    """Withholds gradients that are not finite, and rejects an update that is not.

    A withheld step is a no-op: parameters, moments, step counters, decay and the running statistics of normalization
    layers stay as they were, for all optimizers of the joint step. A rejected one leaves the parameters as they were;
    the optimizer's state has seen it and comes back only with ``restore_state``, otherwise the run stops. Under a
    GradScaler gradients are left to it: it skips a step for each optimizer by itself.
    """

    needs: ClassVar[Need] = Need.GRADIENTS | Need.UPDATE

    def __init__(self, *, stop_after: int = 20, restore_state: bool = False) -> None:
        """Set the limits.

        Args:
            stop_after: so many steps in a row that are not finite stop the run, with the layers' names. The default is
                Redline's choice.
            restore_state: copy the optimizers' state ahead of each step, so that a rejected update does not end the
                run. It costs that copy, in time and in memory, and on an accelerator a second wait.

        Raises:
            ConfigurationError: ``stop_after`` is below 1.
        """
        if stop_after < 1:
            raise ConfigurationError(f"got stop_after={stop_after}; expected at least 1 step.")
        self.stop_after, self.snapshots_state = stop_after, restore_state
        self._in_a_row = 0

    def begin(self, run: RunOutline) -> None:
        """Count anew."""
        self._in_a_row = 0

    def before_update(self, step: Step) -> Withhold | Stop | None:
        """Withhold gradients that are not finite."""
        norm = step.start.gradient_norm
        broken = norm is not None and not math.isfinite(norm) and not step.start.scaled
        self._in_a_row += broken
        if not broken and self._in_a_row < self.stop_after:
            return None
        seen = f"the gradients were not finite ({_where(step)})" if broken else "the updates were not finite"
        saw = {"gradient_norm": math.nan if norm is None else norm, "in_a_row": float(self._in_a_row)}
        if self._in_a_row < self.stop_after:
            return Withhold(f"{seen}: the step was withheld.", saw)
        self._in_a_row = 0  # whoever goes on begins anew
        return Stop(
            f"{seen}, at {saw['in_a_row']:.0f} steps in a row. None of them was taken: look at their data and rate.",
            saw,
        )

    def inspect(self, step: Step) -> Iterable[Reject]:
        """Reject an update that is not finite."""
        tau = step.update.norm
        broken = ~tau.isfinite()
        # Only where the state comes back does the run go on after a rejection.
        self._in_a_row = self._in_a_row + 1 if self.snapshots_state and bool(broken) else 0
        return [Reject("the update was not finite (norm {update_norm:.3g}).", {"update_norm": tau}, broken)]

    def state_dict(self) -> dict[str, Any]:
        """How many steps in a row were not finite."""
        return {"in_a_row": self._in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting."""
        self._in_a_row = int(state["in_a_row"])


def _where(step: Step) -> str:
    """Which parameters' gradients are not finite; asked at a bad step only, since it waits for the device."""
    gradients = step.gradients
    told_of = torch.zeros(len(gradients), 2, dtype=torch.int64, device=step.layout.device)
    for row, gradient in zip(told_of, gradients.values(), strict=True):
        if gradient is not None:
            values = gradient.to_dense() if gradient.is_sparse else gradient
            row[0], row[1] = 1, (~torch.isfinite(values)).any()
    # Of each, on how many ranks there is a gradient, and on how many it is not finite.
    told = step.layout.ranks.total(told_of).tolist()
    there = sum(1 for ranks, _ in told if ranks)
    broken = [name for name, (_, ranks) in zip(gradients, told, strict=True) if ranks]
    if not there:
        return "outside the model"
    if not broken:
        return "outside the model" if math.isnan(step.start.gradient_norm or 0.0) else "their norm overflowed"
    last = f", the last {broken[-1]}" if len(broken) > 1 else ""
    return f"{len(broken)} of {there} parameters, the first {broken[0]}{last}"
