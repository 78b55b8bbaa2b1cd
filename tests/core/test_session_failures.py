"""The session where something fails: a step, mixed precision, a monitor, a sink."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from session_runs import (
    WIDTH,
    Keeping,
    Run,
    Scaling,
    Watching,
    in_memory,
    norm,
    often,
    quiet_machine,  # noqa: F401 around every test
)
from torch import Tensor, nn
from torch.optim import Optimizer
from torch_optimizers import muon_and_adamw

import redline
from redline import Readings, RedlineWarning, Snapshot, Step, metrics

# Steps that fail ------------------------------------------------------------------------------------------


class Failing(torch.optim.Optimizer):
    """Gradient descent that can fail half way, once."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})
        self.fails = False

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for place, parameter in enumerate(self.param_groups[0]["params"]):
            if self.fails and place == 2:
                self.fails = False
                raise RuntimeError("out of luck")
            if parameter.grad is not None:
                parameter -= self.param_groups[0]["lr"] * parameter.grad
        return result


def failing(model: nn.Module) -> list[Failing]:
    return [Failing(model.parameters(), 0.1)]


def test_update_that_raises_is_given_up_and_the_next_step_measured_properly() -> None:
    run = Run(failing)  # type: ignore[arg-type]
    controller = Scaling(1.0)
    weights = in_memory(WIDTH, WIDTH)
    with run.attach(*often(), controllers=[controller]) as session:
        run.step(0)
        run.backward(1)
        run.optimizers[0].fails = True
        with pytest.raises(RuntimeError, match="out of luck"):
            run.optimizers[0].step()
        run.optimizers[0].zero_grad()
        assert session.latest.value("redline_steps_total") == 1
        before = run.parameters
        loss = run.loss(2)
        session.observe(loss=loss)
        loss.backward()
        gradient = run.gradient_norm
        run.update()
        latest = session.latest
        update = [tensor - before[name] for name, tensor in run.parameters.items()]
        assert latest.value("redline_steps_total") == 2
        assert latest.value("redline_update_norm") == pytest.approx(norm(update), rel=1e-5)
        assert latest.value("redline_gradient_norm") == pytest.approx(gradient, rel=1e-5)
        assert latest.value("redline_measurements_total", monitor="GhostRadius") == 2
        assert latest.measured_at[redline.Series("redline_normalized_step_size")] == 1
        assert session.notes == ()
        assert controller.inspected == 2
        del before, update
        assert in_memory(WIDTH, WIDTH) == weights


@pytest.mark.parametrize("keyword", [False, True])
def test_closure_that_raises_opens_no_step(keyword: bool) -> None:
    run = Run(failing)  # type: ignore[arg-type]
    weights = in_memory(WIDTH, WIDTH)

    def closure(fails: bool) -> Callable[[], Tensor]:
        def call() -> Tensor:
            run.optimizers[0].zero_grad()
            loss = run.loss(0)
            loss.backward()
            if fails:
                raise RuntimeError("out of luck")
            return loss

        return call

    def step(fails: bool) -> None:
        if keyword:
            run.optimizers[0].step(closure=closure(fails))
        else:
            run.optimizers[0].step(closure(fails))

    with run.attach(*often()) as session:
        step(fails=False)
        run.optimizers[0].zero_grad()
        with pytest.raises(RuntimeError, match="out of luck"):
            step(fails=True)
        run.optimizers[0].zero_grad()
        assert in_memory(WIDTH, WIDTH) == weights
        assert session.latest.value("redline_steps_total") == 1
        before = run.parameters
        step(fails=False)
        update = [tensor - before[name] for name, tensor in run.parameters.items()]
        assert session.latest.value("redline_update_norm") == pytest.approx(norm(update), rel=1e-5)
        assert session.latest.value("redline_steps_total") == 2
        assert session.latest.value("redline_measurements_total", monitor="GhostRadius") == 2


def test_closing_after_an_update_that_raised_lets_go_of_everything() -> None:
    run = Run(failing)  # type: ignore[arg-type]
    hooks, weights = run.hooks(), in_memory(WIDTH, WIDTH)
    run.optimizers[0].fails = True

    def fail() -> None:
        with run.attach(*often()):
            run.step(0)

    with pytest.raises(RuntimeError, match="out of luck"):
        fail()
    run.optimizers[0].zero_grad()
    assert run.hooks() == hooks
    assert in_memory(WIDTH, WIDTH) == weights


def test_gradients_withheld_from_an_update_that_raised_do_not_replace_the_next_ones() -> None:
    class WithholdingOnce(redline.Controller):
        asked = 0

        def before_update(self, step: Step) -> redline.Withhold | None:
            self.asked += 1
            return redline.Withhold("as told.") if self.asked == 1 else None

    run, alone = Run(failing), Run(failing)  # type: ignore[arg-type]
    with run.attach(controllers=[WithholdingOnce()]):
        run.backward(0)
        run.optimizers[0].fails = True
        with pytest.raises(RuntimeError, match="out of luck"):
            run.optimizers[0].step()
        run.optimizers[0].zero_grad()
        run.step(1)
    alone.step(1)
    assert all(torch.equal(tensor, alone.parameters[name]) for name, tensor in run.parameters.items())


# Mixed precision ----------------------------------------------------------------------------------------


AMP = pytest.mark.parametrize(
    "optimizers",
    [
        pytest.param(lambda model: [torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)], id="sgd"),
        pytest.param(lambda model: [torch.optim.Adam(model.parameters(), 1e-2)], id="adam"),
        pytest.param(lambda model: [torch.optim.Adam(model.parameters(), 1e-2, fused=True)], id="adam fused"),
        pytest.param(lambda model: [torch.optim.AdamW(model.parameters(), 1e-2, fused=True)], id="adamw fused"),
        pytest.param(lambda model: [torch.optim.SGD(model.parameters(), 0.1, fused=True)], id="sgd fused"),
        pytest.param(muon_and_adamw, id="muon and adamw"),
    ],
)


def scaled_step(
    run: Run, scaler: torch.amp.GradScaler, seed: int, *, overflow: bool = False, unscale: bool = False
) -> None:
    loss = run.loss(seed)
    scaler.scale(loss * float("inf") if overflow else loss).backward()
    for optimizer in run.optimizers:
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
    scaler.update()
    for optimizer in run.optimizers:
        optimizer.zero_grad()


@AMP
@pytest.mark.parametrize("unscale", [False, True])
def test_gradient_norm_is_unscaled(optimizers: Callable[[nn.Module], list[Optimizer]], unscale: bool) -> None:
    run, alone = Run(optimizers), Run(optimizers)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with run.attach(redline.StepHealth(1)) as session:
        for seed in range(2):
            alone.backward(seed)
            expected = alone.gradient_norm
            alone.update()
            scaled_step(run, scaler, seed, unscale=unscale)
            assert session.latest.value("redline_gradient_norm") == pytest.approx(expected, rel=1e-4)


@AMP
def test_step_skipped_by_an_overflow_leaks_nothing(optimizers: Callable[[nn.Module], list[Optimizer]]) -> None:
    run = Run(optimizers)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    fused = run.optimizers[0].defaults.get("fused")
    with run.attach(*often()) as session:
        scaled_step(run, scaler, 0)
        before = run.parameters
        weights = in_memory(WIDTH, WIDTH)
        scaled_step(run, scaler, 1, overflow=True)
        assert in_memory(WIDTH, WIDTH) == weights
        assert scaler.get_scale() == 2.0**9
        assert all(torch.equal(tensor, before[name]) for name, tensor in run.parameters.items())
        latest = session.latest
        if fused:  # the optimizer was called, and moved nothing
            assert latest.value("redline_steps_total") == 2
            assert latest.value("redline_update_norm") == 0
            assert latest.value("redline_nonfinite_total", source="gradient") == 1
            assert latest.value("redline_nonfinite_total", source="update") == 0
        else:  # it was not
            assert latest.value("redline_steps_total") == 1
            assert latest.value("redline_nonfinite_total", source="gradient") == 0
        scaled_step(run, scaler, 2)
        assert in_memory(WIDTH, WIDTH) == weights
        update = [tensor - before[name] for name, tensor in run.parameters.items()]
        assert session.latest.value("redline_update_norm") == pytest.approx(norm(update), rel=1e-5)
        assert session.latest.value("redline_steps_total") == (3 if fused else 2)
        assert session.notes == ()


def test_overflow_in_the_second_of_two_commits_the_first_alone() -> None:
    run = Run(muon_and_adamw)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with run.attach(*often()) as session:
        scaled_step(run, scaler, 0)
        before = run.parameters
        scaler.scale(run.loss(1)).backward()
        run.model.body.bias.grad.fill_(float("inf"))  # type: ignore[union-attr]
        for optimizer in run.optimizers:
            scaler.step(optimizer)
        scaler.update()
        for optimizer in run.optimizers:
            optimizer.zero_grad()
        update = [tensor - before[name] for name, tensor in run.parameters.items() if tensor.dim() == 2]
        loss = run.loss(2)
        latest = session.latest
        assert latest.value("redline_steps_total") == 2
        assert latest.value("redline_update_norm") == pytest.approx(norm(update), rel=1e-5)
        assert latest.measured_at[redline.Series("redline_normalized_step_size")] == 1
        scaler.scale(loss).backward()
        for optimizer in run.optimizers:
            scaler.step(optimizer)
        assert session.latest.value("redline_steps_total") == 3
        assert session.latest.measured_at[redline.Series("redline_normalized_step_size")] == 2
        assert session.notes == ()


# Monitors and sinks that fail ---------------------------------------------------------------------------------


def fail(*_: Any) -> Any:
    raise ZeroDivisionError("of its own making")


def test_monitor_that_raises_becomes_a_note_said_once() -> None:
    run, alone = Run(), Run()
    with run.attach(Watching(fail), redline.StepHealth(1)) as session:
        with pytest.warns(
            RedlineWarning, match="Watching could not measure a step: ZeroDivisionError: of its own making"
        ):
            run.step(0)
        run.step(1)  # the same again: a second warning would be an error here
        latest = session.latest
        assert latest.value("redline_measurements_total", monitor="Watching") == 0
        assert latest.value("redline_measurements_total", monitor="StepHealth") == 2
        assert len(session.notes) == 1
        assert session.report().notes == session.notes
    for seed in range(2):
        alone.step(seed)
    assert all(torch.equal(tensor, alone.parameters[name]) for name, tensor in run.parameters.items())


@pytest.mark.parametrize(
    "write",
    [
        lambda readings: readings.gauge(metrics.LOSS, torch.zeros(3)),
        lambda readings: readings.layers(metrics.WEIGHT_STABLE_RANK, ["one", "two"], torch.zeros(3)),
    ],
    ids=["a vector for a gauge", "three values for two layers"],
)
def test_monitor_that_writes_what_cannot_be_read_becomes_a_note(write: Callable[[Readings], None]) -> None:
    run = Run()
    sink = Keeping(1)

    def whole_run() -> redline.Session:
        with run.attach(Watching(lambda _, readings: write(readings)), redline.StepHealth(1), sinks=[sink]) as session:
            run.step(0)
            run.step(1)
        return session

    with pytest.warns(RedlineWarning, match="Watching"):
        session = whole_run()
    assert session.latest.value("redline_gradient_norm") > 0
    assert [snapshot.step for snapshot in sink.snapshots] == [0, 1]


def test_schedule_that_raises_does_not_end_the_run() -> None:
    """At the start it may be refused; later on a run is under way."""

    def broken(step: int) -> bool:
        return step == 0 or fail()

    run = Run()
    keeping = Keeping(1)

    def whole_run() -> redline.Session:
        with run.attach(Watching(every=broken), redline.StepHealth(1), sinks=[Keeping(broken), keeping]) as session:
            for seed in range(3):
                run.step(seed)
        return session

    with pytest.warns(RedlineWarning, match="ZeroDivisionError"):
        session = whole_run()
    assert session.latest.value("redline_steps_total") == 3
    assert [snapshot.step for snapshot in keeping.snapshots] == [0, 1, 2]


class Breaking(Keeping):
    """Fails at one of the three moments."""

    def __init__(self, moment: str) -> None:
        super().__init__(1)
        self.calls: list[str] = []
        self.moment = moment

    def open(self, run: redline.RunInfo) -> None:
        self._called("open")

    def emit(self, snapshot: Snapshot) -> None:
        self._called("emit")

    def close(self, report: redline.StabilityReport) -> None:
        self._called("close")

    def _called(self, moment: str) -> None:
        self.calls.append(moment)
        if moment == self.moment:
            fail()


@pytest.mark.parametrize(
    ("moment", "calls"),
    [("open", ["open"]), ("emit", ["open", "emit"]), ("close", ["open", "emit", "emit", "close"])],
)
def test_sink_that_raises_is_switched_off_with_a_warning(moment: str, calls: list[str]) -> None:
    run = Run()
    breaking, keeping = Breaking(moment), Keeping(1)

    def whole_run() -> redline.Session:
        with run.attach(redline.StepHealth(1), sinks=[breaking, keeping]) as session:
            run.step(0)
            run.step(1)
        return session

    with pytest.warns(RedlineWarning, match="Breaking failed and is switched off: ZeroDivisionError: of its own"):
        session = whole_run()
    assert breaking.calls == calls
    assert len(keeping.opened) == 1
    assert [snapshot.step for snapshot in keeping.snapshots] == [0, 1]
    assert len(keeping.reports) == 1
    assert len(session.notes) == 1


def test_port_in_use_is_a_warning() -> None:
    run = Run()
    exporter = redline.PrometheusExporter(port=0)
    with run.attach(redline.StepHealth(1), sinks=[exporter]) as session:
        second = redline.PrometheusExporter(port=exporter.port)
        with pytest.warns(RedlineWarning, match=rf"got port {exporter.port} on 127\.0\.0\.1, which is in use"):
            other = run.attach(redline.StepHealth(1), sinks=[second])
        run.step(0)
        other.close()
        assert exporter.url is not None
        assert second.url is None
    assert session.latest.value("redline_steps_total") == 1
