"""Limits on how hard a step pushes each matrix, and the factors that hold its update to them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from redline.controller import Number, ScaleMatrices
from redline.host_copy import is_on_host, moved_to
from redline.matrix_shards import frobenius_norms
from redline.parameters import MatrixLayer, by_layer, fans
from redline.spectrum_tracker import SpectrumTracker
from redline.step import Step
from redline.transaction import times

_UPDATE_SEED, _WEIGHT_SEED = 0xC1A3B, 0xCE111
TOLERANCE = 1.5e-3
"""Relative error of ``sigma_1`` that is allowed for: estimates are from below."""
_ASKED = 2e-5  # of the iteration, whose own estimate of what is still to come errs on flat spectra such as Muon's


class UpdateLimits:
    """Holds ``sigma_1`` of each matrix's update, net of decoupled decay, under a limit of that matrix's own.

    The limit is ``limit * lr * sqrt(d_out / d_in)`` ("fan") or ``limit * sigma_1(W)``, ``W`` as it was before the step
    ("weight"), and none for a matrix that is zero.
    """

    def __init__(self, limit: float, relative_to: Literal["fan", "weight"]) -> None:
        self.limit, self.relative_to = limit, relative_to
        self._updates, self._weights = SpectrumTracker(_UPDATE_SEED), SpectrumTracker(_WEIGHT_SEED)

    def scale(self, step: Step, factor: Number = 1.0) -> ScaleMatrices | None:
        """Scale each update that is over its limit; None if it is plain that none is.

        Args:
            step: whose updates to measure.
            factor: on all updates and their rates, decided already but not carried out.
        """
        layers = moved(step)
        net = {name: step.net_update(name) for name in dict.fromkeys(layer.parameter for layer in layers)}
        if all(map(is_on_host, net.values())):  # elsewhere to ask would be to wait
            layers = self._maybe_over(step, layers, net, float(factor))
        if not layers:
            return None
        sigma = self._updates.measure(layers, net, _ASKED, step.layout).sigma * (1 + TOLERANCE)
        sigma = sigma * moved_to(torch.as_tensor(factor), sigma)
        if self.relative_to == "fan":
            rates = {name: times(factor, step.rates[name].lr) for name in net}
            limits = self.limit * by_layer(layers, rates, sigma) * fans(layers, sigma)
        else:
            weights = self.weights(step, layers).to(sigma)
            limits = torch.where(weights > 0, self.limit * weights, math.inf)
        excess = sigma / limits
        over = excess > 1  # not where either is NaN: guards see to that
        factors = torch.where(over, 1 / excess, 1.0)
        worst = torch.where(over, excess, 0.0).argmax()
        saw: dict[str, Number] = {"matrices": over.sum(), "worst": worst}
        for name, values in (("sigma", sigma), ("limit", limits), ("scale", factors)):
            saw[name] = values.gather(0, worst.reshape(1))[0]
        reason = (
            "sigma_1 of the update was over the limit in {matrices:.0f} matrices, most in {layer}: {sigma:.3g} over "
            "{limit:.3g}, scaled by {scale:.3g} there."
        )
        return ScaleMatrices(layers, factors, reason, saw)

    def weights(self, step: Step, layers: Sequence[MatrixLayer]) -> Tensor:
        """``sigma_1`` of the matrices before the step, ``(n,)``."""
        return self._weights.measure(layers, step.before, _ASKED, step.layout).sigma

    def _maybe_over(
        self, step: Step, layers: Sequence[MatrixLayer], net: Mapping[str, Tensor], factor: float
    ) -> list[MatrixLayer]:
        """Those that are not surely under their limits, the same on every rank."""
        norms = frobenius_norms(layers, net, step.layout).tolist()
        if self.relative_to == "fan":
            weights = [0.0] * len(layers)
        else:
            weights = frobenius_norms(layers, step.before, step.layout).tolist()
        return [
            layer
            for layer, norm, weight in zip(layers, norms, weights, strict=True)
            if not self._is_surely_under(step, layer, norm * factor, factor, weight)
        ]

    def _is_surely_under(self, step: Step, layer: MatrixLayer, norm: float, factor: float, weight: float) -> bool:
        """Whether Frobenius norms alone say so: ``sigma_1 <= ||.||_F <= sqrt(min(d_out, d_in)) sigma_1``.

        Args:
            step: whose update.
            layer: of the matrix.
            norm: of its update.
            factor: that is in ``norm``, and on the rates.
            weight: norm of the matrix.
        """
        most = norm * (1 + TOLERANCE)
        if self.relative_to == "fan":
            rate = factor * float(step.rates[layer.parameter].lr)
            return most <= self.limit * rate * (layer.d_out / layer.d_in) ** 0.5
        return most <= self.limit * weight / min(layer.d_out, layer.d_in) ** 0.5

    def state_dict(self) -> dict[str, Any]:
        """Warm starts."""
        return {"updates": self._updates.state_dict(), "weights": self._weights.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Start warm."""
        self._updates.load_state_dict(state["updates"])
        self._weights.load_state_dict(state["weights"])


def moved(step: Step) -> list[MatrixLayer]:
    """The matrices that the step moves."""
    return [layer for layer in step.layers if layer.parameter in step.before]
