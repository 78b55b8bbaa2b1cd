"""Weight decay by feedback: each matrix is held at the strength it is to have."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from redline import metrics
from redline.controller import Controller, Decay, Number, RunOutline
from redline.errors import ConfigurationError
from redline.host_copy import moved_to
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
    from what it did under the decay in force (and averaged with the last, less where the rate has fallen since), and
    the decay set to

        wd = (g + (x - target^2) / horizon) / (2 lr x)    within bounds,

    which brings the difference from the target down by a factor e in ``horizon`` steps. ``lr`` is the rate of the steps
    as they were committed, in the mean since the last time. The groups' own settings are not touched;
    ``redline_weight_decay_in_force`` reads what is in force. The first decision takes ``g`` for what the group's own
    decay would hold at rest. No step shrinks a matrix by more than ``1 / every``, whatever its rate.

    A decay that is coupled with the gradient cannot be replaced, and is refused by name; a matrix that is zero when it
    would be frozen keeps its group's.

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
        self._names: list[str] = []  # of the layers that the state is of
        self._measured_at: int | None = None
        self._state: dict[str, Tensor] = {}

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
                    "target={layer: sigma_1}" + "".join(f" ({why})" for why in coupled) + "."
                )
            for why in coupled:
                run.note(f"{why}: the matrices of such groups are not held.")
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
        places = [place for place, layer in enumerate(self._layers) if layer.parameter in step.before]
        waits = self.target is None and step.index < self.freeze_at
        if not places or (waits and self._measured_at is None):
            return []
        layers = [self._layers[place] for place in places]
        due = self._measured_at is None or step.index >= self._measured_at + self.every
        if due:
            self._measure(step, layers, places)
        device = step.before[layers[0].parameter].device
        self._state = {key: moved_to(values, device) for key, values in self._state.items()}
        here = torch.tensor(places).to(device, non_blocking=True)
        x, target, weight_decay = (self._state[key].index_select(0, here) for key in ("x", "target", "weight_decay"))
        rates = {layer.parameter: step.rates[layer.parameter] for layer in layers}
        group_decay = by_layer(layers, {name: one.weight_decay for name, one in rates.items()}, x)
        weight_decay = torch.where(weight_decay.isnan(), group_decay, weight_decay)  # of one not measured yet
        lr = by_layer(layers, {name: one.lr for name, one in rates.items()}, x)
        in_force = torch.minimum(weight_decay, 1 / (self.every * lr))
        if not due:
            return [Decay(layers, in_force, None)]
        sigma = x.sqrt()
        worst = (sigma / target).log().abs().nan_to_num(0.0, 0.0).argmax()  # not where there is no target
        saw: dict[str, Number] = {"worst": worst}
        for name, values in (("sigma", sigma), ("target", target), ("weight_decay", in_force)):
            saw[name] = values.gather(0, worst.reshape(1))[0]
        reason = (
            f"the decay of {len(layers)} matrices was set; {{layer}} is farthest from its target, with sigma_1 = "
            "{sigma:.4g} where {target:.4g} was asked: its weight decay is {weight_decay:.3g}."
        )
        return [Decay(layers, in_force, reason, saw)]

    def _measure(self, step: Step, layers: Sequence[MatrixLayer], places: Sequence[int]) -> None:
        """Take ``sigma_1`` of the layers at these places, and from what it did since the last time the decays to come.

        The state is a number a layer: ``x`` and ``target``, ``weight_decay``, ``growth`` (g, at the rate
        ``growth_lr``), and since the last measurement the ``steps`` made, the sums of their ``lr`` and of what was
        ``shrunk``.
        """
        x = self._spectra.measure(layers, step.before, _TOLERANCE, step.layout).sigma.square()
        rates = {layer.parameter: step.rates[layer.parameter] for layer in layers}
        lr_now = by_layer(layers, {name: one.lr for name, one in rates.items()}, x)
        group_decay = by_layer(layers, {name: one.weight_decay for name, one in rates.items()}, x)
        if not self._state:
            nothing = torch.full((len(self._layers),), math.nan, dtype=x.dtype, device=x.device)
            self._state = {key: nothing for key in ("x", "target", "weight_decay", "growth", "growth_lr")}
            self._state |= {key: torch.zeros_like(nothing) for key in ("steps", "lr", "shrunk")}
        here = torch.tensor(places).to(x.device, non_blocking=True)
        was = {key: values.to(x).index_select(0, here) for key, values in self._state.items()}

        fresh = was["weight_decay"].isnan()
        target = torch.where(fresh, x.sqrt(), was["target"])
        if self.target is not None:
            asked = torch.tensor([self.target[layer.name] for layer in layers], dtype=x.dtype)
            target = asked.to(x.device, non_blocking=True)
        weight_decay = torch.where(fresh, group_decay, was["weight_decay"])
        growth = torch.where(fresh, 2 * lr_now * group_decay * x, was["growth"])
        lr = torch.where(was["steps"] > 0, was["lr"] / was["steps"], lr_now)
        growth = growth * (lr / torch.where(fresh, lr, was["growth_lr"])).square().nan_to_num(1.0).clamp_max(1.0)
        # The equation above, solved over the interval for the g that led from the last x to this one.
        shrunk = 2 * was["shrunk"]
        kept = torch.where(shrunk > 0, -torch.expm1(-shrunk) / shrunk, 1.0)
        seen = ((x - was["x"] * torch.exp(-shrunk)) / (was["steps"] * kept)).clamp_min(0.0)
        growth = torch.where(seen.isfinite(), (growth + seen) / 2, growth)

        wanted = (growth + (x - target.square()) / self.horizon) / (2 * lr * x)
        # Without a rate, a weight or a target, or with one that is not finite, the decay stays.
        wanted = torch.where(wanted.isfinite(), wanted, weight_decay).clamp(*self.bounds)
        new = {"x": x, "target": target, "weight_decay": torch.where(target > 0, wanted, weight_decay)}
        new |= {"growth": growth, "growth_lr": lr}
        new |= {key: torch.zeros_like(x) for key in ("steps", "lr", "shrunk")}
        self._state = {key: values.to(x).index_copy(0, here, new[key]) for key, values in self._state.items()}
        self._measured_at = step.index

    def read_out(self, step: Step, readings: Readings) -> None:
        """Remember the rates that all have settled on; the decay in force, when it has been set."""
        layers = [layer for layer in self._layers if layer.parameter in step.before]
        if not self._state or not layers:
            return
        lr, weight_decay = (
            by_layer(
                self._layers,
                {layer.parameter: getattr(step.rates.get(layer.parameter), of, 0.0) for layer in self._layers},
                self._state["x"],
            )
            for of in ("lr", "weight_decay")
        )
        moved = [layer.parameter in step.before for layer in self._layers]
        moves = torch.tensor(moved, dtype=lr.dtype).to(lr.device, non_blocking=True)
        for key, more in (("steps", moves), ("lr", lr), ("shrunk", lr * weight_decay)):
            self._state[key] = self._state[key].to(lr) + more
        if self._measured_at == step.index:
            in_force = weight_decay.index_select(
                0, torch.tensor([place for place, here in enumerate(moved) if here]).to(lr.device, non_blocking=True)
            )
            readings.layers(metrics.WEIGHT_DECAY_IN_FORCE, [layer.name for layer in layers], in_force)

    def state_dict(self) -> dict[str, Any]:
        """Targets, decays, and what the next ones are taken from."""
        return {
            "layers": list(self._names),
            "measured_at": self._measured_at,
            "state": dict(self._state),
            "spectra": self._spectra.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as before, if it is the same layers that are held; targets given to the constructor stay."""
        self._names, self._measured_at = list(state["layers"]), state["measured_at"]
        self._state = dict(state["state"])
        self._spectra.load_state_dict(state["spectra"])


def _decays(weight_decay: float | Tensor) -> bool:
    return isinstance(weight_decay, Tensor) or weight_decay > 0
