"""Readings: what monitors measure, kept on the device until one copy brings all of it to the host."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from redline.metrics import METRICS, Metric

Value: TypeAlias = "float | Tensor"

# Tracked readings wait on the device at most for so many entries; then they are fetched unasked.
_MOST_PENDING = 512


class Series(NamedTuple):
    """One metric with one set of label values."""

    metric: str
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunInfo:
    """What is running; the labels of ``redline_run_info``."""

    run: str
    version: str
    precision: str
    strategy: str
    world_size: int


@dataclass(frozen=True)
class Snapshot:
    """All readings as of one step, immutable. A metric that was not measured is absent.

    Attributes:
        step: the last optimizer step it knows of, counted from 0; -1 before the first.
        time: Unix time at which it was taken.
        run: what is running.
        values: value of every series.
        measured_at: the step at which each series was measured; gauges keep their last value.
    """

    step: int
    time: float
    run: RunInfo
    values: Mapping[Series, float] = field(repr=False)
    measured_at: Mapping[Series, int] = field(repr=False)

    def value(self, metric: str, **labels: str) -> float:
        """Value of one series.

        Args:
            metric: full name, such as "redline_normalized_step_size".
            **labels: one value for every label of the metric; label values are strings.

        Raises:
            KeyError: no such metric, or nothing measured under these labels.
        """
        definition = _definition(metric)
        if set(labels) != set(definition.labels):
            raise KeyError(f"got labels {sorted(labels)} for {metric}; expected {sorted(definition.labels)}")
        series = Series(metric, tuple(labels[name] for name in definition.labels))
        if series not in self.values:
            raise KeyError(f"{metric} has not been measured{f' for {labels}' if labels else ''} by step {self.step}")
        return self.values[series]

    def layers(self, metric: str) -> dict[str, float]:
        """Values of a per-layer metric: ``{layer: value}``, empty where nothing was measured."""
        if _definition(metric).labels != ("layer",):
            raise KeyError(f"got {metric}, which is not measured per layer; use .value(...)")
        return {series.labels[0]: value for series, value in self.values.items() if series.metric == metric}

    def series(self, metric: str) -> dict[tuple[str, ...], float]:
        """Values of a metric by its label values."""
        _definition(metric)
        return {series.labels: value for series, value in self.values.items() if series.metric == metric}

    def __contains__(self, metric: str) -> bool:
        return any(series.metric == metric for series in self.values)


def _definition(metric: str) -> Metric:
    if metric not in METRICS:
        raise KeyError(f"got {metric!r}; expected a full metric name, one of {', '.join(METRICS)}")
    return METRICS[metric]


@dataclass
class _Entry:
    step: int
    series: Sequence[Series]
    value: Value | None  # a float, () or (len(series),); None for "not measured"
    valid: Tensor | None  # like value, bool; what is not valid was not measured


class Readings:
    """Collects readings of the step in progress, on whichever device they are.

    Nothing here waits for the device but ``fetch``.
    """

    def __init__(self, observe: Callable[[Series, int, float], None] = lambda series, step, value: None) -> None:
        """``observe`` is told of every value that reaches the host, in the order measured."""
        self._observe = observe
        self._latest: dict[tuple[str, tuple[Series, ...]], _Entry] = {}
        self._tracked: list[_Entry] = []
        self._device_counts: dict[Series, Tensor] = {}
        self._counts: dict[Series, float] = {}
        self._values: dict[Series, float] = {}
        self._measured_at: dict[Series, int] = {}
        self.step = -1
        for metric in METRICS.values():
            if metric.kind == "counter" and not metric.labels:
                self.count(metric, 0)
            for value in metric.label_values:
                self.count(metric, 0, value)

    def gauge(self, metric: Metric, value: Value, *labels: str) -> None:
        """Set a gauge: a float or a 0-d tensor on any device, which is copied."""
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"got a tensor of shape {tuple(value.shape)} for {metric.name}; expected one number")
        value = value.detach().clone() if isinstance(value, Tensor) else float(value)
        self._add(metric, (Series(metric.name, labels),), value, None)

    def layers(self, metric: Metric, names: Sequence[str], values: Tensor, valid: Tensor | None = None) -> None:
        """Set a per-layer gauge.

        Args:
            metric: with the one label ``layer``.
            names: the layers.
            values: ``(len(names),)``, floating.
            valid: ``(len(names),)``, bool: layers for which the metric is not defined are false, and stay absent.
        """
        if values.numel() != len(names) or (valid is not None and valid.numel() != len(names)):
            raise ValueError(f"got {values.numel()} values of {metric.name} for {len(names)} layers; expected as many")
        self._add(metric, tuple(Series(metric.name, (name,)) for name in names), values.detach(), valid)

    def count(self, metric: Metric, amount: Value = 1, *labels: str) -> None:
        """Add to a counter: a number or a 0-d tensor on any device."""
        series = Series(metric.name, labels)
        if isinstance(amount, Tensor):
            so_far = self._device_counts.get(series)
            amount = amount.detach().double() if amount.device.type != "mps" else amount.detach().float()
            self._device_counts[series] = amount if so_far is None else so_far + amount
        else:
            self._counts[series] = self._counts.get(series, 0.0) + amount

    def absent(self, metric: Metric, *labels: str) -> None:
        """Say that a gauge could not be measured at this step: its last value would mislead."""
        self._add(metric, (Series(metric.name, labels),), None, None)

    def fetch(self, run: RunInfo) -> Snapshot:
        """Bring everything to the host in one copy a device, and take a snapshot."""
        entries = sorted([*self._tracked, *self._latest.values()], key=lambda entry: entry.step)
        tensors = [entry.value for entry in entries if isinstance(entry.value, Tensor)]
        tensors += [entry.valid for entry in entries if entry.valid is not None]
        numbers = to_host([*tensors, *self._device_counts.values()])

        values = [next(numbers) if isinstance(e.value, Tensor) else [e.value] * len(e.series) for e in entries]
        valids = [next(numbers) if e.valid is not None else [1.0] * len(e.series) for e in entries]
        for entry, row, valid in zip(entries, values, valids, strict=True):
            for series, value, measured in zip(entry.series, row, valid, strict=True):
                if measured and value is not None:
                    self._values[series], self._measured_at[series] = value, entry.step
                    self._observe(series, entry.step, value)
                else:
                    self._values.pop(series, None)
                    self._measured_at.pop(series, None)
        for series in self._device_counts:
            self._counts[series] = self._counts.get(series, 0.0) + next(numbers)[0]
        self._latest, self._tracked, self._device_counts = {}, [], {}
        return Snapshot(
            self.step,
            time.time(),
            run,
            MappingProxyType({**self._values, **self._counts}),
            MappingProxyType(dict(self._measured_at)),
        )

    @property
    def overflowing(self) -> bool:
        """Whether so much waits on the device that it should be fetched now."""
        return len(self._tracked) >= _MOST_PENDING

    def state_dict(self) -> dict[str, Any]:
        """The counters: gauges are measured anew. Call after ``fetch``."""
        return {"counts": [(*series, value) for series, value in self._counts.items()], "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up counters where they were left."""
        self._counts.update({Series(name, tuple(labels)): value for name, labels, value in state["counts"]})
        self.step = state["step"]

    def _add(self, metric: Metric, series: tuple[Series, ...], value: Value | None, valid: Tensor | None) -> None:
        entry = _Entry(self.step, series, value, valid)
        if metric.tracked:
            self._tracked.append(entry)
        else:
            self._latest[metric.name, series] = entry


def to_host(tensors: Sequence[Tensor]) -> Iterator[list[float]]:
    """All tensors as lists of floats, in order, with one device-to-host copy a device."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        dtype = torch.float32 if tensor.device.type == "mps" else torch.float64
        by_device.setdefault(tensor.device, []).append(tensor.reshape(-1).to(dtype))
    hosts = {device: iter(torch.cat(parts).tolist()) for device, parts in by_device.items()}
    return iter([[next(hosts[tensor.device]) for _ in range(tensor.numel())] for tensor in tensors])


def is_on_host(tensor: Tensor) -> bool:
    """Whether reading it makes nobody wait."""
    return tensor.device.type == "cpu"
