"""Metrics over HTTP for Prometheus to scrape."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from threading import Thread
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from redline.errors import ConfigurationError
from redline.integrations.ranks import is_rank_zero
from redline.metrics import METRICS, RUN_INFO, Metric
from redline.readings import Snapshot
from redline.report import StabilityReport
from redline.schedules import Schedule
from redline.sink import Sink


class PrometheusExporter(Sink):
    """Serves ``/metrics`` on rank 0 from the start of the session to its end, in a registry of its own.

    A scrape sees one snapshot, whole. A port in use is a warning, and the run goes on without being served.
    """

    def __init__(self, port: int = 9108, *, address: str = "127.0.0.1", every: int | Schedule = 10) -> None:
        """Serve on a port.

        Args:
            port: 0 picks a free one; ``.port`` says which.
            address: interface to bind; by default this machine only.
            every: schedule on which what is served is brought up to date.
        """
        super().__init__(every)
        if not 0 <= port <= 65535:
            raise ConfigurationError(f"got port {port}; expected 0 (any free one) to 65535.")
        self.port, self.address = port, address
        self._asked = port
        self._collector = _SnapshotCollector()
        self._server: tuple[WSGIServer, Thread] | None = None

    @property
    def url(self) -> str | None:
        """Where metrics are served, or None while they are not."""
        return f"http://{self.address}:{self.port}/metrics" if self._server else None

    def open(self, snapshot: Snapshot) -> None:
        """Start serving."""
        self._collector.snapshot = snapshot
        if not is_rank_zero() or self._server:
            return
        registry = CollectorRegistry()
        registry.register(self._collector)
        try:
            server, thread = start_http_server(self._asked, self.address, registry)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise OSError(
                f"got port {self._asked} on {self.address}, which is in use; expected a free one. The run goes on "
                "without serving metrics: pass another port, or 0 for any free one"
            ) from error
        self.port, self._server = server.server_port, (server, thread)

    def emit(self, snapshot: Snapshot) -> None:
        """Serve this snapshot from now on."""
        self._collector.snapshot = snapshot

    def close(self, report: StabilityReport) -> None:
        """Stop serving, and wait for the server's thread."""
        if self._server:
            server, thread = self._server
            self._server = None
            server.shutdown()
            server.server_close()
            thread.join()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_server": None, "_collector": _SnapshotCollector()}


class _SnapshotCollector(Collector):
    """Gives the last snapshot in Prometheus' families; snapshots are immutable, so a scrape is consistent."""

    def __init__(self) -> None:
        self.snapshot: Snapshot | None = None

    def collect(self) -> Iterator[Family]:
        snapshot = self.snapshot
        if snapshot is None:
            return
        for metric in METRICS.values():
            if metric is RUN_INFO:
                labels = {name: str(value) for name, value in vars(snapshot.run).items()}
                yield InfoMetricFamily(metric.name.removesuffix("_info"), metric.help, labels)
                continue
            family = _family(metric)
            for values, value in snapshot.series(metric.name).items():
                family.add_metric(values, value)
            yield family


def _family(metric: Metric) -> Any:
    if metric.kind == "counter":
        return CounterMetricFamily(metric.name.removesuffix("_total"), metric.help, labels=metric.labels)
    return GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)
