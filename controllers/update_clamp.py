"""The clamp on single layers: no step pushes a matrix harder than its size allows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from redline import metrics
from redline.controller import Controller, RunOutline, ScaleMatrices
from redline.errors import ConfigurationError
from redline.host_copy import moved_to
from redline.monitor import Need
from redline.parameters import by_layer, fans
from redline.readings import Readings
from redline.step import Step
from redline.update_limits import TOLERANCE, UpdateLimits, moved


class UpdateClamp(Controller):
    """Scales each matrix's update ``dW`` to keep ``sigma_1(dW)`` under a limit of that matrix's own.

    The limit is ``limit * lr * sqrt(d_out / d_in)`` ("fan"), ``lr`` being the rate of the matrix's group, or
    ``limit * sigma_1(W)`` ("weight") with ``W`` as it was before the step. It holds for the update net of decoupled
    weight decay, which stays whole: with "fan" then at every step

        sigma_1(W) <= max(sigma_1(W_0), limit * sqrt(d_out / d_in) / wd),

    the ceiling that ``redline_weight_spectral_ceiling`` reads: ``wd`` is the smallest decay that was in force so far,
    and ``W_0`` the matrix ahead of the first step that was held. Steps with ``lr * wd > 1``, or without decay, raise
    it; weights changed from outside are not known of. Where a decay is coupled with the gradient the whole
    update is clamped, there is no ceiling, and a warning says so by name. Matrices under their limit keep the
    optimizer's own update, bit for bit; vectors are left alone, and so are, under "weight", matrices that are zero.

    Source: arXiv 2601.01306 (Muon++), the condition on updates alone; "weight" is Redline's own.
    """

    needs: ClassVar[Need] = Need.UPDATE
    per_parameter: ClassVar[bool] = True

    def __init__(self, limit: float = 1.0, relative_to: Literal["fan", "weight"] = "weight") -> None:
        """Set the limit.

        Args:
            limit: 1 by default, Redline's choice: no step may push a matrix harder than it is strong, which healthy
                steps do only to matrices that start at or near zero. Under "fan" 1 is what Muon's updates come to;
                those of AdamW and of sign updates come to ``sqrt(d_in)`` and more.
            relative_to: "fan" holds the spectral condition, and gives the ceiling; "weight" goes by the matrix itself,
                whatever the optimizer.

        Raises:
            ConfigurationError: a limit that is not positive, or relative to something else.
        """
        if not 0 < limit < math.inf:
            raise ConfigurationError(f"got limit={limit}; expected a positive number, such as 1.")
        if relative_to not in ("fan", "weight"):
            raise ConfigurationError(f"got relative_to={relative_to!r}; expected 'fan' or 'weight'.")
        self.limit, self.relative_to = limit, relative_to
        self._forget()

    def _forget(self) -> None:
        self._limits = UpdateLimits(self.limit, self.relative_to)
        self._ceilings: dict[str, Tensor] = {}

    def begin(self, run: RunOutline) -> None:
        """Say where decay cannot be told from the rest, or the rate is not the group's."""
        self._forget()
        measured = {layer.parameter for layer in run.layers}
        for reason in dict.fromkeys(rates.coupled for name, rates in run.rates.items() if name in measured):
            if reason:
                run.note(f"{reason}: the whole update is clamped, and there is no ceiling on the weights.")
        for optimizer in run.optimizers if self.relative_to == "fan" else ():
            if any(group.get("lr") is None for group in optimizer.param_groups):
                raise ConfigurationError(
                    f"got UpdateClamp relative to 'fan' on {type(optimizer).__name__}, which has no learning rate in "
                    "its groups; expected one to go by. Use relative_to='weight'."
                )
            for adjusted in {group.get("adjust_lr_fn") for group in optimizer.param_groups} - {None, "original"}:
                run.note(
                    f"{type(optimizer).__name__} adjusts its rate to each matrix's shape ({adjusted}): its updates do "
                    "not go by the group's lr, but the limit and the decay do."
                )

    def inspect(self, step: Step) -> Iterable[ScaleMatrices]:
        """Measure each matrix's update, and scale those over their limit."""
        decision = self._limits.scale(step)
        return [] if decision is None else [decision]

    def read_out(self, step: Step, readings: Readings) -> None:
        """The ceilings."""
        layers = moved(step)
        if self.relative_to != "fan" or not layers:
            return
        if new := [layer for layer in layers if layer.name not in self._ceilings]:
            sigma = self._limits.weights(step, new) * (1 + TOLERANCE)
            self._ceilings.update(zip([layer.name for layer in new], sigma, strict=True))
        device = step.before[layers[0].parameter].device
        ceilings = torch.stack([moved_to(self._ceilings[layer.name], device) for layer in layers])
        rates = {layer.parameter: step.rates[layer.parameter] for layer in layers}
        decays = by_layer(layers, {name: one.weight_decay for name, one in rates.items()}, ceilings)
        lr = by_layer(layers, {name: one.lr for name, one in rates.items()}, ceilings)
        most, shrunk = self.limit * fans(layers, ceilings), lr * decays
        at_rest = most / decays
        after_this = (1 - shrunk).abs() * ceilings + lr * most  # past zero, as in a spike of the rate, or undecayed
        ceilings = torch.maximum(ceilings, torch.where((decays > 0) & (shrunk <= 1), at_rest, after_this))
        names = [layer.name for layer in layers]
        self._ceilings.update(zip(names, ceilings, strict=True))
        readings.layers(metrics.WEIGHT_SPECTRAL_CEILING, names, ceilings, decays > 0)

    def state_dict(self) -> dict[str, Any]:
        """Warm starts and ceilings."""
        return {"limits": self._limits.state_dict(), "ceilings": dict(self._ceilings)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as before."""
        self._limits.load_state_dict(state["limits"])
        self._ceilings = dict(state["ceilings"])
