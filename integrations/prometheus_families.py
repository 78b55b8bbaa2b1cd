"""A snapshot in Prometheus' terms: what a scrape is answered with, and what a file for the node exporter holds."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Lock
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from redline.integrations.series_budget import Series, SeriesBudget
from redline.metrics import METRICS, RUN_INFO, Metric
from redline.readings import Snapshot


class SnapshotCollector(Collector):
    """Gives the last snapshot in Prometheus' families, within a budget of series.

    Snapshots are immutable and taken up once a scrape, so that each scrape is of one step. What fits the budget is
    settled at the first scrape of a snapshot, in the scraper's thread: a snapshot that nobody asks for costs nothing.

    Attributes:
        snapshot: to give from now on; None gives nothing.
    """

    def __init__(self, max_series: int) -> None:
        """``max_series``: the budget, see ``SeriesBudget``."""
        self.snapshot: Snapshot | None = None
        self._budget = SeriesBudget(max_series)
        self._fitted: tuple[Snapshot, Series] | None = None
        self._fitting = Lock()

    @property
    def registry(self) -> CollectorRegistry:
        """A registry of this collector alone."""
        registry = CollectorRegistry()
        registry.register(self)
        return registry

    def collect(self) -> Iterator[Family]:
        """The families of the snapshot as it stands."""
        snapshot = self.snapshot
        if snapshot is None:
            return
        series = self._fit(snapshot)
        for metric in METRICS.values():
            if metric is RUN_INFO:
                labels = {name: str(value) for name, value in vars(snapshot.run).items()}
                yield InfoMetricFamily(metric.name.removesuffix("_info"), metric.help, labels)
                continue
            family = _family(metric)
            for values, value in series.get(metric.name, {}).items():
                family.add_metric(values, value)
            yield family

    def _fit(self, snapshot: Snapshot) -> Series:
        with self._fitting:
            if self._fitted is None or self._fitted[0] is not snapshot:
                self._fitted = snapshot, self._budget.fit(snapshot)
            return self._fitted[1]


def _family(metric: Metric) -> Any:
    if metric.kind == "counter":
        return CounterMetricFamily(metric.name.removesuffix("_total"), metric.help, labels=metric.labels)
    return GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)
