"""The pages in a browser: every chart is drawn, no script fails, and nothing runs out of the window."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import Opened, opened
from recorded_runs import EVIL, RecordedRun, evil_run, recorded

import redline
from redline.integrations.html import compare_page, report_page
from redline.integrations.record import read
from redline.integrations.record.comparison import Comparison


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of every kind."""
    where = tmp_path_factory.mktemp("pages")
    recorded(where / "a.jsonl", 120, every=10)
    recorded(where / "b.jsonl", 90, every=10, lr=0.05)
    evil_run(where / "evil.jsonl")
    with RecordedRun().attach(redline.JsonlRecorder(where / "empty.jsonl"), monitors=[], controllers=[]):
        pass
    records = {name: read(where / f"{name}.jsonl") for name in ("a", "b", "evil", "empty")}
    drawn = {name: report_page(record) for name, record in records.items()}
    drawn["compare"] = compare_page(Comparison.of(records["a"], records["b"]))
    for name, page in drawn.items():
        (where / f"{name}.html").write_text(page)
    return {name: where / f"{name}.html" for name in drawn}


def check(page: Opened, figures: int, canvases: int) -> None:
    assert page.root("data-error") is None
    assert page.console == ""
    assert page.root("data-charts") == str(figures)
    assert len(page.ink) == canvases
    assert all(filled > 200 for filled in page.ink), "a canvas is blank"
    assert page.root("data-overflow") == "0"


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (1200, True), (500, False)])
def test_the_page_of_a_run_is_drawn(pages: dict[str, Path], width: int, dark: bool):
    check(opened(pages["a"], width=width, dark=dark), figures=7, canvases=9)


def test_the_page_of_two_runs_is_drawn(pages: dict[str, Path]):
    check(opened(pages["compare"]), figures=7, canvases=9)


def test_the_page_of_a_run_without_steps_says_so(pages: dict[str, Path]):
    page = opened(pages["empty"])
    check(page, figures=7, canvases=0)
    assert page.document.count('<p class="empty">Not measured in this run.</p>') == 7


def test_a_layer_with_markup_in_its_name_is_text(pages: dict[str, Path]):
    page = opened(pages["evil"])
    check(page, figures=7, canvases=9)
    assert "<img" not in page.document.split("<script")[0]
    assert EVIL.split("<img")[1].split("&")[0] in page.document.replace("&gt;", ">")
