"""Which way of taking the logit tangent works for a model, tried on its example batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from redline.errors import ConfigurationError
from redline.integrations.doctor.subject import Subject, described
from redline.numerics.tangents import FINITE_DIFFERENCE, LADDER, LogitTangent, logit_tangent
from redline.tangent_probe import AGREEMENT, disagreement

_SEED = 0xD1A6


@dataclass(frozen=True)
class TangentTrial:
    """One method, tried.

    Attributes:
        method: one of ``redline.numerics.tangents.LADDER``.
        error: against the finite difference, relative; None for that one, and where either was not to be had.
        reason: why it does not work, or "".
    """

    method: str
    error: float | None
    reason: str

    @property
    def works(self) -> bool:
        """Whether a run will use it."""
        return not self.reason


@dataclass(frozen=True)
class Tangents:
    """What the trials came to.

    Attributes:
        trials: the ladder, best rung first.
        logits: shape of the logits, or None if no method works.
        masked: whether positions are left out.
    """

    trials: tuple[TangentTrial, ...]
    logits: tuple[int, ...] | None
    masked: bool

    @property
    def method(self) -> str | None:
        """The one that a run will use: the first that works."""
        return next((trial.method for trial in self.trials if trial.works), None)


def try_tangents(subject: Subject) -> Tangents:
    """Take the tangent by each method along a random direction.

    Raises:
        ConfigurationError: the model's output holds no logits.
    """
    taken: dict[str, LogitTangent] = {}
    reasons: dict[str, str] = {}
    for method in LADDER:
        try:
            taken[method] = logit_tangent(
                subject.model, subject.args, subject.kwargs, _direction(subject), logits=subject.logits, method=method
            )
        except ConfigurationError as error:
            raise ConfigurationError(f"{error} On this command line: --logits package.module:callable.") from error
        except Exception as error:  # noqa: BLE001 a model may fail in any way: that is the answer
            reasons[method] = described(error)
    reference = taken.get(FINITE_DIFFERENCE)
    trials = []
    for method in LADDER:
        off = _disagreement(taken[method], reference) if method in taken and method != FINITE_DIFFERENCE else None
        reason = reasons.get(method, "")
        if off is not None and off > AGREEMENT:
            reason = f"its tangent is off by {off:.0%} from a finite difference"
        trials.append(TangentTrial(method, off, reason))
    first = next(iter(taken.values()), None)
    return Tangents(
        tuple(trials),
        None if first is None else tuple(first.logits.shape),
        first is not None and first.mask is not None,
    )


def _direction(subject: Subject) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(_SEED)
    return {
        name: torch.randn(parameter.shape, generator=generator).to(parameter)
        for name, parameter in subject.model.named_parameters()
        if parameter.is_floating_point()
    }


def _disagreement(taken: LogitTangent, reference: LogitTangent | None) -> float | None:
    off = math.nan if reference is None else disagreement(taken, reference)
    return off if math.isfinite(off) else None
