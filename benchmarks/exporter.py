"""What a scrape takes, and what being scraped does to the steps of a run, by the number of series.

    python benchmarks/exporter.py --write
    python benchmarks/exporter.py --quick

A byte-level model is in training, with an exporter that serves as many series as asked for; the layers they name are
made up, so that the model is the same at each number. A scraper in another process scrapes every second, every 15
seconds or not at all, a while each in turn.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from frame import Benchmark, Page, Setting, median_and_spread
from pairs import Trainer, byte_level
from torch import Tensor

import redline
from redline import metrics

_METRICS = [metric for metric in metrics.METRICS.values() if metric.labels == ("layer",)][:7]
_FOLD_INTO = 1000


class MadeUpLayers(redline.Monitor):
    """As many per-layer series as asked for, of made-up layers, whose values change."""

    def __init__(self, series: int) -> None:
        super().__init__(every=10)
        names = [f"blocks.{k}.attention.qkv.weight" for k in range(-(-series // len(_METRICS)))]
        self._names = [names[: (series + k) // len(_METRICS)] for k in range(len(_METRICS))]
        self._values = torch.rand(len(names), generator=torch.Generator().manual_seed(0))

    def measure(self, step, readings) -> None:
        for metric, names in zip(_METRICS, self._names, strict=True):
            readings.layers(metric, names, self._values.roll(step.index)[: len(names)])


class Scraper:
    """Another process that scrapes when told to."""

    def __init__(self, url: str) -> None:
        command = [sys.executable, str(Path(__file__).with_name("scraper.py")), url]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(self, interval: float) -> None:
        self._process.stdin.write(f"start {interval}\n")
        self._process.stdin.flush()

    def stop(self) -> tuple[list[float], str]:
        """Seconds of each scrape since the start, and the last page."""
        self._process.stdin.write("stop\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return answer["seconds"], answer["page"]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


class Run:
    """A training whose exporter serves so many series, or folds them."""

    def __init__(self, series: int, options: argparse.Namespace, *, max_series: int | None = None) -> None:
        self._workload, self._windows = byte_level(options.batch), torch.Generator().manual_seed(0)
        self._trainer = Trainer(self._workload.model, options.device)
        self._exporter = redline.PrometheusExporter(0, max_series=max_series or max(2 * series, 100))
        self._attach([])
        self.step()
        others = len(self._trainer.session.latest.values) + 2  # redline_run_info and redline_folded_layers
        self._trainer.session.close()
        self._attach([MadeUpLayers(series - others - 2)])  # two counters say how often it measured, and was put off
        for _ in range(5):
            self.step()
        self.scraper = Scraper(self._exporter.url)

    def _attach(self, monitors: list[redline.Monitor]) -> None:
        model, optimizer = self._trainer.model, self._trainer.optimizer
        self._trainer.session = redline.attach(model, optimizer, monitors=monitors, sinks=[self._exporter])

    def step(self) -> None:
        self._trainer.step(*self._workload.batches(self._windows))

    def show_anew(self) -> None:
        """As after another step: nothing prepared for the last snapshot is of use."""
        self._exporter.emit(dataclasses.replace(self._trainer.session.latest))

    def for_a_while(self, seconds: float, *, scraped: bool) -> tuple[float, list[float]]:
        """Train for so long, scraped at the start of it or not; seconds a step, and those that the scraper waited."""
        if scraped:
            self.scraper.start(seconds)
        started, steps = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            self.step()
            steps += 1
        a_step = (time.perf_counter() - started) / steps
        return a_step, self.scraper.stop()[0] if scraped else []

    def close(self) -> None:
        self.scraper.close()
        self._trainer.session.close()


def scraped_alone(run: Run, scrapes: int) -> tuple[list[float], float, str]:
    """Seconds of so many scrapes while nothing is trained, each of a new snapshot, this process' in all, and a page."""
    started = time.process_time()
    run.scraper.start(0.2)
    for _ in range(2 * scrapes):
        run.show_anew()
        time.sleep(0.1)
    waited, page = run.scraper.stop()
    return waited, time.process_time() - started, page


def compare(run: Run, seconds: float, pairs: int) -> tuple[Tensor, list[float]]:
    """Seconds a step without scrapes and with one every so many seconds, ``(pairs, 2)``, and those the scraper waited.

    The order turns over from pair to pair.
    """
    steps, waited = torch.zeros(pairs, 2, dtype=torch.float64), []
    for pair in range(pairs):
        for scraped in (False, True) if pair % 2 else (True, False):
            steps[pair, int(scraped)], scrapes = run.for_a_while(seconds, scraped=scraped)
            waited += scrapes
    return steps, waited


def ratio(steps: Tensor, draws: int = 2_000) -> str:
    """Scraped over not scraped, and its bootstrap 95 % interval over pairs."""
    drawn = torch.randint(len(steps), (draws, len(steps)), generator=torch.Generator().manual_seed(0))
    sums = steps[drawn].sum(1)
    low, high = (sums[:, 1] / sums[:, 0]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    free, scraped = steps.sum(0).tolist()
    return f"{scraped / free:.3f} ({low:.3f} – {high:.3f})"


def measure(page: Page, name: str, run: Run, options: argparse.Namespace) -> None:
    alone, computed, text = scraped_alone(run, options.scrapes)
    often, in_training = compare(run, 1.0, options.pairs)
    seldom, _ = compare(run, float(options.seldom), options.long_pairs)
    run.close()
    page.row(
        name,
        str(sum(1 for line in text.splitlines() if not line.startswith("#"))),
        f"{len(text) / 1e3:.0f} kB",
        *(f"{one} ms" for one in median_and_spread([1e3 * one for one in alone], ".1f")),
        f"{1e3 * computed / len(alone):.1f} ms",
        *(f"{one} ms" for one in median_and_spread([1e3 * one for one in in_training], ".1f")),
        f"{often[:, 0].median() * 1e3:.1f} ms",
        ratio(often),
        ratio(seldom),
    )


def run(page: Page, options: argparse.Namespace) -> None:
    page.text(
        f"ByteLM in training, batch {options.batch} x 64 bytes, AdamW, {options.device}; series of made-up layers, "
        f"measured and served anew every 10 steps. Per number of series {options.pairs} pairs of a second without a "
        f"scrape and one with, and {options.long_pairs} of {options.seldom} s, interleaved: time of a step, scraped "
        "over not, and a bootstrap 95 % interval over pairs. A scrape takes what another process waits for the page; "
        "alone: while nothing is trained; CPU time is that of the process that trains. Nothing trimmed."
    )
    page.table(
        "case", "series on the page", "page", "a scrape alone: median", "min – max", "CPU time of it",
        "a scrape in training: median", "min – max", "a step without scrapes", "scraped every second",
        f"scraped every {options.seldom} s",
    )  # fmt: skip
    for series in options.series:
        if options.only in (name := f"{series:,} series"):
            measure(page, name, Run(series, options), options)
    if options.only in (name := f"{max(options.series):,} series, max_series={_FOLD_INTO}"):
        measure(page, name, Run(max(options.series), options, max_series=_FOLD_INTO), options)


benchmark = Benchmark(
    "exporter",
    "The Prometheus exporter: scrapes, and steps that are scraped",
    run,
    {
        "series": Setting([100, 1000, 3000], [100, 3000], "numbers of series"),
        "pairs": Setting(40, 2, "pairs of a second"),
        "seldom": Setting(15, 2, "seconds between scrapes that are seldom"),
        "long_pairs": Setting(4, 1, "pairs of so many seconds"),
        "scrapes": Setting(25, 5, "alone"),
        "batch": Setting(32, 8, "sequences of 64 bytes"),
    },
    "a quarter of an hour",
)

if __name__ == "__main__":
    benchmark.main()
