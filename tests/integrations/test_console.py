"""The console: everything measured shows, and what was not says so."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import rich
import torch
import torch.nn.functional as F
from reports import Key, R, series, shown
from rich.console import Console
from rich.progress import Progress
from torch import nn

import redline
from redline.readings import RunInfo, Snapshot

NAN, INF = math.nan, math.inf
DASH = "–"


@pytest.fixture(autouse=True)
def console() -> Iterator[Console]:
    """rich's own console, recording; 120 columns."""
    own = rich.get_console()
    kept = dict(own.__dict__)
    rich.reconfigure(record=True, width=120, file=io.StringIO(), force_terminal=False)
    yield own
    own.__dict__ = kept


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def snapshot_of(values: Mapping[Key, float], step: int = 7) -> Snapshot:
    run = RunInfo("run-1", "0.1", "float32", "single", 1)
    return Snapshot(step, 0.0, run, {series(key): value for key, value in values.items()}, {})


def printed(values: Mapping[Key, float], **arguments: Any) -> str:
    """What the sink prints of one snapshot."""
    redline.ConsoleReport(**arguments).emit(snapshot_of(values))
    return rich.get_console().export_text()


def layers_of(**ratios: float) -> dict[Key, float]:
    """Layers with a weight norm of 2 and these ratios."""
    values: dict[Key, float] = {("redline_weight_spectral_norm", name): 2.0 for name in ratios}
    return values | {("redline_update_to_weight_ratio", name): ratio for name, ratio in ratios.items()}


def line_of(text: str, word: str) -> list[str]:
    """The words of the one line that begins with a word."""
    (line,) = [line.split() for line in text.splitlines() if line.split()[:1] == [word]]
    return line


# The headline --------------------------------------------------------------------------------------------------------


def test_step_loss_and_r():
    headline = printed({"redline_loss": 1.2345, R: 0.4321, "redline_gradient_norm": 6.789}, every=1).splitlines()[0]
    assert re.search(r"step 7\b", headline)
    assert re.search(r"loss 1\.23\b", headline)
    assert re.search(r"\br 0\.432\b", headline)
    assert "6.79" in headline


def test_what_was_not_measured_is_a_dash():
    headline = printed({}).splitlines()[0]
    assert re.search(rf"loss {DASH} ", headline)
    assert re.search(rf"\br {DASH}", headline)
    assert "nan" not in headline
    assert "None" not in headline
    assert not re.search(r"\b0\b", headline)


def test_nan_is_shown_as_nan():
    headline = printed({"redline_loss": NAN, R: NAN, "redline_gradient_norm": NAN}).splitlines()[0]
    assert re.search(r"loss nan\b", headline)
    assert re.search(r"\br nan\b", headline)
    assert headline.count("nan") == 3


def test_infinity_is_shown_as_infinity():
    headline = printed({"redline_loss": INF, R: INF, "redline_ghost_radius": INF}).splitlines()[0]
    assert re.search(r"loss inf\b", headline)
    assert re.search(r"\br inf\b", headline)


@pytest.mark.parametrize(("r", "filled"), [(0.0, 0), (0.5, 6), (1.0, 12), (40.0, 12), (1e30, 12)])
def test_the_gauge_fills_up_to_the_redline(r: float, filled: int):
    headline = printed({R: r}).splitlines()[0]
    assert headline.count("━") == filled
    assert headline.count("─") == 12 - filled
    assert headline.count("┃") == 1


# The table -----------------------------------------------------------------------------------------------------------


def test_layers_come_the_hardest_pushed_first():
    text = printed(layers_of(gentle=0.1, hard=0.9, middling=0.3))
    rows = [line.split()[0] for line in text.splitlines()[2:]]
    assert rows == ["hard", "middling", "gentle"]


def test_only_so_many_layers_are_shown_and_the_rest_counted():
    values = layers_of(**{f"layer{k}": 0.1 * k for k in range(8)})
    text = printed(values, layers=3)
    shown = [k for k in range(8) if f"layer{k}" in text]
    assert shown == [5, 6, 7]
    assert "5 more" in text


def test_a_layers_figures_are_in_its_row():
    text = printed(
        {
            ("redline_weight_spectral_norm", "a"): 2.5,
            ("redline_update_spectral_norm", "a"): 0.125,
            ("redline_update_to_weight_ratio", "a"): 0.05,
            ("redline_weight_spectral_condition", "a"): 1.75,
            ("redline_weight_stable_rank", "a"): 3.25,
        }
    )
    assert line_of(text, "a")[1:] == ["2.5", "0.125", "0.05", "1.75", "3.25"]


def test_a_figure_that_was_not_measured_is_a_dash_and_one_that_is_nan_nan():
    text = printed({("redline_weight_spectral_norm", "a"): NAN, ("redline_update_spectral_norm", "a"): 0.125})
    assert line_of(text, "a")[1:] == ["nan", "0.125", DASH, DASH, DASH]


def test_updates_show_where_weights_were_not_measured():
    assert line_of(printed({("redline_update_spectral_norm", "a"): 0.125}), "a")[2] == "0.125"


def test_a_nan_does_not_upset_the_order_of_the_other_layers():
    text = printed(layers_of(gentle=0.1, broken=NAN, hard=0.9))
    assert text.index("hard") < text.index("gentle")


def test_a_layer_that_is_nan_is_not_left_out():
    text = printed(layers_of(gentle=0.1, mild=0.2, hard=0.9, broken=NAN), layers=2)
    assert "broken" in text
    assert "hard" in text


def test_no_layers_no_table():
    assert len(printed({"redline_loss": 1.0}).splitlines()) == 1
    assert len(printed(layers_of(a=0.1), layers=0).splitlines()) == 1


def test_a_long_name_keeps_the_end_that_tells_it_apart():
    name = "model.transformer.encoder.layers.{}.attention.self.query.weight"
    text = printed(layers_of(**{name.format(1): 0.1, name.format(23): 0.2}))
    ends = [line.split()[0] for line in text.splitlines()[2:]]
    assert all(end.endswith("query.weight") for end in ends)
    assert all(len(end) < 40 for end in ends)


def test_brackets_in_a_layers_name_are_shown():
    text = printed(layers_of(**{"experts.w[3]": 0.1, "tasks.[bold].weight": 0.2}))
    assert "experts.w[3]" in text
    assert "tasks.[bold].weight" in text


# In a run ------------------------------------------------------------------------------------------------------------


def train(*sinks: redline.Sink, steps: int = 4) -> redline.Session:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with redline.attach(model, optimizer, sinks=sinks, run="run-1") as session:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(torch.randn(8, 6)), torch.randint(3, (8,)))
            session.observe(loss=loss)
            loss.backward()
            optimizer.step()
    return session


def test_a_run_prints_its_tables_and_its_report(console: Console):
    session = train(redline.ConsoleReport(every=2))
    text = console.export_text()
    assert re.findall(r"redline step (\d+)", text) == ["0", "2"]
    assert text.count("0.weight") == text.count("2.weight") == 3  # two tables and the report
    assert text.index("redline step 2") < text.index("stability report")
    assert f"{session.latest.value('redline_weight_spectral_norm', layer='0.weight'):.3g}" in text


def test_the_report_can_be_left_out(console: Console):
    train(redline.ConsoleReport(every=2, report=False))
    assert "stability report" not in console.export_text()


@pytest.mark.parametrize("every", [0, -1, 1.5])
def test_a_schedule_that_is_none_is_refused(every: Any):
    with pytest.raises(
        redline.ConfigurationError, match=re.escape(f"got {'a schedule of ' if every in (0, -1) else ''}{every}")
    ):
        redline.ConsoleReport(every=every)


def test_other_ranks_are_silent(console: Console, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *_: 1)
    redline.ConsoleReport().emit(snapshot_of({"redline_loss": 1.0}))
    assert console.export_text() == ""


def test_beside_a_live_rich_progress_bar():
    written = io.StringIO()
    rich.reconfigure(width=120, file=written, force_terminal=True)
    with Progress(console=rich.get_console(), auto_refresh=False) as progress:
        progress.add_task("epoch", total=4)
        progress.refresh()
        redline.ConsoleReport().emit(snapshot_of({"redline_loss": 1.25}))
    before, after = written.getvalue().split("redline")
    assert "\x1b[2K" in before[before.rindex("epoch") :]  # the bar is wiped away,
    assert "1.25" in after[: after.index("epoch")]  # and drawn again below what was printed


def test_beside_a_live_tqdm_bar(console: Console, capfd: pytest.CaptureFixture[str]):
    tqdm = pytest.importorskip("tqdm")
    with tqdm.tqdm(total=4, desc="epoch", file=sys.stderr) as bar:
        redline.ConsoleReport().emit(snapshot_of({"redline_loss": 1.25}))
        bar.update(4)
    assert "redline step 7" in console.export_text()
    assert "4/4" in capfd.readouterr().err


def test_without_tqdm(console: Console, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "tqdm", raising=False)
    redline.ConsoleReport().emit(snapshot_of({"redline_loss": 1.25}))
    assert "redline step 7" in console.export_text()
    assert "tqdm" not in sys.modules


def test_the_report_of_a_run_can_be_printed_and_serialized():
    report = train(steps=3).report()
    text = shown(report)
    assert "0.weight" in text
    assert "run-1" in text
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["steps"] == 3
    assert plain["step_sizes"]["highest"] == pytest.approx(report.step_sizes.highest)
