"""Reading a snapshot back out of an exposition, and fetching one."""

from __future__ import annotations

import math
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from torch import nn

import redline
from redline.errors import ConfigurationError
from redline.integrations.watch.exposition import UnreachableError, fetch, snapshot_of
from redline.readings import RunInfo, Series

TEXT = """\
# HELP redline_steps_total Optimizer steps taken.
# TYPE redline_steps_total counter
redline_steps_total 12.0
# TYPE redline_loss gauge
redline_loss NaN
# TYPE redline_weight_spectral_norm gauge
redline_weight_spectral_norm{layer="a\\"b\\\\c"} 2.5
redline_weight_spectral_norm{layer="d"} +Inf
# TYPE redline_interventions_total counter
redline_interventions_total{action="scale",controller="StepClamp"} 3.0
# TYPE redline_last_step_timestamp_seconds gauge
redline_last_step_timestamp_seconds 1.7e+09
# TYPE redline_run_info gauge
redline_run_info{precision="float32",run="mine",strategy="ddp",version="0.1",world_size="4"} 1.0
# TYPE process_cpu_seconds_total counter
process_cpu_seconds_total 3.0
# TYPE redline_of_tomorrow gauge
redline_of_tomorrow{kind="x"} 1.0
"""


def test_every_line_of_ours_is_read():
    snapshot = snapshot_of(TEXT, "there")
    assert (snapshot.step, snapshot.time) == (11, 1.7e9)
    assert snapshot.run == RunInfo("mine", "0.1", "float32", "ddp", 4)
    assert snapshot.layers("redline_weight_spectral_norm") == {'a"b\\c': 2.5, "d": math.inf}
    assert snapshot.value("redline_interventions_total", controller="StepClamp", action="scale") == 3.0
    assert math.isnan(snapshot.value("redline_loss"))


def test_what_is_not_ours_is_passed_over():
    assert {series.metric for series in snapshot_of(TEXT, "there").values} == {
        "redline_steps_total",
        "redline_loss",
        "redline_weight_spectral_norm",
        "redline_interventions_total",
        "redline_last_step_timestamp_seconds",
    }


@pytest.mark.parametrize("text", ["", "# TYPE x gauge\nx 1.0\n", "redline_loss 1.0\n"])
def test_an_exposition_of_another_program_is_refused(text: str):
    with pytest.raises(ConfigurationError, match=r"without redline_steps_total from there; .*another program"):
        snapshot_of(text, "there")


@pytest.mark.parametrize("text", ["<html><body>hello</body></html>", 'redline_loss{a="} 1', "\x00\x01\x02 {"])
def test_something_else_is_refused(text: str):
    with pytest.raises(ConfigurationError, match="from there"):
        snapshot_of(text, "there")


def test_what_the_exporter_serves_is_what_the_session_knows():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    exporter = redline.PrometheusExporter(port=0, every=1)
    with redline.attach(model, optimizer, sinks=[exporter], run="mine") as session:
        for _ in range(3):
            loss = model(torch.randn(8, 5)).logsumexp(-1).mean()
            session.observe(loss=loss)
            loss.backward()
            optimizer.step()
        known = session.latest
        assert exporter.url is not None
        seen = fetch(exporter.url)
    assert (seen.step, seen.run) == (known.step, known.run)
    steady = {one: value for one, value in known.values.items() if "ratio" not in one.metric or one.labels}
    assert {one: seen.values[one] for one in steady} == pytest.approx(steady)
    assert seen.time == seen.values[Series("redline_last_step_timestamp_seconds")]


# Over HTTP -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/metrics" else 404)
            self.end_headers()
            self.wfile.write(TEXT.encode() if self.path == "/metrics" else b"no")

        def log_message(self, *_: object) -> None:
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    http.server_close()
    thread.join()


def test_a_page_is_fetched(server: str):
    assert fetch(f"{server}/metrics").step == 11


def test_another_path_is_refused(server: str):
    with pytest.raises(ConfigurationError, match=r"got status 404 .* /metrics"):
        fetch(f"{server}/other")


def test_a_port_that_nobody_serves_is_unreachable():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/metrics"
    with pytest.raises(UnreachableError, match=f"{url}: .*refused"):
        fetch(url)


@pytest.mark.parametrize("url", ["http://127.0.0.1:notaport/metrics", "http://[::1/metrics"])
def test_a_malformed_address_is_refused(url: str):
    with pytest.raises(ConfigurationError, match="which is none"):
        fetch(url)
