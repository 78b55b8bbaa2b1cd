"""Metrics over HTTP for Prometheus to scrape."""

from __future__ import annotations

import errno
from threading import Thread
from typing import Any
from wsgiref.simple_server import WSGIServer

from redline.errors import ConfigurationError
from redline.integrations import metrics_server
from redline.integrations.prometheus_families import SnapshotCollector
from redline.integrations.ranks import is_rank_zero, local_rank
from redline.integrations.series_budget import DEFAULT_MAX_SERIES
from redline.readings import Snapshot
from redline.report import StabilityReport
from redline.schedules import Schedule
from redline.sink import Sink


class PrometheusExporter(Sink):
    """Serves ``/metrics`` from the start of the session to its end, in a registry of its own; by default on rank 0.

    A scrape sees one snapshot, whole. A port in use is a warning, and the run goes on without being served. Over many
    series, the worst layers are served by name and the others folded (see ``SeriesBudget``).
    """

    def __init__(
        self,
        port: int = 9108,
        *,
        address: str = "127.0.0.1",
        every: int | Schedule = 10,
        max_series: int = DEFAULT_MAX_SERIES,
        all_ranks: bool = False,
        certfile: str | None = None,
        keyfile: str | None = None,
        client_cafile: str | None = None,
        client_capath: str | None = None,
        client_auth_required: bool = False,
    ) -> None:
        """Serve on a port.

        Args:
            port: 0 picks a free one; ``.port`` says which.
            address: interface to bind; by default this machine only.
            every: schedule on which what is served is brought up to date.
            max_series: the most series to serve, of this process; at least 100.
            all_ranks: whether each rank serves what it measured, on ``port`` plus its place on its machine (what
                torchrun calls LOCAL_RANK), and not rank 0 alone. Losses are each rank's own.
            certfile: the server's certificate, a PEM file; serves over TLS.
            keyfile: its key, not encrypted.
            client_cafile: a PEM file of the authorities whose clients are let in.
            client_capath: the same as a folder.
            client_auth_required: whether a client must show a certificate.

        Raises:
            ConfigurationError: a port or a budget out of range, or options of TLS that do not go together.
        """
        super().__init__(every)
        if not 0 <= port <= 65535:
            raise ConfigurationError(f"got port {port}; expected 0 (any free one) to 65535.")
        self.port, self.address = port, address
        self.max_series, self.all_ranks = max_series, all_ranks
        self._asked = port
        self._tls = metrics_server.Tls(certfile, keyfile, client_cafile, client_capath, client_auth_required)
        self._collector = SnapshotCollector(max_series)
        self._server: tuple[WSGIServer, Thread] | None = None

    @property
    def url(self) -> str | None:
        """Where metrics are served, or None while they are not."""
        scheme = "https" if self._tls.certfile else "http"
        return f"{scheme}://{self.address}:{self.port}/metrics" if self._server else None

    def open(self, snapshot: Snapshot) -> None:
        """Start serving."""
        if self._server is None:
            self._collector = SnapshotCollector(self.max_series)
            if self.all_ranks or is_rank_zero():
                self._serve(self._port())
        self._collector.snapshot = snapshot

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

    def _port(self) -> int:
        """0 stays 0: any free one."""
        port = self._asked + local_rank() if self.all_ranks and self._asked else self._asked
        if port > 65535:
            raise ConfigurationError(f"got port {self._asked} and local rank {local_rank()}; expected at most 65535.")
        return port

    def _serve(self, port: int) -> None:
        try:
            self._server = metrics_server.start(port, self.address, self._collector.registry, self._tls)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise OSError(
                f"got port {port} on {self.address}, which is in use; expected a free one. The run goes on "
                "without serving metrics: pass another port, or 0 for any free one"
            ) from error
        self.port = self._server[0].server_port

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_server": None, "_collector": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._collector = SnapshotCollector(self.max_series)
