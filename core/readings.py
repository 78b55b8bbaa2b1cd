"""Readings: what monitors measure, kept on the device until one copy brings all of it to the host."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from redline.host_copy import to_host
from redline.metrics import METRICS, Metric
from redline.trail import Measurement, Since

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
        first_step: the step at which this session began: 0, or where it was resumed.
        since: what happened since the last snapshot that the same sink was handed.
    """

    step: int
    time: float
    run: RunInfo
    values: Mapping[Series, float] = field(repr=False)
    measured_at: Mapping[Series, int] = field(repr=False)
    first_step: int = field(default=0, repr=False)
    since: Since = field(default_factory=Since, repr=False)

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


class Batch:
    """Readings that come to the host together.

    Attributes:
        step: the last optimizer step they know of.
        time: Unix time at which nothing more was added.
    """

    def __init__(self) -> None:
        self.step, self.time = -1, 0.0
        self._latest: dict[tuple[str, tuple[Series, ...]], _Entry] = {}
        self._tracked: list[_Entry] = []
        self._device_counts: dict[Series, Tensor] = {}
        self.counts: dict[Series, float] = {}

    def add(self, metric: Metric, entry: _Entry) -> None:
        """Take in a gauge; of one that is not tracked only the latest value counts."""
        if metric.tracked:
            self._tracked.append(entry)
        else:
            self._latest[metric.name, tuple(entry.series)] = entry

    def count(self, metric: Metric, amount: Value = 1, *labels: str) -> None:
        """Add to a counter: a number or a 0-d tensor on any device."""
        series = Series(metric.name, labels)
        if isinstance(amount, Tensor):
            so_far = self._device_counts.get(series)
            amount = amount.detach().double() if amount.device.type != "mps" else amount.detach().float()
            self._device_counts[series] = amount if so_far is None else so_far + amount
        else:
            self.counts[series] = self.counts.get(series, 0.0) + amount

    @property
    def tracked(self) -> int:
        """How many measurements wait of metrics of which all are kept."""
        return len(self._tracked)

    @property
    def tensors(self) -> list[Tensor]:
        """What has to come to the host."""
        values = [entry.value for entry in self._entries if isinstance(entry.value, Tensor)]
        valids = [entry.valid for entry in self._entries if entry.valid is not None]
        return [*values, *valids, *self._device_counts.values()]

    def read(self, numbers: Iterator[list[float]]) -> Iterator[tuple[Series, int, float | None]]:
        """Series, step and value (None: not measured) of every gauge, oldest first, and the counts completed.

        ``numbers``: the tensors, in order.
        """
        entries = self._entries
        values = [next(numbers) if isinstance(e.value, Tensor) else [e.value] * len(e.series) for e in entries]
        valids = [next(numbers) if e.valid is not None else [1.0] * len(e.series) for e in entries]
        for series in self._device_counts:
            self.counts[series] = self.counts.get(series, 0.0) + next(numbers)[0]
        for entry, row, valid in zip(entries, values, valids, strict=True):
            for series, value, measured in zip(entry.series, row, valid, strict=True):
                yield series, entry.step, value if measured else None

    @property
    def _entries(self) -> list[_Entry]:
        return sorted([*self._tracked, *self._latest.values()], key=lambda entry: entry.step)


class Readings:
    """Collects readings of the step in progress, on whichever device they are.

    Nothing here waits for the device but ``fetch``. Who does not want to wait takes the batch, brings its tensors to
    the host in time, and gives their numbers to ``receive``; batches are received in the order in which they were
    taken.
    """

    def __init__(self, observe: Callable[[Series, int, float], None] = lambda series, step, value: None) -> None:
        """``observe`` is told of every value that reaches the host, in the order measured."""
        self._observe = observe
        self._batch = Batch()
        self._counts: dict[Series, float] = {}
        self._values: dict[Series, float] = {}
        self._measured_at: dict[Series, int] = {}
        self.step, self._first_step = -1, 0
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
        self._batch.add(metric, _Entry(self.step, (Series(metric.name, labels),), value, None))

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
        series = tuple(Series(metric.name, (name,)) for name in names)
        self._batch.add(metric, _Entry(self.step, series, values.detach(), valid))

    def count(self, metric: Metric, amount: Value = 1, *labels: str) -> None:
        """Add to a counter: a number or a 0-d tensor on any device."""
        self._batch.count(metric, amount, *labels)

    def absent(self, metric: Metric, *labels: str) -> None:
        """Say that a gauge could not be measured at this step: its last value would mislead."""
        self._batch.add(metric, _Entry(self.step, (Series(metric.name, labels),), None, None))

    def take(self) -> Batch:
        """All that was read since the last time, to be brought to the host."""
        batch, self._batch = self._batch, Batch()
        batch.step, batch.time = self.step, time.time()
        return batch

    def receive(self, batch: Batch, numbers: Iterator[list[float]], run: RunInfo) -> Snapshot:
        """A snapshot as of when the batch was taken; ``numbers``: its tensors, in order."""
        measurements: list[Measurement] = []
        for series, step, value in batch.read(numbers):
            if value is not None:
                self._values[series], self._measured_at[series] = value, step
                self._observe(series, step, value)
                if METRICS[series.metric].tracked:
                    measurements.append(Measurement(series, step, value))
            else:
                self._values.pop(series, None)
                self._measured_at.pop(series, None)
        self._counts = _sums(self._counts, batch.counts)
        return Snapshot(
            batch.step,
            batch.time,
            run,
            MappingProxyType({**self._values, **self._counts}),
            MappingProxyType(dict(self._measured_at)),
            self._first_step,
            Since(tuple(measurements)),
        )

    def fetch(self, run: RunInfo) -> Snapshot:
        """Bring everything to the host in one copy a device, wait for it, and take a snapshot."""
        batch = self.take()
        return self.receive(batch, to_host(batch.tensors), run)

    @property
    def overflowing(self) -> bool:
        """Whether so much waits on the device that it should be fetched now."""
        return self._batch.tracked >= _MOST_PENDING

    def state_dict(self) -> dict[str, Any]:
        """The counters: gauges are measured anew. Call after ``fetch``."""
        counts = _sums(self._counts, self._batch.counts)
        return {"counts": [(*series, value) for series, value in counts.items()], "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up counters where they were left. Call after ``fetch``."""
        self._counts = _sums(self._counts, self._batch.counts)
        self._counts.update({Series(name, tuple(labels)): value for name, labels, value in state["counts"]})
        self._batch.counts.clear()
        self.step, self._first_step = state["step"], state["step"] + 1


def _sums(one: Mapping[Series, float], other: Mapping[Series, float]) -> dict[Series, float]:
    return {**one, **{series: one.get(series, 0.0) + value for series, value in other.items()}}
