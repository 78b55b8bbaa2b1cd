"""When the run is over, nothing is left of what served it: no thread, no socket, no port."""

from __future__ import annotations

import socket
import threading

from exporter_runs import refused
from scraping import TIMEOUT, Loop, scrape

import redline


def test_after_close_no_thread_and_no_socket_is_left():
    threads = set(threading.enumerate())
    exporter = redline.PrometheusExporter(port=0)
    loop = Loop(exporter, monitors=[redline.StepHealth()])
    loop.step()
    scrape(exporter.url)
    assert set(threading.enumerate()) > threads
    loop.session.close()
    assert set(threading.enumerate()) <= threads
    assert exporter.url is None
    assert refused(exporter.port)
    loop.session.close()  # again: nothing


def test_the_port_is_free_for_the_next_run_at_once():
    exporter = redline.PrometheusExporter(port=0)
    Loop(exporter, monitors=[redline.StepHealth()]).session.close()
    again = redline.PrometheusExporter(port=exporter.port)
    loop = Loop(again, monitors=[redline.StepHealth()])
    assert not refused(again.port)
    loop.session.close()


def test_a_client_that_says_nothing_does_not_keep_the_run_from_ending():
    exporter = redline.PrometheusExporter(port=0)
    loop = Loop(exporter, monitors=[redline.StepHealth()])
    with socket.create_connection(("127.0.0.1", exporter.port), timeout=TIMEOUT):
        loop.step()
        scrape(exporter.url)  # and others are served meanwhile
        closing = threading.Thread(target=loop.session.close, daemon=True)
        closing.start()
        closing.join(TIMEOUT)
        assert not closing.is_alive()
