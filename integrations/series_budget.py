"""A budget of series: the worst layers keep theirs, the others are folded into maxima and medians of their kind."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from redline import metrics
from redline.errors import ConfigurationError
from redline.readings import Snapshot

Series: TypeAlias = dict[str, dict[tuple[str, ...], float]]
"""``{metric: {label values: value}}``."""

DEFAULT_MAX_SERIES = 1000
"""Redline's choice: the spectra of some 130 matrices, and a scrape of about a hundredth of a second."""

_LEAST = 100  # what is not per layer, and a maximum and a median of each per-layer metric
_ADVANTAGE = 2.0  # how many times worse than a layer that is served one must be to take its place
_PER_LAYER = tuple(name for name, metric in metrics.METRICS.items() if metric.labels == ("layer",))


class SeriesBudget:
    """Chooses what of a snapshot is served, so that it is at most so many series.

    Only per-layer gauges are ever folded; counters and whatever else has no label ``layer`` are always whole. While all
    fits, all is served. Otherwise layers are ranked, worst first: those with a value that is not finite, then by
    update-to-weight ratio, then by the spectral condition of the weight, then by the step over the layer's own radius.
    From the top, as many as there is room for are served with all their series. So that series do not come and go from
    one snapshot to the next, a layer that was served counts twice its figure: another takes its place only when it is
    more than twice as bad.

    The rest is folded, by metric and kind, into a maximum and a median. A kind is a layer's name with indices taken
    out, ``blocks.*.attention.qkv.weight``; if these kinds would take more than half of the room, the last parts of it
    alone, as many as fit: ``attention.qkv.weight``, ``weight``, and at worst ``*``.
    """

    def __init__(self, max_series: int) -> None:
        """``max_series``: the budget.

        Raises:
            ConfigurationError: it is too small for what is never folded.
        """
        if max_series < _LEAST:
            raise ConfigurationError(
                f"got max_series={max_series}; expected at least {_LEAST}: what is not measured per layer, and a "
                "maximum and a median of what is, are always served."
            )
        self.max_series = max_series
        self._served: frozenset[str] = frozenset()

    def fit(self, snapshot: Snapshot) -> Series:
        """All series to serve of a snapshot, but for ``redline_run_info``; what is served next depends on it."""
        found: Series = defaultdict(dict)
        for (metric, labels), value in snapshot.values.items():
            found[metric][labels] = value
        per_layer = [metric for metric in _PER_LAYER if metric in found]
        layers: dict[str, dict[str, float]] = {}
        for metric in per_layer:
            for (layer,), value in found[metric].items():
                layers.setdefault(layer, {})[metric] = value
        of_layers = sum(map(len, layers.values()))
        others = sum(map(len, found.values())) - of_layers + 2  # with redline_run_info and redline_folded_layers
        room = self.max_series - others
        if of_layers <= room:
            self._served, folded = frozenset(layers), {}
        else:
            kinds = _kinds(layers, room / 4)
            self._served = self._worst(layers, room - 2 * _pairs(layers, kinds))
            folded = {layer: values for layer, values in layers.items() if layer not in self._served}
            for metric in per_layer:
                found[metric] = {labels: one for labels, one in found[metric].items() if labels[0] in self._served}
            found.update(_folded(folded, kinds))
        found[metrics.FOLDED_LAYERS.name] = {(): len(folded)}
        return found

    def _worst(self, layers: Mapping[str, Mapping[str, float]], room: int) -> frozenset[str]:
        def rank(layer: str) -> tuple[float, ...]:
            return _badness(layers[layer], _ADVANTAGE if layer in self._served else 1.0)

        worst: list[str] = []
        for layer in sorted(layers, key=rank, reverse=True):
            room -= len(layers[layer])
            if room < 0:
                break
            worst.append(layer)
        return frozenset(worst)


def _badness(values: Mapping[str, float], advantage: float) -> tuple[float, ...]:
    """The higher, the worse; a figure that was not measured is below all that were."""
    if not all(map(math.isfinite, values.values())):
        return (math.inf,)
    step_sizes = (
        values.get(one.name, -math.inf) for one in (metrics.ATTENTION_STEP_SIZE, metrics.ACTIVATION_STEP_SIZE)
    )
    figures = (
        values.get(metrics.UPDATE_TO_WEIGHT_RATIO.name, -math.inf),
        values.get(metrics.WEIGHT_SPECTRAL_CONDITION.name, -math.inf),
        max(step_sizes),
    )
    return tuple(advantage * figure for figure in figures)


def _kinds(layers: Mapping[str, Mapping[str, float]], most: float) -> dict[str, str]:
    """The kind of each layer: of as many last parts as give at most so many pairs of metric and kind."""
    names = {layer: [_without_index(part) for part in layer.split(".")] for layer in layers}
    kinds: dict[str, str] = {}
    for parts in range(max(map(len, names.values())), -1, -1):
        kinds = {layer: _last(name, parts) for layer, name in names.items()}
        if _pairs(layers, kinds) <= most:
            break
    return kinds


def _without_index(part: str) -> str:
    return "*" if part.isdigit() else re.sub(r"\[\d+\]$", "[*]", part)


def _last(name: Sequence[str], parts: int) -> str:
    """The last parts of a name that are no index, and the indices after the first of them."""
    named = [place for place, part in enumerate(name) if part != "*"]
    if parts == 0:
        return "*"
    return ".".join(name if parts >= len(named) else name[named[-parts] :])


def _pairs(layers: Mapping[str, Mapping[str, float]], kinds: Mapping[str, str]) -> int:
    return len({(metric, kinds[layer]) for layer, values in layers.items() for metric in values})


def _folded(layers: Mapping[str, Mapping[str, float]], kinds: Mapping[str, str]) -> Series:
    gathered: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for layer, values in layers.items():
        for metric, value in values.items():
            gathered[metric, kinds[layer]].append(value)
    ordered = {labels: _ascending(values) for labels, values in gathered.items()}
    return {
        metrics.FOLDED_MAX.name: {labels: values[-1] for labels, values in ordered.items()},
        metrics.FOLDED_MEDIAN.name: {labels: _middle(values) for labels, values in ordered.items()},
    }


def _ascending(values: Iterable[float]) -> list[float]:
    """NaN is the worst there is: it must not be lost in a maximum."""
    return sorted(values, key=lambda value: (math.isnan(value), value))


def _middle(ordered: Sequence[float]) -> float:
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
