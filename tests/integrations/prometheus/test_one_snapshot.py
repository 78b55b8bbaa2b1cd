"""What a scrape sees is one snapshot, whole, of the run that is served, renewed as the schedule says."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from exporter_runs import PER_LAYER, every_step, report_nothing, snapshot_of
from scraping import TIMEOUT, Loop, samples, scrape

import redline
from redline.readings import Snapshot


@pytest.mark.parametrize("max_series", [2000, 300])
def test_a_scrape_sees_one_snapshot(max_series: int):
    snapshots = [snapshot_of(value) for value in range(1, 60)]
    exporter = redline.PrometheusExporter(port=0, max_series=max_series)
    exporter.open(snapshots[0])
    done = threading.Event()
    seen = []

    def emit() -> None:
        while not done.is_set():
            for snapshot in snapshots:
                exporter.emit(snapshot)

    def scrape_once() -> float:
        found = samples(scrape(exporter.url))
        (folded,) = found.pop("redline_folded_layers").values()
        assert folded == 200 - len(found[PER_LAYER[0]])
        assert (folded > 0) is (max_series < 1400)
        assert sum(map(len, found.values())) < max_series
        values = {value for name in found if name != "redline_run_info" for value in found[name].values()}
        assert len(values) == 1
        return values.pop()

    emitting = threading.Thread(target=emit)
    emitting.start()
    try:
        with ThreadPoolExecutor(3) as scrapers:
            seen = [scrape.result(TIMEOUT) for scrape in [scrapers.submit(scrape_once) for _ in range(25)]]
    finally:
        done.set()
        emitting.join(TIMEOUT)
        report_nothing(exporter)
    assert len(set(seen)) > 1


class Kept(redline.Sink):
    """Keeps every snapshot, by the number of steps taken."""

    def __init__(self) -> None:
        super().__init__(every=1)
        self.snapshots: dict[float, Snapshot] = {}

    def emit(self, snapshot: Snapshot) -> None:
        self.snapshots[snapshot.value("redline_steps_total")] = snapshot


def test_what_is_scraped_while_a_run_trains_belongs_to_one_step_of_it():
    exporter, kept = redline.PrometheusExporter(port=0, every=1), Kept()
    loop = Loop(exporter, kept, monitors=every_step())
    done = threading.Event()
    pages: list[str] = []

    def scrape_on() -> None:
        while not done.is_set():
            pages.append(scrape(exporter.url))

    with ThreadPoolExecutor(2) as scrapers:
        scraping = [scrapers.submit(scrape_on) for _ in range(2)]
        try:
            losses = [loop.step() for _ in range(150)]
        finally:
            done.set()
    loop.session.close()
    for scraper in scraping:
        scraper.result(TIMEOUT)
    seen = set()
    for found in map(samples, pages):
        (step,) = found["redline_steps_total"].values()
        if step:
            seen.add(step)
            del found["redline_run_info"], found["redline_folded_layers"]
            assert found["redline_loss"][()] == pytest.approx(losses[int(step) - 1])
            for name, series in found.items():
                by_values = {
                    tuple(dict(labels)[one] for one in redline.METRICS[name].labels): labels for labels in series
                }
                expected = kept.snapshots[step].series(name)
                assert {values: series[labels] for values, labels in by_values.items()} == expected, name
    assert len(seen) > 5


def test_the_schedule_says_when_what_is_served_changes():
    exporter = redline.PrometheusExporter(port=0, every=3)
    loop = Loop(exporter, monitors=[redline.StepHealth()])
    steps = []
    for _ in range(5):
        loop.step()
        steps.append(samples(scrape(exporter.url))["redline_steps_total"][()])
    loop.session.close()
    assert steps == [1, 1, 1, 4, 4]


def test_an_exporter_that_serves_a_second_run_has_forgotten_the_first():
    exporter = redline.PrometheusExporter(port=0, every=1)
    first = Loop(exporter, monitors=[redline.StepHealth()], run="first")
    first.step()
    first.session.close()
    second = Loop(exporter, monitors=[redline.StepHealth()], run="second")
    before = samples(scrape(exporter.url))
    second.step()
    after = samples(scrape(exporter.url))
    second.session.close()
    assert [dict(labels)["run"] for labels in before["redline_run_info"]] == ["second"]
    assert "redline_loss" not in before
    assert after["redline_steps_total"][()] == 1
