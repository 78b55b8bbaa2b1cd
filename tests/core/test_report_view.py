"""The stability report as printed: everything it found shows, and what was not measured says so."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Sequence
from functools import partial

import pytest
from reports import Key, report_of_sizes, shown
from rich.console import Console

from redline.interventions import Tally
from redline.report import KeptSnapshot, StabilityReport

NAN, INF = math.nan, math.inf
DASH = "–"
report_of = partial(report_of_sizes, steps=20, seconds=4.0)


@pytest.mark.parametrize(
    ("report", "mark", "verdict"),
    [
        (lambda: report_of([0.1, 0.25]), "✓", "Within limits: the longest of 2 measured steps had r = 0.25 (step 1)"),
        (lambda: report_of([0.1, 0.75]), "!", "Near the redline: the longest measured step had r = 0.75 (step 1)"),
        (lambda: report_of([2.5, 0.1]), "✗", "Over the redline: 1 of 2 measured steps had r >= 1"),
        (
            lambda: report_of([0.1], values={("redline_nonfinite_total", "loss"): 3.0}),
            "✗",
            "Values were not finite: loss 3 times",
        ),
        (lambda: report_of(), "!", "The step size r was not measured"),
    ],
    ids=["within", "near", "over", "not finite", "not measured"],
)
def test_the_verdict_comes_first(report: Callable[[], StabilityReport], mark: str, verdict: str):
    text = shown(report())
    assert f"{mark} {verdict}" in text
    assert text.index(verdict) < text.index("run-1")


def test_facts_are_shown():
    text = shown(
        report_of(
            [0.1] * 3,
            values={"redline_overhead_ratio": 0.034},
            courses={"redline_loss": [(0, 2.25), (19, 0.5)]},
            notes=("the third kind was not measured",),
            interventions=[Tally("Clamp", "scale", 2, 3, 17, "r = 3 was over 1.")],
            snapshots=[KeptSnapshot("Guard", 4, 3 * 2**20, "host", False)],
        )
    )
    assert re.search(r"steps\s+20 in 4\.0 s\s+\(5 steps/s\)", text)
    assert re.search(r"loss\s+2\.25 → 0\.5\b", text)
    assert "3.4%" in text
    assert "the third kind was not measured" in text
    assert re.search(r"Clamp +scale +2 +3 – 17 +r = 3 was over 1\.", text)
    assert "Guard: a copy of the run at step 4, 3 MiB in host memory; checkpoints leave it out" in text


def test_the_distribution_is_shown():
    text = shown(
        report_of([0.02, 0.02, 0.2, 1.5], values={"redline_tangent_samples": 32.0, "redline_batch_samples": 128.0})
    )
    assert re.search(r"median 0\.11 .* highest 1\.5 at step 3", text)
    assert re.search(r"4 measurements, each over 32 samples \(batches of 128\), by forward mode", text)
    assert re.search(r"0\.01 – 0\.03\s+█+\s+2\b", text)
    assert re.search(r"1 – 3\s+█+\s+1\b", text)


def test_layers_are_shown_with_growth_and_their_hardest_update():
    text = shown(
        report_of(
            [0.1],
            courses={
                ("redline_weight_spectral_norm", "a"): [(0, 2.0), (10, 3.0)],
                ("redline_update_to_weight_ratio", "a"): [(0, 0.125), (10, 0.25), (15, 0.1)],
                ("redline_weight_spectral_norm", "b"): [(0, NAN)],
            },
        )
    )
    rows = {row[0]: row[1:] for line in text.splitlines() if (row := line.strip("│ ").split())}
    assert rows["a"] == ["3", "×1.5", DASH, DASH, "0.25", "10"]
    assert rows["b"][0] == "nan"
    assert rows["b"][2:] == [DASH, DASH, DASH, DASH]


def test_of_many_layers_the_hardest_pushed_are_shown():
    courses: dict[Key, Sequence[tuple[int, float]]] = {}
    for k in range(30):
        courses["redline_weight_spectral_norm", f"layer{k:02}"] = [(0, 1.0)]
        courses["redline_update_to_weight_ratio", f"layer{k:02}"] = [(0, 0.01 * k)]
    text = shown(report_of([0.1], courses=courses))
    assert "layer29" in text
    assert "layer00" not in text
    assert re.search(r"\d+ more not shown", text)


@pytest.mark.parametrize("name", ["sweep[lr=1e-3]", "sweep[/]", "[red]alert"])
def test_brackets_in_the_name_of_a_run_are_shown(name: str):
    assert name in shown(report_of([0.1], run=name))


def test_brackets_in_a_note_are_shown():
    assert "experts[a][/b] was not measured" in shown(report_of([0.1], notes=("experts[a][/b] was not measured",)))


@pytest.mark.parametrize("width", [20, 80])
def test_the_report_fits_narrow_terminals(width: int):
    console = Console(record=True, width=width, file=io.StringIO())
    console.print(report_of([0.1, 2.0], courses={("redline_weight_spectral_norm", "a" * 60): [(0, 1.0)]}))
    assert max(len(line) for line in console.export_text().splitlines()) <= width


@pytest.mark.parametrize("step_sizes", [[], [0.1], [NAN], [INF, 0.1], [0.0]])
def test_any_report_can_be_printed_and_serialized(step_sizes: list[float]):
    report = report_of(
        step_sizes,
        courses={
            ("redline_weight_spectral_norm", "a"): [(0, NAN), (1, INF)],
            ("redline_update_to_weight_ratio", "a"): [(0, NAN)],
            "redline_loss": [(0, NAN)],
        },
        values={("redline_nonfinite_total", "weight"): 2.0},
    )
    assert "stability report" in shown(report)
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["nonfinite"] == {"weight": 2}
    assert plain["layers"][0]["name"] == "a"
