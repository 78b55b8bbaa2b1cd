"""The pages as files: whole in themselves, with all that the report says, and safe whatever names a model has."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from recorded_runs import EVIL, RecordedRun, evil_run, recorded

import redline
from redline.integrations.html import compare_page, report_page
from redline.integrations.html.charts import MOST_COLUMNS, MOST_MARKS, columns, row, thinned
from redline.integrations.html.document import document
from redline.integrations.record import Record, read
from redline.integrations.record.comparison import Comparison


class Elements(HTMLParser):
    """Tags, their attributes, and the text outside of scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self._in: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self._in.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._in and self._in.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self._in):
            self.text += data


def data_of(page: str) -> dict[str, Any]:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Record:
    path = tmp_path_factory.mktemp("record") / "run.jsonl"
    recorded(path, 60, every=10)
    return read(path)


@pytest.fixture(scope="module")
def page(record: Record) -> str:
    return report_page(record)


def test_it_loads_nothing(page: str):
    elements = Elements(page)
    assert not {"link", "img", "iframe", "object", "embed", "base"} & set(elements.tags)
    assert not {"src", "href", "onclick", "onload", "onerror"} & {name for name, _ in elements.attributes}
    assert "default-src 'none'" in page
    outside = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert "http:" not in outside
    assert "https:" not in outside
    assert "Copyright (c) 2022 Leon Sorokin" in page, "uPlot's licence goes with it"


def test_it_says_what_the_report_says(page: str, record: Record):
    text, report = Elements(page).text, record.report()
    for verdict in report.verdicts:
        assert verdict.seen in text
        assert verdict.why in text
        assert verdict.advice in text
    for layer in report.layers:
        assert layer.name in text
    for one in report.interventions:
        assert one.last_reason in text
    assert record.run.run in text
    assert f"{record.samples[0].step:,}" in text


def test_r_is_drawn_with_every_measurement_and_the_redline(page: str, record: Record):
    r = data_of(page)["r"]
    points = record.curves[redline.Series("redline_normalized_step_size")].points()
    assert r["redline"]
    assert r["lines"][0]["x"] == [step for step, _ in points]
    assert r["lines"][0]["y"] == pytest.approx([value for _, value in points], rel=1e-5)


def test_interventions_are_marked_on_the_loss(page: str, record: Record):
    marks = data_of(page)["loss"]["marks"]
    assert [mark["step"] for mark in marks] == [one.step for one in record.interventions]
    assert record.interventions[0].reason in marks[0]["text"]


def test_spectra_stand_as_measured(page: str, record: Record):
    quantities = {one["title"]: one for one in data_of(page)["layers"]["quantities"]}
    assert set(quantities) == {"σ₁(W)", "ΔW/W", "σ₁(ΔW)", "stable rank"}
    spectra = quantities["σ₁(W)"]
    assert spectra["layers"] == ["0.weight", "2.weight"]
    for name, values in zip(spectra["layers"], spectra["rows"], strict=True):
        points = record.curves[redline.Series("redline_weight_spectral_norm", (name,))].points()
        assert spectra["x"] == [step for step, _ in points]
        assert values == pytest.approx([value for _, value in points], rel=1e-5)


def test_every_figure_has_data(page: str):
    figures = re.findall(r'data-chart="(\w+)"', page)
    assert {"r", "loss", "radius", "layers"} <= set(figures)
    assert set(figures) <= set(data_of(page))


@pytest.mark.parametrize("kind", ["report", "compare"])
def test_names_cannot_get_out_of_the_text(tmp_path: Path, kind: str):
    evil_run(tmp_path / "run.jsonl")
    record = read(tmp_path / "run.jsonl")
    page = report_page(record) if kind == "report" else compare_page(Comparison.of(record, record))
    elements = Elements(page)
    assert "img" not in elements.tags
    assert elements.tags.count("script") == 5
    assert EVIL in elements.text
    assert f"{EVIL}.weight" in data_of(page)["layers"]["quantities"][0]["layers"]
    assert html.unescape(re.search("<title>(.*?)</title>", page)[1]).startswith(EVIL)


def test_no_tag_can_be_read_out_of_the_data():
    page = document("t", [], {"</script >": ["<!--<script>", "&lt;", EVIL]})
    data = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1]
    assert not {"<", ">", "&"} & set(data)
    assert data_of(page) == {"</script >": ["<!--<script>", "&lt;", EVIL]}


def test_numbers_that_are_not_finite_are_gaps():
    page = document("t", [], {"a": [float("nan"), float("inf"), 1 / 3], "b": (float("-inf"),)})
    assert data_of(page) == {"a": [None, None, 0.333333], "b": [None]}


def test_a_record_with_little_in_it_is_drawn(tmp_path: Path):
    run = RecordedRun()
    with run.attach(redline.JsonlRecorder(tmp_path / "run.jsonl"), monitors=[], controllers=[]):
        pass
    page = report_page(read(tmp_path / "run.jsonl"))
    assert "No optimizer step was taken" in page
    data = data_of(page)
    assert data["r"]["lines"] == []
    assert data["layers"]["quantities"] == []


# Columns --------------------------------------------------------------------------------------------------------------


def test_a_few_steps_have_a_column_each():
    assert columns([0, 50, 50, 100]) == [0, 50, 100]


def test_many_steps_share_columns_and_the_highest_value_stands():
    steps = list(range(0, 100_000, 7))
    begins = columns(steps)
    assert len(begins) == MOST_COLUMNS
    assert begins == sorted(set(begins))
    points = [(step, 50.0 if step == 70_000 else 1.0) for step in steps]
    values = row(points, begins)
    assert max(values) == 50.0
    spike = values.index(50.0)
    assert begins[spike] <= 70_000 < begins[spike + 1]
    assert sorted(values)[:-1] == [1.0] * (MOST_COLUMNS - 1)


def test_marks_are_thinned_evenly():
    assert thinned([1, 2, 3], MOST_MARKS) == [1, 2, 3]
    kept = thinned(list(range(10_000)), 400)
    assert kept == list(range(0, 10_000, 25))


# Two runs -------------------------------------------------------------------------------------------------------------


def test_two_runs_are_laid_over_one_another(tmp_path: Path, record: Record):
    recorded(tmp_path / "other.jsonl", 40, lr=0.05)
    other = read(tmp_path / "other.jsonl")
    page = compare_page(Comparison.of(record, other))
    loss = data_of(page)["loss"]["lines"]
    assert [line["name"] for line in loss] == ["A: recorded", "B: recorded"]
    assert [len(line["x"]) for line in loss] == [60, 40]
    spectra = data_of(page)["layers"]["quantities"][0]
    assert spectra["scale"] == "ratio"
    step = spectra["x"].index(35)
    name = spectra["layers"][0]
    expected = [
        dict(one.curves[redline.Series("redline_weight_spectral_norm", (name,))].points())[35]
        for one in (record, other)
    ]
    assert spectra["rows"][0][step] == pytest.approx(expected[1] / expected[0], rel=1e-5)
    assert max(spectra["x"]) <= 39, "as far as both go"
