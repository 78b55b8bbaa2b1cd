"""What the spectra of single layers say of a run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from redline.findings.finding import Finding
from redline.findings.thresholds import (
    COLLAPSE,
    COLLAPSED_RANK,
    ENOUGH_LAYERS,
    GROWTH,
    GROWTH_AMONG_LAYERS,
    HARD_PUSH,
    START,
    TABLES,
)

if TYPE_CHECKING:
    from redline.report import StabilityReport

_MOST_NAMED = 3


def layer_grew_alone(report: StabilityReport) -> Finding | None:
    """A layer's sigma_1 grew several times over, the others' did not, and it stands above them; tables are left out."""
    known = [layer for layer in report.layers if _finite(layer.growth) and _finite(layer.condition)]
    if len(known) < ENOUGH_LAYERS:
        return None
    growth = statistics.median(_figure(layer.growth) for layer in known)
    condition = statistics.median(_figure(layer.condition) for layer in known)
    found = sorted(
        (
            layer
            for layer in known
            if not _is_table(layer.name)
            and _figure(layer.growth) > max(GROWTH, GROWTH_AMONG_LAYERS * growth)
            and _figure(layer.condition) > GROWTH_AMONG_LAYERS * condition
        ),
        key=lambda layer: -_figure(layer.growth),
    )
    if not found:
        return None
    words = [f"{layer.name} ×{layer.growth:.3g} to σ₁ = {layer.spectral_norm:.3g}" for layer in found]
    return Finding(
        "watch",
        "layer_grew_alone",
        f"σ₁ grew far more than that of the other layers: {_listed(words)}; the median layer's grew ×{growth:.3g}.",
        "A layer that outgrows the others makes the whole model's logits steeper along itself, and the radius shorter.",
        "Raise this layer's weight decay (WeightDecayControl finds it), or put a ceiling on it: "
        'UpdateClamp(relative_to="fan").',
    )


def layer_pushed_hard(report: StabilityReport) -> Finding | None:
    """Past the start of the run, an update was as strong as the matrix it was added to, or stronger."""
    found = [
        layer
        for layer in report.layers
        if layer.hardest_update is not None
        and layer.hardest_step is not None
        and layer.hardest_update >= HARD_PUSH
        and layer.hardest_step >= START * report.steps
    ]
    if not found:
        return None
    words = [f"{layer.name} by {layer.hardest_update:.3g} at step {layer.hardest_step}" for layer in found]
    return Finding(
        "bad",
        "layer_pushed_hard",
        f"Layers were pushed harder than they are strong, σ₁(ΔW)/σ₁(W): {_listed(words)}.",
        "One step replaced what the layer had learned; healthy updates are a few percent of their matrix at most.",
        "UpdateClamp holds single layers; lower the rate of this layer's parameter group, or look at its batches.",
    )


def stable_rank_collapsed(report: StabilityReport) -> Finding | None:
    """A layer's stable rank fell to little more than 1; tables of tokens and positions are left out."""
    found = [
        layer
        for layer in report.layers
        if not _is_table(layer.name)
        and layer.stable_rank is not None
        and layer.first_stable_rank is not None
        and layer.stable_rank < COLLAPSED_RANK
        and layer.first_stable_rank > COLLAPSE * layer.stable_rank
    ]
    if not found:
        return None
    words = [f"{layer.name} from {layer.first_stable_rank:.3g} to {layer.stable_rank:.3g}" for layer in found]
    return Finding(
        "watch",
        "stable_rank_collapsed",
        f"The stable rank fell towards 1: {_listed(words)}.",
        "One direction has taken over: the layer passes little else on, and its σ₁ follows that one direction.",
        "Raise this layer's weight decay, or lower its rate; if it is the first or last layer, look for inputs or "
        "classes that are all alike.",
    )


def _is_table(name: str) -> bool:
    return any(part in name.lower() for part in TABLES)


def _listed(words: Sequence[str]) -> str:
    more = f", and {len(words) - _MOST_NAMED} more" if len(words) > _MOST_NAMED else ""
    return ", ".join(words[:_MOST_NAMED]) + more


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _figure(value: float | None) -> float:
    assert value is not None
    return value
