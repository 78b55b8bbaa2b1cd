"""A pickle of an exporter that serves is closed, and serves when it is opened itself."""

from __future__ import annotations

import pickle

from exporter_runs import report_nothing
from scraping import Loop, samples, scrape

import redline


def test_a_pickle_of_an_open_exporter_is_closed_and_the_original_goes_on():
    exporter = redline.PrometheusExporter(port=0, every=2)
    loop = Loop(exporter, monitors=[redline.StepHealth()])
    loop.step()
    copied = pickle.loads(pickle.dumps(exporter))
    assert copied.url is None
    assert copied.address == exporter.address
    assert [copied.due(step) for step in range(4)] == [True, False, True, False]
    assert samples(scrape(exporter.url))["redline_steps_total"][()] == 1
    report_nothing(copied)
    assert samples(scrape(exporter.url))["redline_steps_total"][()] == 1
    loop.session.close()

    second = Loop(copied, monitors=[redline.StepHealth()])
    second.step()
    assert samples(scrape(copied.url))["redline_steps_total"][()] == 1
    second.session.close()


def test_a_pickle_of_an_exporter_on_any_free_port_takes_another_one():
    exporter = redline.PrometheusExporter(port=0)
    loop = Loop(exporter, monitors=[redline.StepHealth()])
    copied = pickle.loads(pickle.dumps(exporter))
    second = Loop(copied, monitors=[redline.StepHealth()])
    served = copied.url
    second.session.close()
    loop.session.close()
    assert served is not None
    assert copied.port != exporter.port
