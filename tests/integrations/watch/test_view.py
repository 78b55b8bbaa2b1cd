"""How a running job is shown."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from redline.integrations.watch.trail import Trail
from redline.integrations.watch.view import sparkline, stale_mark, watch_view
from redline.readings import RunInfo, Series, Snapshot

NAN, INF = math.nan, math.inf


def snapshot(step: int, time: float, r: float = 0.25) -> Snapshot:
    values = {
        Series("redline_loss"): 1.5,
        Series("redline_normalized_step_size"): r,
        Series("redline_step_scale"): 0.75,
        Series("redline_overhead_ratio"): 0.0234,
        Series("redline_nonfinite_total", ("loss",)): 0.0,
        Series("redline_nonfinite_total", ("gradient",)): 2.0,
        Series("redline_interventions_total", ("StepClamp", "scale")): 7.0,
        Series("redline_interventions_total", ("StepClamp", "stop")): 0.0,
        Series("redline_weight_spectral_norm", ("calm",)): 1.0,
        Series("redline_weight_spectral_norm", ("pushed",)): 2.0,
        Series("redline_update_to_weight_ratio", ("calm",)): 0.01,
        Series("redline_update_to_weight_ratio", ("pushed",)): 0.2,
    }
    return Snapshot(step, time, RunInfo("mine", "0", "f", "s", 1), values, {})


def trail_of(*snapshots: Snapshot) -> Trail:
    trail = Trail()
    for one in snapshots:
        trail.add(one, one.time)
    return trail


def shown(trail: Trail, now: float, **options: object) -> str:
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(watch_view(trail, "127.0.0.1:9108", now, **options))
    return console.export_text()


def test_the_figures_of_the_job_are_shown():
    text = shown(trail_of(snapshot(0, 100.0), snapshot(50, 110.0)), 111.0)
    for figure in ("mine", "127.0.0.1:9108", "50", "5 steps/s", "1.5", "0.25", "0.75", "StepClamp scale ×7", "2.3%"):
        assert figure in text
    assert "gradient ×2" in text
    assert "stop" not in text
    assert "Stale" not in text


def test_the_layer_pushed_hardest_comes_first_and_the_table_can_be_left_out():
    trail = trail_of(snapshot(0, 100.0))
    text = shown(trail, 100.0)
    assert text.index("pushed") < text.index("calm")
    assert "pushed" not in shown(trail, 100.0, layers=0)
    assert "1 more" in shown(trail, 100.0, layers=1)


def test_the_gauge_is_full_at_the_redline_and_beyond():
    full = shown(trail_of(snapshot(0, 0.0, r=1.0)), 0.0).count("━")
    assert shown(trail_of(snapshot(0, 0.0, r=25.0)), 0.0).count("━") == full
    assert shown(trail_of(snapshot(0, 0.0, r=0.5)), 0.0).count("━") == pytest.approx(full / 2, abs=1)
    assert shown(trail_of(snapshot(0, 0.0, r=NAN)), 0.0).count("━") == 0


def test_before_anything_was_measured_and_in_trouble():
    text = shown(Trail(), 0.0, trouble="Nothing answers.")
    assert "Nothing answers." in text
    assert "Nothing was measured yet" in text


def test_a_snapshot_without_any_value_is_shown():
    bare = Snapshot(-1, 0.0, RunInfo("mine", "0", "f", "s", 1), {}, {})
    assert "–" in shown(trail_of(bare), 0.0)


# Stale ---------------------------------------------------------------------------------------------------------------


def test_a_job_whose_steps_stop_coming_is_marked():
    trail = trail_of(snapshot(0, 100.0), snapshot(10, 110.0))
    assert stale_mark(trail, 139.0) == ""
    assert stale_mark(trail, 141.0) == "Stale: no step for 31 s."
    assert stale_mark(trail, 110.0 + 600) == "Stale: no step for 10 min."
    assert "Stale: no step for 3 h." in shown(trail, 110.0 + 3 * 3600)


def test_slow_steps_are_waited_for():
    trail = trail_of(snapshot(0, 0.0), snapshot(1, 60.0))
    assert stale_mark(trail, 60.0 + 590) == ""
    assert stale_mark(trail, 60.0 + 610) != ""
    assert stale_mark(Trail(), 1e9) == ""


# Sparkline -----------------------------------------------------------------------------------------------------------


def line(values: list[float], width: int = 8, top: float | None = None) -> str:
    return sparkline(values, width, lambda _: "", top=top).plain


def test_heights_follow_the_values():
    assert line([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert line([7, 0], top=None) == "█▁"
    assert line([3, 3, 3]) == "▁▁▁"
    assert line([]) == ""


def test_with_a_top_the_bottom_is_zero():
    assert line([0.5], top=1.0) == "▅"
    assert line([0.0, 1.0], top=1.0) == "▁█"
    assert line([0.5, 4.0], top=1.0) == "▂█"  # higher than the top


def test_of_many_values_a_column_shows_the_highest():
    values = [0.0] * 1000
    values[333] = 1.0
    assert line(values, 10) == "▁▁▁█▁▁▁▁▁▁"


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_is_not_finite_is_a_cross(value: float):
    assert line([1.0, value, 2.0]) == "▁×█"
    assert line([value]) == "×"
