"""On which port and address, and on which rank, metrics are served."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from exporter_runs import fit, refused, report_nothing, snapshot_of
from lightning_runs import QUIET
from scraping import Loop, scrape

import redline
from redline.integrations.lightning import RedlineCallback

pytestmark = QUIET


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody else listens on."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def test_a_port_in_use_is_a_warning_and_training_goes_on(taken: int):
    exporter = redline.PrometheusExporter(port=taken)
    with pytest.warns(redline.RedlineWarning, match=f"got port {taken} on 127.0.0.1, which is in use.*another port"):
        loop = Loop(exporter, monitors=[redline.StepHealth()])
    assert exporter.url is None
    for _ in range(3):
        loop.step()
    loop.session.close()
    assert loop.session.report().steps == 3
    assert any("in use" in note for note in loop.session.notes)


def test_a_port_in_use_does_not_end_a_fit(taken: int):
    callback = RedlineCallback(sinks=[redline.PrometheusExporter(port=taken)])
    with pytest.warns(redline.RedlineWarning, match="in use"):
        module = fit(callback, {})
    assert len(module.losses) == 6


def test_port_0_gives_each_a_free_one():
    exporters = [redline.PrometheusExporter(port=0, every=1) for _ in range(2)]
    loop = Loop(*exporters, monitors=[redline.StepHealth()])
    loop.step()
    texts = [scrape(exporter.url) for exporter in exporters]
    ports = {exporter.port for exporter in exporters}
    loop.session.close()
    assert len(ports) == 2
    assert 0 not in ports
    assert texts[0] == texts[1]


def test_a_port_that_was_asked_for_is_the_one(taken: int):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    exporter = redline.PrometheusExporter(port=port)
    loop = Loop(exporter, monitors=[redline.StepHealth()])
    assert exporter.url == f"http://127.0.0.1:{port}/metrics"
    assert not refused(port)
    loop.session.close()


@pytest.mark.parametrize("port", [-1, 65536, 910_800])
def test_a_port_out_of_range_is_refused(port: int):
    with pytest.raises(redline.ConfigurationError, match=rf"got port {port}; expected 0 .* to 65535"):
        redline.PrometheusExporter(port=port)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere 127.0.0.2 is no address of this machine")
def test_only_this_machine_is_served_unless_told():
    shy, open_to_all = redline.PrometheusExporter(port=0), redline.PrometheusExporter(port=0, address="0.0.0.0")
    loop = Loop(shy, open_to_all, monitors=[redline.StepHealth()])
    reachable = not refused(shy.port), not refused(shy.port, "127.0.0.2"), not refused(open_to_all.port, "127.0.0.2")
    loop.session.close()
    assert reachable == (True, False, True)


@pytest.mark.parametrize(("rank", "serves"), [(0, True), (1, False)])
def test_only_rank_0_serves(monkeypatch: pytest.MonkeyPatch, rank: int, serves: bool):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *_: rank)
    threads = set(threading.enumerate())
    exporter = redline.PrometheusExporter(port=0)
    exporter.open(snapshot_of(0.0, layers=1))
    exporter.emit(snapshot_of(1.0, layers=1))
    assert (exporter.url is not None) is serves
    assert (set(threading.enumerate()) > threads) is serves
    monkeypatch.undo()
    report_nothing(exporter)
