"""Snapshots that arrive late: in order, as of their step, nothing twice and nothing lost; nobody waits unasked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import redline
from redline import Readings, RedlineWarning, RunStoppedError, Scale, Snapshot, Step, metrics
from redline.host_copy import HostCopy
from redline.interventions import InterventionLog


class Keeping(redline.Sink):
    """Keeps what it is handed, and how many forwards there were by then."""

    def __init__(self, every: int | Callable[[int], bool] = 1, fails_at: int | None = None) -> None:
        super().__init__(every)
        self.snapshots: list[Snapshot] = []
        self.handed_at: list[int] = []
        self.announced: list[int] = []
        self.reports: list[redline.StabilityReport] = []
        self.fails_at = fails_at
        self.forwards = 0

    def taken(self, step: int) -> None:
        self.announced.append(step)

    def emit(self, snapshot: Snapshot) -> None:
        self.snapshots.append(snapshot)
        self.handed_at.append(self.forwards)
        if snapshot.step == self.fails_at:
            raise ZeroDivisionError("of its own making")

    def close(self, report: redline.StabilityReport) -> None:
        self.reports.append(report)

    @property
    def steps(self) -> list[int]:
        return [snapshot.step for snapshot in self.snapshots]


class Writing(redline.Monitor):
    """Writes the step's number in every way there is."""

    def __init__(self) -> None:
        super().__init__(1)

    def measure(self, step: Step, readings: Readings) -> None:
        number = torch.tensor(float(step.index))
        readings.gauge(metrics.LOSS, number)
        readings.gauge(metrics.GRADIENT_NORM, number)
        readings.count(metrics.NONFINITE, torch.tensor(1), "loss")


class Halving(redline.Controller):
    """Decides in tensors; rejects the step it is told to, in a tensor as well."""

    def __init__(self, rejects: int | None = None) -> None:
        self.rejects = rejects

    def inspect(self, step: Step) -> Iterable[Any]:
        if self.rejects is not None:
            return [redline.Reject("bad at {step:g}.", {"step": torch.tensor(1.0)}, torch.tensor(step.index == 1))]
        return [Scale(torch.tensor(0.5), "of step {step:g}.", saw={"step": torch.tensor(float(step.index))})]


class Run:
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(3, 2)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1)
        self.sinks: list[Keeping] = []

    def attach(self, *sinks: Keeping, controllers: Sequence[redline.Controller] = (), **more: Any) -> redline.Session:
        self.sinks = list(sinks)
        more = {"monitors": [Writing()], **more}
        return redline.attach(self.model, self.optimizer, sinks=sinks, controllers=controllers, run="run", **more)

    def step(self) -> None:
        for sink in self.sinks:
            sink.forwards += 1
        self.model(torch.ones(4, 3)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def steps(self, count: int) -> Run:
        for _ in range(count):
            self.step()
        return self


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], type[HostCopy]]:
    """From its call on, copies say that they are not ready ``patience`` times; reading one before that is a wait."""

    def begin(patience: float) -> type[HostCopy]:
        class Late(HostCopy):
            waited = 0
            started = 0

            def __init__(self, tensors: Sequence[Tensor]) -> None:
                super().__init__(tensors)
                type(self).started += 1
                self.asked = 0

            @property
            def ready(self) -> bool:
                self.asked += 1
                return self.asked > patience

            def read(self) -> list[list[float]]:
                type(self).waited += self.asked <= patience
                return super().read()

        monkeypatch.setattr("redline.delivery.HostCopy", Late)
        return Late

    return begin


@pytest.fixture
def accelerated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors pass for those of an accelerator."""
    for module in ("interventions", "control"):
        monkeypatch.setattr(f"redline.{module}.is_on_host", lambda tensor: False)


def told(session: redline.Session) -> list[tuple[int, str]]:
    return [(one.step, one.reason) for one in session.interventions]


def untimed(snapshot: Snapshot) -> tuple[Any, ...]:
    timed = {"redline_last_step_timestamp_seconds", "redline_overhead_ratio", "redline_monitoring_ratio"}
    values = {series: value for series, value in snapshot.values.items() if series.metric not in timed}
    return snapshot.step, values, dict(snapshot.measured_at).keys() - timed, snapshot.run


# A copy that takes its time -------------------------------------------------------------------------------


def test_a_snapshot_arrives_some_moments_later_and_is_of_its_step(late: Any) -> None:
    copies = late(4)  # asked when started, and then at three moments a step
    run, sink = Run(), Keeping(5)
    with run.attach(sink) as session:
        run.step()
        assert sink.snapshots == []
        assert sink.announced == [0]
        run.step()
        assert sink.steps == []
        run.step()
        assert sink.steps == [0]
        assert sink.handed_at == [3]
        (snapshot,) = sink.snapshots
        assert snapshot.value("redline_steps_total") == 1
        assert snapshot.value("redline_loss") == 0
        assert snapshot.value("redline_nonfinite_total", source="loss") == 1
        assert snapshot.value("redline_measurements_total", monitor="Writing") == 1
        assert set(snapshot.measured_at.values()) == {0}
        run.steps(6)
        assert copies.waited == 0
        assert sink.steps == [0, 5]
        assert session.latest.step == 8


@pytest.mark.parametrize("patience", [0, 1, 2, 3, 4, 7, math.inf])
@pytest.mark.parametrize("every", [1, 2, 5])
@pytest.mark.usefixtures("accelerated")
def test_sinks_see_what_they_see_when_everybody_waits(patience: float, every: int, late: Any) -> None:
    def seen(patience: float) -> tuple[Any, ...]:
        late(patience)
        run, sinks = Run(), (Keeping(every), Keeping(3))
        with run.attach(*sinks, controllers=[Halving()]) as session:
            run.steps(13)
        assert all(sink.announced == sink.steps for sink in sinks)
        (report,) = sinks[0].reports
        snapshots = [[untimed(snapshot) for snapshot in sink.snapshots] for sink in sinks]
        history = session.state_dict()["history"]
        untimed_courses = [one for one in history["courses"] if "timestamp" not in one[0] and "ratio" not in one[0]]
        return snapshots, told(session), report.steps, untimed(session.latest), untimed_courses, run.model.weight

    late_ones, at_once = seen(patience), seen(0)
    assert late_ones[:5] == at_once[:5]
    assert torch.equal(late_ones[5], at_once[5])


def test_what_becomes_due_while_one_is_under_way_waits_for_it_so_that_order_is_kept(late: Any) -> None:
    copies = late(math.inf)
    run, sink = Run(), Keeping(2)
    session = run.attach(sink)
    run.steps(2)
    assert (sink.steps, copies.waited) == ([], 0)
    run.step()  # step 2
    assert (sink.steps, sink.handed_at, copies.waited) == ([0], [3], 1)
    run.steps(2)
    assert (sink.steps, copies.waited) == ([0, 2], 2)
    session.close()
    assert (sink.steps, copies.waited) == ([0, 2, 4], 3)
    assert len(sink.reports) == 1


@pytest.mark.parametrize("ask", ["latest", "report", "state_dict", "interventions", "close"])
def test_who_asks_waits_and_nothing_is_handed_over_twice(ask: str, late: Any) -> None:
    copies = late(math.inf)
    run, sink = Run(), Keeping(lambda step: step == 0)
    session = run.attach(sink)
    run.step()
    assert sink.steps == []
    for _ in range(2):
        asked = getattr(session, ask)
        _ = asked() if callable(asked) and ask != "latest" else asked
        assert sink.steps == [0]
        assert copies.waited == 1
    run.step()
    session.close()
    assert sink.steps == [0]
    assert session.latest.step == (0 if ask == "close" else 1)


def test_latest_is_up_to_date_though_an_older_snapshot_is_under_way(late: Any) -> None:
    late(math.inf)
    run, sink = Run(), Keeping(lambda step: step == 0)
    with run.attach(sink) as session:
        run.steps(3)
        assert session.latest.step == 2
        assert session.latest.value("redline_steps_total") == 3
        assert sink.steps == [0]


def test_too_many_measurements_start_a_copy_and_wait_for_nothing(late: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("redline.readings._MOST_PENDING", 4)
    copies = late(2)
    run = Run()
    with run.attach() as session:
        run.steps(20)
        assert (copies.started, copies.waited) == (5, 0)
        course = session.report().last_loss
        assert course == 19
    assert session.state_dict()["readings"]["step"] == 19


@pytest.mark.usefixtures("accelerated")
def test_too_many_decisions_start_a_copy_and_wait_for_nothing(late: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("redline.interventions._MOST_UNTOLD", 4)
    copies = late(2)
    run = Run()
    with run.attach(controllers=[Halving()], monitors=[]) as session:
        run.steps(18)
        assert (copies.started, copies.waited) == (4, 0)
        assert told(session) == [(step, f"of step {step}.") for step in range(18)]
        assert session.latest.value("redline_interventions_total", controller="Halving", action="scale") == 18


@pytest.mark.usefixtures("accelerated")
def test_a_decision_known_at_once_is_told_behind_those_under_way() -> None:
    readings = Readings()
    log = InterventionLog(readings)
    log.add(0, "Halving", Scale(torch.tensor(0.5), "on the device."))
    untold = log.take()
    log.add(1, "Halving", Scale(0.5, "on the host."))
    assert not log.latest
    log.receive(untold, iter([[1.0]]), readings.count)
    log.read()
    assert [one.step for one in log.latest] == [0, 1]


# What goes wrong ------------------------------------------------------------------------------------------


def test_a_sink_that_raises_is_switched_off_and_the_others_are_not(late: Any) -> None:
    late(3)
    run, breaking, keeping = Run(), Keeping(1, fails_at=2), Keeping(1)

    def whole_run() -> redline.Session:
        with run.attach(breaking, keeping) as session:
            run.steps(6)
        return session

    with pytest.warns(RedlineWarning, match="Keeping failed and is switched off: ZeroDivisionError: of its own making"):
        session = whole_run()
    assert breaking.steps == [0, 1, 2]
    assert breaking.reports == []
    assert keeping.steps == [0, 1, 2, 3, 4, 5]
    assert len(keeping.reports) == 1
    assert len(session.notes) == 1


def test_a_sink_that_fails_while_its_next_snapshot_is_under_way_does_not_get_it(late: Any) -> None:
    late(math.inf)
    run, breaking = Run(), Keeping(1)
    breaking.taken = lambda step: 1 / (1 - step)  # type: ignore[assignment, method-assign]

    def whole_run() -> None:
        with run.attach(breaking):
            run.steps(3)

    with pytest.warns(RedlineWarning, match="ZeroDivisionError"):
        whole_run()
    assert breaking.steps == [0]


def test_a_run_cut_by_an_exception_loses_nothing(late: Any) -> None:
    late(math.inf)
    run, sink = Run(), Keeping(3)

    def broken_run() -> None:
        with run.attach(sink):
            run.steps(5)
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        broken_run()
    assert sink.steps == [0, 3]
    assert [report.steps for report in sink.reports] == [5]


@pytest.mark.usefixtures("accelerated")
@pytest.mark.parametrize(("patience", "stopped_at"), [(0, 2), (1, 2), (2, 2), (3, 3), (6, 4)])
def test_a_rejection_found_late_still_stops_the_run(patience: int, stopped_at: int, late: Any) -> None:
    late(patience)
    run, sink = Run(), Keeping(lambda step: step == 1)
    with run.attach(sink, controllers=[Halving(rejects=1)]) as session:
        run.steps(stopped_at)
        with pytest.raises(RunStoppedError, match=r"Halving rejected step 1: bad at 1\."):
            run.step()
    assert [(one.step, one.action) for one in session.interventions] == [(1, "reject")]
    assert sink.snapshots[0].value("redline_interventions_total", controller="Halving", action="reject") == 1


def test_a_state_that_is_loaded_while_a_snapshot_is_under_way_takes_its_place(late: Any) -> None:
    late(math.inf)
    first = Run()
    with first.attach() as session:
        first.steps(4)
        state = session.state_dict()
    run, sink = Run(), Keeping(lambda step: step == 0)
    with run.attach(sink) as session:
        run.step()
        session.load_state_dict(state)
        assert sink.steps == [0]
        assert session.latest.step == 3
        assert session.latest.value("redline_steps_total") == 4
        run.step()
        assert session.latest.value("redline_steps_total") == 5


def test_the_moment_in_training_is_that_of_the_snapshot(late: Any) -> None:
    """A trainer's step may have gone on by the time the snapshot arrives."""
    from types import SimpleNamespace

    from redline.integrations.trainer_logs import TrainerLogs

    late(4)
    logged: list[tuple[int, float]] = []
    trainer = SimpleNamespace(global_step=100)
    run = Run()
    logs = TrainerLogs(
        lambda values, step: logged.append((step, values["redline_loss"])), 3, lambda: trainer.global_step
    )
    with run.attach(logs):
        run.sinks = []
        for _ in range(7):
            run.step()
            trainer.global_step += 2
    assert logged == [(100, 0.0), (106, 3.0), (112, 6.0)]
