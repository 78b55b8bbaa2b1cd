"""What is said of an overhead budget: a reading, and the report."""

from __future__ import annotations

import io

from budgeted_runs import Clock, Costing, Keeping, Run, Slow


def test_the_budget_is_a_reading_from_the_start_and_absent_without_one(clock: Clock) -> None:
    sink = Keeping(clock)
    with Run(clock).attach(budget=0.125, sinks=[sink]) as given:
        assert given.latest.value("redline_overhead_budget_ratio") == 0.125
        state = given.state_dict()
    with Run(clock).attach(budget=None) as without:
        assert "redline_overhead_budget_ratio" not in without.latest
        without.load_state_dict(state)
        assert "redline_overhead_budget_ratio" not in without.latest
    run = Run(clock)
    with run.attach(budget=0.25, sinks=[sink]) as resumed:
        resumed.load_state_dict(state)  # the budget is the session's own
        run.steps(2)
        assert resumed.latest.value("redline_overhead_budget_ratio") == 0.25
    assert [snapshot.value("redline_overhead_budget_ratio") for snapshot in sink.snapshots] == [0.25, 0.25]


def test_the_report_says_what_was_allowed_and_what_was_put_off(clock: Clock) -> None:
    from rich.console import Console

    controller = Slow(clock, 0.5)
    run, monitor = Run(clock, [controller]), Costing(clock, 1.0)
    with run.attach(monitor, budget=0.125) as session:
        run.steps(16)
    report = session.report()
    assert (report.overhead_ratio, report.monitoring_ratio) == (0.5 + 2 / 16, 2 / 16)
    assert report.overhead_budget == 0.125
    assert report.put_off == {"Costing": 14}
    assert {"overhead_ratio", "monitoring_ratio", "overhead_budget", "put_off"} <= report.to_dict().keys()
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report)
    text = " ".join(console.export_text().split())
    assert "62.5% of training time was spent in Redline; 12.5% on monitoring, of 12.5% allowed" in text
    assert "put off Costing ×14" in text


def test_without_a_budget_the_report_speaks_of_none(clock: Clock) -> None:
    from rich.console import Console

    run = Run(clock)
    with run.attach(Costing(clock, 1.0), budget=None) as session:
        run.steps(16)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(session.report())
    text = console.export_text()
    assert session.report().overhead_budget is None
    assert "100.0% on monitoring" in text
    assert "allowed" not in text
    assert "put off" not in text
