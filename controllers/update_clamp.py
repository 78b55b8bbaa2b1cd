"""The clamp on single layers: no step pushes a matrix harder than its size allows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from redline import metrics
from redline.controller import Controller, RunOutline, ScaleMatrices
from redline.errors import ConfigurationError
from redline.monitor import Need
from redline.parameters import MatrixLayer, by_layer, fans
from redline.readings import Readings
from redline.spectrum_tracker import SpectrumTracker
from redline.step import Step

_UPDATE_SEED, _WEIGHT_SEED = 0xC1A3B, 0xCE111
_TOLERANCE = 1e-3  # relative error of sigma_1; estimates are from below, and so much is allowed for


class UpdateClamp(Controller):
    """Scales each matrix's update ``dW`` to keep ``sigma_1(dW)`` under a limit of that matrix's own.

    The limit is ``limit * lr * sqrt(d_out / d_in)`` ("fan"), ``lr`` being the rate of the matrix's group, or
    ``limit * sigma_1(W)`` ("weight") with ``W`` as it was before the step. It holds for the update net of decoupled
    weight decay, which stays whole: with "fan" then at every step

        sigma_1(W) <= max(sigma_1(W_0), limit * sqrt(d_out / d_in) / wd),

    the ceiling that ``redline_weight_spectral_ceiling`` reads: ``wd`` is the smallest decay that was in force so far,
    and ``W_0`` the matrix ahead of the first step that was held. Where a decay is coupled with the gradient the whole
    update is clamped, there is no ceiling, and a warning says so by name. Matrices under their limit keep the
    optimizer's own update, bit for bit; vectors are left alone, and so are, under "weight", matrices that are zero.

    Source: arXiv 2601.01306 (Muon++), the condition on updates alone; "weight" is Redline's own.
    """

    needs: ClassVar[Need] = Need.UPDATE
    per_parameter: ClassVar[bool] = True

    def __init__(self, limit: float = 1.0, relative_to: Literal["fan", "weight"] = "weight") -> None:
        """Set the limit.

        Args:
            limit: 1 by default, Redline's choice: no step may push a matrix harder than it is strong, which no healthy
                step does. Under "fan" 1 is what Muon's updates come to; those of AdamW and of sign updates come to
                ``sqrt(d_in)`` and more.
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
        self._updates, self._weights = SpectrumTracker(_UPDATE_SEED), SpectrumTracker(_WEIGHT_SEED)
        self._ceilings: dict[str, Tensor] = {}

    def begin(self, run: RunOutline) -> None:
        """Say where decay cannot be told from the rest."""
        self._forget()
        measured = {layer.parameter for layer in run.layers}
        for reason in dict.fromkeys(rates.coupled for name, rates in run.rates.items() if name in measured):
            if reason:
                run.note(f"{reason}: the whole update is clamped, and there is no ceiling on the weights.")

    def inspect(self, step: Step) -> Iterable[ScaleMatrices]:
        """Measure each matrix's update, and scale those over their limit."""
        layers = _moved(step)
        if not layers:
            return []
        net = {name: step.net_update(name) for name in dict.fromkeys(layer.parameter for layer in layers)}
        if next(iter(net.values())).device.type == "cpu":  # elsewhere to ask would be to wait
            layers = [layer for layer in layers if not self._is_surely_under(step, layer, net[layer.parameter])]
            if not layers:
                return []
        sigma = self._updates.measure(layers, net, _TOLERANCE).sigma * (1 + _TOLERANCE)
        if self.relative_to == "fan":
            rates = {name: step.rates[name].lr for name in net}
            limits = self.limit * by_layer(layers, rates, sigma) * fans(layers, sigma)
        else:
            weights = self._weights.measure(layers, step.before, _TOLERANCE).sigma.to(sigma)
            limits = torch.where(weights > 0, self.limit * weights, math.inf)
        times = sigma / limits
        over = times > 1  # not where either is NaN: guards see to that
        factors = torch.where(over, 1 / times, 1.0)
        worst = torch.where(over, times, 0.0).argmax()
        saw = {"matrices": over.sum(), "worst": worst}
        for name, values in (("sigma", sigma), ("limit", limits), ("scale", factors)):
            saw[name] = values.gather(0, worst.reshape(1))[0]
        return [
            ScaleMatrices(
                layers,
                factors,
                "sigma_1 of the update was over the limit in {matrices:.0f} matrices, most in {layer}: {sigma:.3g} "
                "over {limit:.3g}, scaled by {scale:.3g} there.",
                saw,
            )
        ]

    def _is_surely_under(self, step: Step, layer: MatrixLayer, net: Tensor) -> bool:
        """Whether Frobenius norms alone say so: ``sigma_1 <= ||.||_F <= sqrt(min(d_out, d_in)) sigma_1``."""
        most = float(torch.linalg.vector_norm(layer.of(net))) * (1 + _TOLERANCE)
        if self.relative_to == "fan":
            return most <= self.limit * float(step.rates[layer.parameter].lr) * (layer.d_out / layer.d_in) ** 0.5
        weight = float(torch.linalg.vector_norm(layer.of(step.before[layer.parameter]), dtype=net.dtype))
        return most <= self.limit * weight / min(layer.d_out, layer.d_in) ** 0.5

    def read_out(self, step: Step, readings: Readings) -> None:
        """The ceilings."""
        layers = _moved(step)
        if self.relative_to != "fan" or not layers:
            return
        if new := [layer for layer in layers if layer.name not in self._ceilings]:
            sigma = self._weights.measure(new, step.before, _TOLERANCE).sigma * (1 + _TOLERANCE)
            self._ceilings.update(zip([layer.name for layer in new], sigma, strict=True))
        ceilings = torch.stack([self._ceilings[layer.name] for layer in layers])
        decays = by_layer(
            layers, {layer.parameter: step.rates[layer.parameter].weight_decay for layer in layers}, ceilings
        )
        ceilings = torch.maximum(ceilings, self.limit * fans(layers, ceilings) / decays)
        names = [layer.name for layer in layers]
        self._ceilings.update(zip(names, ceilings, strict=True))
        readings.layers(metrics.WEIGHT_SPECTRAL_CEILING, names, ceilings, ceilings.isfinite())

    def state_dict(self) -> dict[str, Any]:
        """Warm starts and ceilings."""
        return {
            "updates": self._updates.state_dict(),
            "weights": self._weights.state_dict(),
            "ceilings": dict(self._ceilings),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as before."""
        self._updates.load_state_dict(state["updates"])
        self._weights.load_state_dict(state["weights"])
        self._ceilings = dict(state["ceilings"])


def _moved(step: Step) -> Sequence[MatrixLayer]:
    return [layer for layer in step.layers if layer.parameter in step.before]
