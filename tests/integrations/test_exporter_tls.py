"""Metrics over TLS, with certificates made here: served to those who may see them, and nobody can hold the run up."""

from __future__ import annotations

import pickle
import shutil
import socket
import ssl
import subprocess
import threading
import urllib.error
from pathlib import Path
from typing import Any

import pytest
from scraping import TIMEOUT, Loop, samples, scrape

import redline

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="no `openssl` to make certificates with")


def certificate(folder: Path, name: str, *, passphrase: str | None = None) -> dict[str, str]:
    """A self-signed certificate of this machine's and its key."""
    files = {"certfile": str(folder / f"{name}.pem"), "keyfile": str(folder / f"{name}.key")}
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-days", "2"]
    command += ["-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1", "-out", files["certfile"]]
    command += ["-keyout", files["keyfile"], *(["-passout", f"pass:{passphrase}"] if passphrase else ["-nodes"])]
    subprocess.run(command, check=True, capture_output=True, timeout=TIMEOUT)
    return files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture(scope="module")
def server(folder: Path) -> dict[str, str]:
    return certificate(folder, "server")


@pytest.fixture(scope="module")
def client(folder: Path) -> dict[str, str]:
    return certificate(folder, "client")


def trusting(server: dict[str, str], shows: dict[str, str] | None = None) -> ssl.SSLContext:
    """A client that trusts this server, and shows a certificate of its own."""
    context = ssl.create_default_context(cafile=server["certfile"])
    if shows:
        context.load_cert_chain(**shows)
    return context


def refusal(url: str | None, context: ssl.SSLContext | None = None) -> Exception:
    # With TLS 1.3 a client learns that it was refused when it reads, which some platforms report as a reset.
    with pytest.raises((urllib.error.URLError, ssl.SSLError, ConnectionError)) as error:
        scrape(url, context=context)
    return error.value


def test_metrics_are_served_over_tls(server: dict[str, str]):
    exporter = redline.PrometheusExporter(0, every=1, **server)
    loop = Loop(exporter, monitors=[redline.StepHealth()])
    loop.step()
    assert exporter.url == f"https://127.0.0.1:{exporter.port}/metrics"
    found = samples(scrape(exporter.url, context=trusting(server)))
    loop.session.close()
    assert found["redline_steps_total"][()] == 1
    assert exporter.url is None


def test_a_client_checks_the_server_and_the_server_speaks_nothing_but_tls(
    server: dict[str, str], client: dict[str, str], capfd: pytest.CaptureFixture[str]
):
    exporter = redline.PrometheusExporter(0, **server)
    loop = Loop(exporter, monitors=[])
    stranger = refusal(exporter.url, trusting(client))
    assert "certificate verify failed" in str(stranger)
    with socket.create_connection(("127.0.0.1", exporter.port), timeout=TIMEOUT) as plain:
        plain.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        answer = plain.recv(1000)
    assert b"redline" not in answer
    assert b"HTTP" not in answer
    scrape(exporter.url, context=trusting(server))
    loop.session.close()
    assert capfd.readouterr() == ("", ""), "those who do not speak TLS leave no trace on the run's terminal"


def test_clients_show_a_certificate_where_they_must(folder: Path, server: dict[str, str], client: dict[str, str]):
    exporter = redline.PrometheusExporter(
        0, **server, client_cafile=client["certfile"], client_auth_required=True, every=1
    )
    loop = Loop(exporter, monitors=[redline.StepHealth()])
    loop.step()
    refusal(exporter.url, trusting(server))
    refusal(exporter.url, trusting(server, certificate(folder, "somebody else")))
    found = samples(scrape(exporter.url, context=trusting(server, client)))
    loop.session.close()
    assert found["redline_steps_total"][()] == 1


def test_authorities_may_be_a_folder(folder: Path, server: dict[str, str], client: dict[str, str]):
    authorities = folder / "authorities"
    authorities.mkdir()
    shutil.copy(client["certfile"], authorities)
    hashed = ["openssl", "x509", "-hash", "-noout", "-in", client["certfile"]]
    name = subprocess.run(hashed, check=True, capture_output=True, text=True, timeout=TIMEOUT).stdout.strip()
    (authorities / "client.pem").rename(authorities / f"{name}.0")
    exporter = redline.PrometheusExporter(0, **server, client_capath=str(authorities), client_auth_required=True)
    loop = Loop(exporter, monitors=[])
    refusal(exporter.url, trusting(server))
    assert samples(scrape(exporter.url, context=trusting(server, client)))["redline_steps_total"][()] == 0
    loop.session.close()


def test_a_client_that_never_shakes_hands_holds_up_neither_others_nor_the_end(server: dict[str, str]):
    exporter = redline.PrometheusExporter(0, **server)
    loop = Loop(exporter, monitors=[redline.StepHealth()])
    with socket.create_connection(("127.0.0.1", exporter.port), timeout=TIMEOUT):
        loop.step()
        scrape(exporter.url, context=trusting(server))
        closing = threading.Thread(target=loop.session.close, daemon=True)
        closing.start()
        closing.join(TIMEOUT)
        assert not closing.is_alive()


def test_a_pickle_serves_over_tls_too(server: dict[str, str]):
    exporter = redline.PrometheusExporter(0, **server)
    loop = Loop(pickle.loads(pickle.dumps(exporter)), monitors=[])
    (_, copied), *_ = loop.session._delivery.sinks
    assert "redline_steps_total" in scrape(copied.url, context=trusting(server))
    loop.session.close()


# What cannot work -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"certfile": "a.pem"}, "got certfile='a.pem' and keyfile=None; expected both"),
        ({"keyfile": "a.key"}, "got certfile=None and keyfile='a.key'; expected both"),
        ({"client_auth_required": True}, "got client_auth_required without TLS; pass certfile and keyfile"),
        (
            {"certfile": "a", "keyfile": "b", "client_cafile": "c"},
            "no client would be checked; pass client_auth_required",
        ),
        ({"client_capath": "c"}, "no client would be checked; pass client_auth_required"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(redline.ConfigurationError, match=message):
        redline.PrometheusExporter(**options)


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("missing", "No such file"),
        ("not a certificate", "PEM"),
        ("the key of another", "KEY_VALUES_MISMATCH"),
        ("an encrypted key", r"\(the key is encrypted\)"),  # OpenSSL's own way is to ask at the terminal, and wait
        ("no authority", "no certificate or crl found"),
    ],
)
def test_files_that_cannot_be_used_are_a_warning_and_training_goes_on(
    folder: Path, server: dict[str, str], client: dict[str, str], what: str, why: str
):
    options: dict[str, Any] = {
        "missing": {**server, "certfile": str(folder / "nowhere.pem")},
        "not a certificate": {**server, "certfile": __file__},
        "the key of another": {**server, "keyfile": client["keyfile"]},
        "an encrypted key": certificate(folder, "encrypted", passphrase="secret"),
        "no authority": {**server, "client_cafile": __file__, "client_auth_required": True},
    }[what]
    exporter = redline.PrometheusExporter(0, **options)
    with pytest.warns(redline.RedlineWarning, match=f"which cannot be used .*{why}.*; expected PEM files, the key not"):
        loop = Loop(exporter, monitors=[redline.StepHealth()])
    assert exporter.url is None
    loop.step()
    loop.session.close()
    assert loop.session.report().steps == 1
