"""The server that a scraper asks: the Prometheus client's own, plain or over TLS."""

from __future__ import annotations

import ssl
import sys
from dataclasses import asdict, dataclass
from threading import Thread
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server

from redline.errors import ConfigurationError


@dataclass(frozen=True)
class Tls:
    """What ``prometheus_client.start_http_server`` is told of TLS, under the same names; without a certificate, none.

    Attributes:
        certfile: the server's certificate, a PEM file.
        keyfile: its key, not encrypted.
        client_cafile: the authorities whose clients are let in, a PEM file.
        client_capath: the same as a folder.
        client_auth_required: whether a client must show a certificate.
    """

    certfile: str | None = None
    keyfile: str | None = None
    client_cafile: str | None = None
    client_capath: str | None = None
    client_auth_required: bool = False

    def __post_init__(self) -> None:
        if bool(self.certfile) != bool(self.keyfile):
            raise ConfigurationError(
                f"got certfile={self.certfile!r} and keyfile={self.keyfile!r}; expected both, or neither to serve "
                "without TLS."
            )
        if self.client_auth_required and not self.certfile:
            raise ConfigurationError("got client_auth_required without TLS; pass certfile and keyfile too.")
        if (self.client_cafile or self.client_capath) and not self.client_auth_required:
            raise ConfigurationError(
                f"got client_cafile={self.client_cafile!r} and client_capath={self.client_capath!r}, by which no "
                "client would be checked; pass client_auth_required=True too."
            )

    def check(self) -> None:
        """Read the files, so that what is wrong with them is known before a port is taken.

        Raises:
            OSError: one is missing, or is not what it should be.
        """
        if not self.certfile:
            return
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.certfile, self.keyfile, password=_refuse_to_ask)
            if self.client_cafile or self.client_capath:
                context.load_verify_locations(self.client_cafile, self.client_capath)
        except OSError as error:
            raise OSError(
                f"got {self}, which cannot be used ({error}); expected PEM files, the key not encrypted. The run goes "
                "on without serving metrics"
            ) from error


def start(port: int, address: str, registry: CollectorRegistry, tls: Tls) -> tuple[WSGIServer, Thread]:
    """Serve a registry from a thread of its own; a client that is slow, silent or gone holds nobody up.

    Raises:
        OSError: the port is in use, or the files of TLS cannot be used.
    """
    tls.check()
    server, thread = start_http_server(port, address, registry, **asdict(tls))
    if isinstance(server.socket, ssl.SSLSocket):
        # Or else hands are shaken where connections are accepted, and a client that sends nothing stops them all.
        vars(server.socket)["do_handshake_on_connect"] = False

    def handle_error(request: Any, client_address: Any) -> None:
        # A client that hung up or did not speak TLS is nothing to fill the run's terminal with.
        if not isinstance(sys.exc_info()[1], OSError):
            type(server).handle_error(server, request, client_address)

    vars(server)["handle_error"] = handle_error
    return server, thread


def _refuse_to_ask() -> str:
    """OpenSSL would ask at the terminal, and the run would wait."""
    raise OSError("the key is encrypted")
