"""Weight decay by feedback: each matrix is held at the strength it is to have."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from redline import metrics
from redline.controller import Controller, Decay, RunOutline
from redline.errors import ConfigurationError
from redline.monitor import Need
from redline.parameters import MatrixLayer, by_layer
from redline.readings import Readings
from redline.spectrum_tracker import SpectrumTracker
from redline.step import Step

_SEED = 0xDECA1
_TOLERANCE = 1e-3  # relative error of sigma_1


class WeightDecayControl(Controller):
    """Holds each matrix's ``sigma_1`` at a target by a decoupled weight decay of its own.

    Under decoupled decay ``x = sigma_1^2`` moves, to first order, by

        x' = -2 lr wd x + g    a step,

    ``g`` being what the updates net of decay add. At rest ``sigma_1 = sqrt(g / (2 lr wd))``: as ``g`` goes with
    ``lr^2`` that is the law ``sigma_1 ~ sqrt(lr / wd)``. Every ``every`` steps ``sigma_1`` is measured, ``g`` taken
    from what it did under the decay in force (and averaged with the last), and the decay set to

        wd = (g + (x - target^2) / horizon) / (2 lr x)    within bounds,

    which brings the difference from the target down by a factor e in ``horizon`` steps. The groups' own settings are
    not touched; ``redline_weight_decay_in_force`` reads what is in force. The first decision takes ``g`` for what the
    group's own decay would hold at rest.

    A decay that is coupled with the gradient cannot be replaced, and is refused by name.

    Source: arXiv 2510.15262 for the law; the feedback is Redline's own.
    """

    needs: ClassVar[Need] = Need.UPDATE
    per_parameter: ClassVar[bool] = True

    def __init__(
        self,
        target: Mapping[str, float] | None = None,
        *,
        freeze_at: int = 0,
        every: int = 20,
        horizon: int = 200,
        bounds: tuple[float, float] = (0.0, 10.0),
    ) -> None:
        """Set the targets.

        Args:
            target: ``{layer: sigma_1}``; other matrices are left alone. Of a reference run it is
                ``session.latest.layers("redline_weight_spectral_norm")``. None: each matrix whose group decays it is
                held where it stands at step ``freeze_at``.
            freeze_at: that step, without ``target``; up to then the groups' decay is in force.
            every: steps between measurements.
            horizon: steps in which a difference from the target is to shrink by a factor e; a few times ``every``.
            bounds: least and largest weight decay; the step shrinks a matrix by ``lr`` times it. All defaults are
                Redline's choice.

        Raises:
            ConfigurationError: a target that is not positive, a negative step, bounds that are not in order.
        """
        for layer, sigma in (target or {}).items():
            if not 0 < sigma < math.inf:
                raise ConfigurationError(f"got a target of {sigma} for {layer!r}; expected a positive spectral norm.")
        if target is not None and not target:
            raise ConfigurationError("got a target for no layer; expected {layer: sigma_1}, or None to freeze all.")
        if freeze_at < 0:
            raise ConfigurationError(f"got freeze_at={freeze_at}; expected a step, 0 or later.")
        if every < 1 or horizon < every:
            raise ConfigurationError(
                f"got every={every} and horizon={horizon}; expected at least 1, and a horizon of as many steps or more."
            )
        low, high = bounds
        if not 0 <= low < high < math.inf:
            raise ConfigurationError(
                f"got bounds={tuple(bounds)}; expected a least decay of 0 or more and a larger one."
            )
        self.target = None if target is None else dict(target)
        self.freeze_at, self.every, self.horizon, self.bounds = freeze_at, every, horizon, (low, high)
        self._layers: list[MatrixLayer] = []
        self._forget()

    def _forget(self) -> None:
        self._spectra = SpectrumTracker(_SEED)
        self._names: list[str] = []  # of the layers that what follows is of
        self._measured_at: int | None = None
        self._targets = self._weight_decay = self._growth = self._x = self._shrunk = torch.zeros(0)
        self._news: dict[str, float | Tensor] | None = None

    def begin(self, run: RunOutline) -> None:
        """Find the layers, and refuse targets that cannot be held.

        Raises:
            ConfigurationError: a target for a layer that does not exist or that no optimizer moves, a decay that is
                coupled, or nothing to freeze.
        """
        self._forget()
        known = {layer.name: layer for layer in run.layers}
        if self.target is None:
            self._layers = [
                layer
                for layer in run.layers
                if layer.parameter in run.rates and _decays(run.rates[layer.parameter].weight_decay)
            ]
            coupled = dict.fromkeys(rates.coupled for rates in run.rates.values() if rates.coupled)
            if not self._layers:
                raise ConfigurationError(
                    "got no target and no matrix that decays; expected parameter groups with a weight_decay, or "
                    "target={layer: sigma_1}" + "".join(f" ({reason})" for reason in coupled) + "."
                )
            return
        for name in self.target:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=3, cutoff=0) or ["none: the model has no matrix"]
                raise ConfigurationError(
                    f"got a target for {name!r}, which is no layer of the model; expected the qualified name of a "
                    f"matrix, such as {', '.join(map(repr, close))}."
                )
            if known[name].parameter not in run.rates:
                raise ConfigurationError(
                    f"got a target for {name!r}, which no optimizer holds; expected a layer that is trained."
                )
            if reason := run.rates[known[name].parameter].coupled:
                raise ConfigurationError(
                    f"got a target for {name!r}, whose decay cannot be replaced: {reason}. Use an optimizer with "
                    "decoupled decay, such as AdamW, or set its weight_decay to 0: the control brings its own."
                )
        self._layers = [layer for layer in run.layers if layer.name in self.target]

    def inspect(self, step: Step) -> Iterable[Decay]:
        """Measure when due, and put the decay in force."""
        names = [layer.name for layer in self._layers]
        if self._names != names:  # a state of other layers was loaded
            self._forget()
            self._names = names
        present = [layer.parameter in step.before for layer in self._layers]
        if not any(present) or (self._measured_at is None and step.index < self.freeze_at and self.target is None):
            return []
        due = self._measured_at is None or step.index >= self._measured_at + self.every
        if due and all(present):
            self._measure(step)
        if self._measured_at is None:
            return []
        layers = [layer for layer, here in zip(self._layers, present, strict=True) if here]
        decays = self._weight_decay
        if len(layers) < len(self._layers):  # the others' optimizer was skipped
            places = torch.tensor([place for place, here in enumerate(present) if here])
            decays = decays.index_select(0, places.to(decays.device, non_blocking=True))
        rates = {layer.parameter: step.rates[layer.parameter].lr if here else 0.0
                 for layer, here in zip(self._layers, present, strict=True)}  # fmt: skip
        self._shrunk = self._shrunk + by_layer(self._layers, rates, self._shrunk) * self._weight_decay
        if self._measured_at != step.index:
            return [Decay(layers, decays, None)]
        worst = (self._x.sqrt() / self._targets).log().abs().argmax()
        saw = {"worst": worst}
        saw |= {name: of.gather(0, worst.reshape(1))[0] for name, of in
                (("sigma", self._x.sqrt()), ("target", self._targets), ("weight_decay", decays))}  # fmt: skip
        reason = (
            f"the decay of {len(layers)} matrices was set; {{layer}} is farthest from its target, with sigma_1 = "
            "{sigma:.4g} where {target:.4g} was asked: its weight decay is {weight_decay:.3g}."
        )
        return [Decay(layers, decays, reason, saw)]

    def _measure(self, step: Step) -> None:
        """Take ``sigma_1``, and from what it did since the last time the decays to come."""
        sigma = self._spectra.measure(self._layers, step.before, _TOLERANCE).sigma
        x = sigma.square()
        lr = by_layer(self._layers, {layer.parameter: step.rates[layer.parameter].lr for layer in self._layers}, x)
        if self._measured_at is None:
            groups = {layer.parameter: step.rates[layer.parameter].weight_decay for layer in self._layers}
            self._weight_decay = by_layer(self._layers, groups, x)
            asked = [self.target[layer.name] for layer in self._layers] if self.target else None
            self._targets = (
                sigma if asked is None else torch.tensor(asked, dtype=x.dtype).to(x.device, non_blocking=True)
            )
            self._growth = 2 * lr * self._weight_decay * x
        else:
            steps = step.index - self._measured_at
            # The equation above, solved over the interval for the g that led from the last x to this one.
            shrunk = 2 * self._shrunk.to(x)
            kept = torch.where(shrunk > 0, -torch.expm1(-shrunk) / shrunk, 1.0)
            growth = (x - self._x * torch.exp(-shrunk)) / (steps * kept)
            self._growth = (self._growth.to(x) + growth.clamp_min(0)) / 2
        wanted = (self._growth + (x - self._targets.to(x).square()) / self.horizon) / (2 * lr * x)
        # Where there is no rate or no weight, or one that is not finite, the decay stays.
        self._weight_decay = torch.where(wanted.isfinite(), wanted.clamp(*self.bounds), self._weight_decay.to(x))
        self._x, self._shrunk, self._measured_at = x, torch.zeros_like(x), step.index

    def read_out(self, step: Step, readings: Readings) -> None:
        """The decay in force, when it has been set."""
        if self._measured_at == step.index:
            readings.layers(metrics.WEIGHT_DECAY_IN_FORCE, self._names, self._weight_decay)

    def state_dict(self) -> dict[str, Any]:
        """Targets, decays, and what the next ones are taken from."""
        return {
            "layers": list(self._names),
            "measured_at": self._measured_at,
            "targets": self._targets,
            "weight_decay": self._weight_decay,
            "growth": self._growth,
            "x": self._x,
            "shrunk": self._shrunk,
            "spectra": self._spectra.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as before, if it is the same layers that are held."""
        self._names = list(state["layers"])
        self._measured_at = state["measured_at"]
        self._targets, self._weight_decay, self._growth = state["targets"], state["weight_decay"], state["growth"]
        self._x, self._shrunk = state["x"], state["shrunk"]
        self._spectra.load_state_dict(state["spectra"])


def _decays(weight_decay: float | Tensor) -> bool:
    return isinstance(weight_decay, Tensor) or weight_decay > 0
