"""One optimizer step as monitors and controllers see it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from redline.host_copy import moved_to
from redline.margins import StepMargins
from redline.numerics.spectra import SpectralEstimate
from redline.parameters import MatrixLayer
from redline.sharding import Layout
from redline.step_tangent import StepTangent
from redline.transaction import StepTransaction
from redline.weight_decay import Rates


@dataclass(frozen=True)
class Update:
    """The update ``p`` of one step.

    Attributes:
        tensors: by parameter name, ``theta - theta_before``; float32 for half-precision parameters. Of a DTensor the
            part on this rank.
        norm: ``tau``, the global L2 norm of ``p``, 0-d.
    """

    tensors: Mapping[str, Tensor]
    norm: Tensor


class _Told(NamedTuple):
    """What the ranks tell one another of a step, each 0-d: how many observed a loss, its mean, the gradients' norm."""

    observers: Tensor
    loss: Tensor
    gradient_norm: Tensor


class StepStart(NamedTuple):
    """What controllers know on the host before the update.

    Attributes:
        loss: as it was observed, or None.
        gradient_norm: of all optimizers' gradients, or None where no one needed it.
        scaled: whether a GradScaler steps the optimizer: gradients that are not finite are its to skip.
    """

    loss: float | None
    gradient_norm: float | None
    scaled: bool


class Step:
    """What there is to know of a step while its transaction is open. Everything is measured at most once.

    Attributes:
        index: optimizer steps before this one.
        layout: how the parameters lie over the ranks of the run.
        observed: the loss as it was observed on this rank, 0-d, or None.
        gradient_norm: L2 norm of all optimizers' gradients, 0-d; None where no one needed it. Before the update,
            gradients that AMP unscales only at a later optimizer's own step still carry the loss scale.
        scaled: whether a GradScaler steps the optimizer.
        groups: ``(optimizer label, group label, group)`` of every parameter group.
        layers: the model's matrices.
        withheld: whether a controller set the gradients aside: there is no update then.
        decided_by: the tangents that decisions went by: most samples, and how many remembered.
        rates: by parameter name, the learning rate and weight decay that the update as it stands goes by: what the step
            was made with, until decisions change it. Only where a controller decides on single parameters.
    """

    def __init__(
        self,
        index: int,
        groups: Sequence[tuple[str, str, Mapping[str, Any]]],
        layers: Sequence[MatrixLayer],
        read_weights: Callable[[], Mapping[str, Tensor]],
        read_gradients: Callable[[], Mapping[str, Tensor | None]],
        transaction: StepTransaction,
        to_host: Callable[[Sequence[Tensor]], list[float]],
        take_tangent: Callable[[Mapping[str, Tensor], int | None, int], StepTangent | None],
        measure_weights: Callable[[float], SpectralEstimate],
        layout: Layout,
    ) -> None:
        self.index, self.groups, self.layers = index, groups, layers
        self.layout = layout
        self.observed: Tensor | None = None
        self.gradient_norm: Tensor | None = None
        self.scaled = False
        self.withheld = False
        self.rates: dict[str, Rates] = {}
        self.decided_by: set[tuple[int | None, int]] = set()
        self._read_weights, self._read_gradients = read_weights, read_gradients
        self._transaction, self._to_host = transaction, to_host
        self._start: StepStart | None = None
        self._told: _Told | None = None
        self._take_tangent, self._measure_weights = take_tangent, measure_weights
        self._update: Update | None = None
        self._norms: Tensor | None = None
        self._tangents: dict[tuple[int | None, int], StepTangent | None] = {}
        self._proposed: StepTangent | None = None  # the first of the tangents that no longer hold
        self._spectra: tuple[float, SpectralEstimate] | None = None

    @property
    def start(self) -> StepStart:
        """Loss and gradient norm on the host: both in one copy, the one wait of a step, before the update."""
        if self._start is None:
            alone = self.layout.ranks.size == 1
            asked = {"loss": self.observed, "gradient_norm": self.gradient_norm} if alone else self._agree()._asdict()
            given = {name: tensor for name, tensor in asked.items() if tensor is not None}
            numbers = dict(zip(given, self._to_host(list(given.values())), strict=True))
            loss = numbers.get("loss") if numbers.pop("observers", 1) else None
            norm = None if self.gradient_norm is None else numbers.get("gradient_norm")
            self._start = StepStart(loss, norm, self.scaled)
        return self._start

    @property
    def loss(self) -> Tensor | None:
        """As it was observed, 0-d, or None: on several ranks the mean over those that observed one."""
        if self.layout.ranks.size == 1:
            return self.observed
        told = self._agree()  # whatever this rank has seen: the others send theirs
        return None if self.observed is None else told.loss

    @property
    def comparable_loss(self) -> Tensor | None:
        """The same, to be decided by: on several ranks infinite, not None, where none has observed one."""
        if self.layout.ranks.size == 1:
            return self.observed
        told = self._agree()
        return torch.where(told.observers > 0, told.loss, math.inf)

    def _agree(self) -> _Told:
        """Loss and gradient norm, the same on every rank, as of when they are first asked for: one message a step."""
        if self._told is None:
            nothing = torch.zeros((), dtype=torch.float64, device=self.layout.device)
            own = [
                nothing + (self.observed is not None),
                nothing if self.observed is None else self.observed,
                nothing if self.gradient_norm is None else self.gradient_norm,
            ]
            row = torch.stack([moved_to(one, nothing) for one in own])
            observes, loss, norm = self.layout.ranks.rows(row).unbind(1)
            self._told = _Told(observes.sum(), loss.sum() / observes.sum(), norm.amax())
        return self._told

    @property
    def gradients(self) -> Mapping[str, Tensor | None]:
        """The gradients of the model's parameters, by name; of a DTensor the part on this rank."""
        return self._read_gradients()

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The model's parameters as they stand, by name; of a DTensor the part on this rank."""
        return self._read_weights()

    @property
    def update(self) -> Update:
        """The update as it stands; only for those who declared ``Need.UPDATE``."""
        if self._update is None:
            tensors = self._transaction.update()
            self._update = Update(tensors, self.layout.norm(tensors))
        return self._update

    @property
    def update_norms(self) -> Tensor:
        """L2 norm of each parameter's update as it stands, ``(parameters,)``, float32 or float64, on one device.

        Only for those who declared ``Need.UPDATE``. It keeps no update: a step that needs no more costs no copy.
        """
        if self._norms is None:
            self._norms = self.layout.norms(self._transaction.parts())
        return self._norms

    def read(self, numbers: Sequence[Tensor]) -> list[float]:
        """Bring 0-d tensors to the host, in one copy: a controller waits for the device once a step at most."""
        return self._to_host(numbers)

    @property
    def before(self) -> Mapping[str, Tensor]:
        """``theta_before``, by parameter name; only for those who declared ``Need.UPDATE``."""
        return self._transaction.before

    def net_update(self, parameter: str) -> Tensor:
        """One parameter's update as it stands, net of decoupled decay: ``p + lr * wd * theta_before``.

        The whole of it where the decay is not decoupled; ``rates`` says why.
        """
        update, decay = self.update.tensors[parameter], self.rates[parameter].decay
        if not isinstance(decay, Tensor):
            return update.add(self.before[parameter], alpha=decay) if decay else update
        decay = torch.as_tensor(self.layout.cut(parameter, decay))
        return update + decay.to(update) * self.before[parameter].to(update.dtype)

    def tangent(self, max_samples: int | None, remember: int = 0, *, decides: bool = False) -> StepTangent | None:
        """The logit tangent along the update, or None where it cannot be taken (a note says why).

        Only for those who declared ``Need.TANGENT``. ``max_samples``: of the batch; None for all. ``remember``: of the
        samples that bound lately, how many are measured besides, where that is a sub-sample. ``decides``: whether a
        decision goes by it: which samples are remembered is then up to those who decide, so that no monitor's schedule
        changes a run.
        """
        asked = max_samples, remember
        if decides:
            self.decided_by.add(asked)
        if asked not in self._tangents:
            self._tangents[asked] = self._take_tangent(self.update.tensors, max_samples, remember)
        return self._tangents[asked]

    def weight_spectra(self, tolerance: float) -> SpectralEstimate:
        """Top singular values of the weights as they stand, for ``layers``, to a relative tolerance."""
        if self._spectra is None or self._spectra[0] > tolerance:
            self._spectra = tolerance, self._measure_weights(tolerance)
        return self._spectra[1]

    @property
    def margins(self) -> StepMargins | None:
        """``r`` of each sample of the step as proposed, or None where it is not known by sample."""
        tangent = self._proposed or self._widest_tangent
        if tangent is None:
            return None
        own = tangent.margins(self.index)
        return (
            own if self.layout.ranks.size == 1 else StepMargins.over(self.layout.ranks, self.index, own, tangent.spread)
        )

    @property
    def _widest_tangent(self) -> StepTangent | None:
        """The tangent over the most samples that it was measured on, or None if nobody measured it."""
        taken = {asked: tangent for asked, tangent in self._tangents.items() if tangent is not None}
        return taken[max(taken, key=lambda asked: (asked[0] or math.inf, asked[1]))] if taken else None

    @property
    def normalized_step_size(self) -> Tensor | None:
        """``r`` over the most samples it was measured on, or None if nobody measured it."""
        return None if self._widest_tangent is None else self._widest_tangent.normalized_step_size

    def update_changed(self) -> None:
        """A decision changed the update: what was measured of it no longer holds."""
        self._proposed = self._proposed or self._widest_tangent
        self._update, self._norms, self._tangents, self._spectra = None, None, {}, None
