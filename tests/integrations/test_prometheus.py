"""Metrics over HTTP, as a scraper sees them: complete, well-formed, consistent, and gone when the run is over."""

from __future__ import annotations

import math
import pickle
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from prometheus_client.openmetrics import parser as openmetrics_parser
from scraping import RUN, TIMEOUT, Loop, families, samples, scrape
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import redline
from redline.integrations.lightning import RedlineCallback
from redline.readings import Series, Snapshot

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

OPENMETRICS = "application/openmetrics-text; version=1.0.0"

PER_LAYER = (
    "redline_weight_spectral_norm",
    "redline_weight_spectral_residual",
    "redline_weight_stable_rank",
    "redline_weight_spectral_condition",
    "redline_update_spectral_norm",
    "redline_update_spectral_condition",
    "redline_update_to_weight_ratio",
)
OF_THE_STEP = (
    "redline_update_norm",
    "redline_ghost_radius",
    "redline_normalized_step_size",
    "redline_committed_step_size",
    "redline_step_scale",
    "redline_loss",
    "redline_gradient_norm",
    "redline_overhead_ratio",
    "redline_last_step_timestamp_seconds",
)
COUNTERS = {
    "redline_steps_total": set(),
    "redline_interventions_total": {"controller", "action"},
    "redline_nonfinite_total": {"source"},
    "redline_measurements_total": {"monitor"},
    "redline_tangent_fallbacks_total": {"method"},
}
LABELS: dict[str, set[str]] = {
    **{name: {"layer"} for name in PER_LAYER},
    **{name: set() for name in OF_THE_STEP},
    "redline_learning_rate": {"optimizer", "group"},
    "redline_weight_decay": {"optimizer", "group"},
    **COUNTERS,
    "redline_run_info": {"run", "version", "precision", "strategy", "world_size"},
}
"""Every metric of the design and its labels."""


@pytest.fixture(autouse=True)
def one_thread_and_seeded() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def refused(port: int, address: str = "127.0.0.1") -> bool:
    try:
        socket.create_connection((address, port), timeout=TIMEOUT).close()
    except ConnectionRefusedError:
        return True
    return False


# What is scraped -----------------------------------------------------------------------------------------------------


class ScaleOnce(redline.Controller):
    """Halves step 2."""

    def inspect(self, step: redline.Step) -> list[redline.Scale]:
        return [redline.Scale(0.5, "to see it")] if step.index == 2 else []


class Classifier(pl.LightningModule):
    """Two layers, called as ``self.net``."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)


class At(pl.Callback):
    """Calls somebody at a moment of a fit: "start" for before the first step, or a number of steps taken."""

    def __init__(self, moments: Mapping[str | int, Callable[[], None]]) -> None:
        self.moments = moments

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 0:
            self.moments.get("start", lambda: None)()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.moments.get(trainer.global_step, lambda: None)()


def fit(callback: RedlineCallback, moments: Mapping[str | int, Callable[[], None]], steps: int = 6) -> Classifier:
    """Fit with something called at moments, after the callback."""
    module = Classifier()
    x, y = torch.randn(8 * steps, 6), torch.randint(3, (8 * steps,))
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback, At(moments)],
    )
    trainer.fit(module, DataLoader(TensorDataset(x, y), batch_size=8))
    return module


def every_step() -> list[redline.Monitor]:
    return [
        redline.WeightSpectrum(every=1),
        redline.UpdateSpectrum(every=1),
        redline.GhostRadius(every=1),
        redline.StepHealth(),
    ]


# During a fit --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scraped() -> tuple[dict[str, str], Classifier, str]:
    """What was served in a fit: before its first step, after the third, which was scaled, and after the twelfth."""
    torch.manual_seed(0)
    exporter = redline.PrometheusExporter(port=0, every=1)
    callback = RedlineCallback(
        monitors=every_step(), controllers=[ScaleOnce()], sinks=[exporter], run='a "run" of\\mine', module="net"
    )
    texts: dict[str, str] = {}

    def take(name: str, accept: str = "text/plain") -> Callable[[], None]:
        # By a client in another thread, as a scraper is another process.
        def taking() -> None:
            with ThreadPoolExecutor(1) as client:
                texts[name] = client.submit(scrape, exporter.url, accept).result(TIMEOUT)

        return taking

    def twice() -> None:
        take("12")()
        take("openmetrics", OPENMETRICS)()

    module = fit(callback, {"start": take("start"), 3: take("3"), 12: twice}, steps=13)
    assert callback.session is not None
    return texts, module, callback.session.latest.run.version


def test_every_metric_of_the_design_is_served(scraped: Any):
    found = samples(scraped[0]["12"])
    assert set(LABELS) - set(found) == set()


def test_labels_are_those_of_the_design(scraped: Any):
    for name, series in samples(scraped[0]["12"]).items():
        if name in LABELS:
            for labels in series:
                assert {label for label, _ in labels} == LABELS[name], name


def test_counters_are_counters_and_gauges_gauges(scraped: Any):
    types = {sample.name: family.type for family in families(scraped[0]["12"]) for sample in family.samples}
    for name in LABELS:
        expected = "counter" if name in COUNTERS else "gauge"  # the text format has no type for info
        assert types[name] == expected, name


def test_each_metric_says_what_it_is(scraped: Any):
    for family in families(scraped[0]["12"]):
        assert family.name.startswith("redline_")
        assert len(family.documentation) > 5


def test_layers_are_the_models_matrices(scraped: Any):
    found = samples(scraped[0]["12"])
    for name in PER_LAYER:
        assert set(found[name]) == {(("layer", "net.0.weight"),), (("layer", "net.2.weight"),)}


def test_labels_hold_the_right_values(scraped: Any):
    texts, _, version = scraped
    found = samples(texts["12"])
    assert found["redline_learning_rate"] == {(("group", "0"), ("optimizer", "AdamW")): 0.01}
    assert found["redline_weight_decay"] == {(("group", "0"), ("optimizer", "AdamW")): 0.1}
    assert found["redline_interventions_total"][("action", "scale"), ("controller", "ScaleOnce")] == 1
    assert {labels[0][1] for labels in found["redline_nonfinite_total"]} == {"loss", "gradient", "update", "weight"}
    assert set(found["redline_measurements_total"].items()) == {
        ((("monitor", name),), 12.0) for name in ("WeightSpectrum", "UpdateSpectrum", "GhostRadius", "StepHealth")
    }
    ((info, one),) = found["redline_run_info"].items()
    assert one == 1
    assert dict(info) == {
        "run": 'a "run" of\\mine',
        "version": version,
        "precision": "32-true",
        "strategy": "SingleDeviceStrategy",
        "world_size": "1",
    }


def test_values_are_those_of_the_last_step(scraped: Any):
    texts, module, _ = scraped
    for name in ("3", "12"):
        found = samples(texts[name])
        assert found["redline_steps_total"][()] == int(name)
        assert found["redline_loss"][()] == pytest.approx(module.losses[int(name) - 1])
    scaled, free = samples(texts["3"]), samples(texts["12"])
    assert (scaled["redline_step_scale"][()], free["redline_step_scale"][()]) == (0.5, 1.0)
    r = "redline_normalized_step_size"
    assert scaled["redline_committed_step_size"][()] == pytest.approx(0.5 * scaled[r][()])
    assert free["redline_committed_step_size"][()] == pytest.approx(free[r][()])
    assert free[r][()] == pytest.approx(free["redline_update_norm"][()] / free["redline_ghost_radius"][()])


def test_the_openmetrics_parser_accepts_it_too(scraped: Any):
    texts, _, _ = scraped
    assert texts["openmetrics"].endswith("# EOF\n")
    found = {
        sample.name: sample.value
        for family in openmetrics_parser.text_string_to_metric_families(texts["openmetrics"])
        for sample in family.samples
        if not sample.labels
    }
    plain = {name: series[()] for name, series in samples(texts["12"]).items() if () in series}
    assert found == plain
    types = {
        family.name: family.type for family in openmetrics_parser.text_string_to_metric_families(texts["openmetrics"])
    }
    assert (types["redline_steps"], types["redline_loss"], types["redline_run"]) == ("counter", "gauge", "info")


@pytest.mark.parametrize("name", ["start", "3", "openmetrics"])
def test_there_are_no_created_series(scraped: Any, name: str):
    assert "_created" not in scraped[0][name]


@pytest.mark.parametrize("counter", [name for name in COUNTERS if name != "redline_interventions_total"])
def test_counters_are_there_at_0_before_the_first_step(scraped: Any, counter: str):
    series = samples(scraped[0]["start"]).get(counter)
    assert series, f"{counter} is not there"
    assert set(series) == set(samples(scraped[0]["12"])[counter])
    assert set(series.values()) == {0.0}


def test_interventions_are_there_at_0_before_the_first_step(scraped: Any):
    series = samples(scraped[0]["start"]).get("redline_interventions_total", {})
    assert series.get((("action", "scale"), ("controller", "ScaleOnce"))) == 0


def test_before_the_first_step_no_gauge_is_served(scraped: Any):
    found = samples(scraped[0]["start"])
    assert "redline_run_info" in found
    assert not [name for name in found if name in (*PER_LAYER, "redline_loss", "redline_normalized_step_size")]


# What was not measured, and what is not finite -----------------------------------------------------------------------


def test_what_was_not_measured_is_absent():
    exporter = redline.PrometheusExporter(port=0, every=1)
    loop = Loop(exporter, monitors=[redline.StepHealth()])
    loop.step()
    found = samples(scrape(exporter.url))
    loop.session.close()
    assert "redline_loss" in found
    unmeasured = {*PER_LAYER, "redline_ghost_radius", "redline_normalized_step_size", "redline_committed_step_size"}
    assert unmeasured & set(found) == set()


def test_r_that_can_no_longer_be_measured_disappears():
    exporter = redline.PrometheusExporter(port=0, every=1)
    loop = Loop(exporter, monitors=[redline.GhostRadius(every=1)])
    loop.step()
    before = samples(scrape(exporter.url))
    with pytest.warns(redline.RedlineWarning, match="ghost radius is not measured"):
        loop.optimizer.step()  # without a forward there are no inputs
    after = samples(scrape(exporter.url))
    loop.session.close()
    gone = {"redline_normalized_step_size", "redline_ghost_radius", "redline_committed_step_size"}
    assert gone <= set(before)
    assert gone & set(after) == set()
    assert after["redline_steps_total"][()] == 2


def test_a_layer_of_zeros_has_a_norm_and_no_stable_rank():
    exporter = redline.PrometheusExporter(port=0, every=1)
    loop = Loop(exporter, monitors=every_step())
    with torch.no_grad():
        loop.model[0].weight.zero_()
    loop.model[0].weight.requires_grad_(False)
    loop.step()
    found = samples(scrape(exporter.url))
    loop.session.close()
    zeros = (("layer", "0.weight"),)
    assert found["redline_weight_spectral_norm"][zeros] == 0
    assert zeros not in found["redline_weight_stable_rank"]
    assert zeros not in found.get("redline_update_to_weight_ratio", {})


def test_nan_is_served_as_nan_and_counted():
    exporter = redline.PrometheusExporter(port=0, every=1)
    loop = Loop(exporter, monitors=[redline.StepHealth()])
    loop.step(math.nan)
    text = scrape(exporter.url)
    loop.session.close()
    found = samples(text)
    assert "redline_loss NaN" in text.splitlines()
    assert math.isnan(found["redline_loss"][()])
    assert math.isnan(found["redline_gradient_norm"][()])
    counts = {labels[0][1]: count for labels, count in found["redline_nonfinite_total"].items()}
    assert (counts["loss"], counts["gradient"], counts["weight"]) == (1, 1, 0)


def test_infinity_is_served_as_infinity():
    exporter = redline.PrometheusExporter(port=0, every=1)
    loop = Loop(exporter, monitors=[redline.StepHealth()])
    loop.step(math.inf)
    found = samples(scrape(exporter.url))
    loop.session.close()
    assert found["redline_loss"][()] == math.inf


# One snapshot, whole -------------------------------------------------------------------------------------------------


def snapshot_of(value: float, layers: int = 200) -> Snapshot:
    """All gauges at one value."""
    values = {Series(name, (f"layer.{k}",)): value for name in PER_LAYER for k in range(layers)}
    values |= {Series(name): value for name in OF_THE_STEP}
    return Snapshot(int(value), 0.0, RUN, MappingProxyType(values), MappingProxyType({}))


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


def report_nothing(exporter: redline.PrometheusExporter) -> None:
    """Close an exporter that no session drives."""
    model = nn.Linear(2, 2)
    session = redline.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), monitors=[])
    exporter.close(session.report())
    session.close()


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


# Ports, addresses, ranks ---------------------------------------------------------------------------------------------


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


# The end -------------------------------------------------------------------------------------------------------------


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
