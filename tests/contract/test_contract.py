"""The contract: what every monitor, controller and sink must keep, whichever it is.

A new one is covered as soon as it is exported from ``redline``; where its defaults do not suit a test it has a line in
``ARGUMENTS``.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import pickle
import random
from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bits import frozen
from torch import Tensor, nn

import redline
from redline import ConfigurationError, Controller, Monitor, Need, Readings, RunStoppedError, Scale, Sink, Step


class HalvingDouble(Controller):
    """Halves every step that is longer than it likes, and counts them."""

    def __init__(self, limit: float = 0.0) -> None:
        self.limit, self.halved = limit, 0

    def inspect(self, step: Step) -> Iterable[Scale]:
        if float(step.update.norm) <= self.limit:
            return []
        self.halved += 1
        return [Scale(0.5, "longer than it likes.")]

    def state_dict(self) -> dict[str, Any]:
        return {"halved": self.halved}

    def load_state_dict(self, state: Any) -> None:
        self.halved = state["halved"]


def exported(base: type) -> list[type]:
    found = (getattr(redline, name) for name in redline.__all__)
    return [one for one in found if isinstance(one, type) and issubclass(one, base) and one is not base]


MONITORS, SINKS = exported(Monitor), exported(Sink)
CONTROLLERS = [*exported(Controller), HalvingDouble]
FILES = count()
ARGUMENTS: dict[str, Callable[[], dict[str, Any]]] = {
    "PrometheusExporter": lambda: {"port": 0},  # a port that two can have at once
    "TextfileSink": lambda: {"path": "run.prom"},
    "JsonlRecorder": lambda: {"path": f"{next(FILES)}.jsonl"},  # a file of its own
}


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sinks that write files by default write them where nobody else looks."""
    monkeypatch.chdir(tmp_path)


of_every_monitor = pytest.mark.parametrize("kind", MONITORS)
of_every_sink = pytest.mark.parametrize("kind", SINKS)
of_every_plugin = pytest.mark.parametrize("kind", [*MONITORS, *CONTROLLERS, *SINKS])
with_a_schedule = pytest.mark.parametrize("kind", [*MONITORS, *SINKS])


def make(kind: type, **more: Any) -> Any:
    return kind(**{**ARGUMENTS.get(kind.__name__, dict)(), **more})


def often(kind: type) -> Any:
    """One that is due at every step, if it has a schedule."""
    return make(kind) if issubclass(kind, Controller) else make(kind, every=1)


# A run ------------------------------------------------------------------------------------------------


class Run:
    """A small network with dropout and BatchNorm, and a session with one set of plugins."""

    def __init__(self, *plugins: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Dropout(0.5), nn.ReLU(), nn.Linear(9, 4))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-2)
        monitors = [plugin for plugin in plugins if isinstance(plugin, Monitor)]
        sinks = [plugin for plugin in plugins if isinstance(plugin, Sink)]
        self.session = redline.attach(
            self.model,
            self.optimizer,
            # Sinks and controllers are shown something.
            monitors=monitors if monitors else [redline.GhostRadius(1), redline.WeightSpectrum(1)],
            controllers=[plugin for plugin in plugins if isinstance(plugin, Controller)],
            sinks=sinks,
            run="contract",
        )

    def backward(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        x, y = torch.randn(8, 6, generator=generator), torch.randint(0, 4, (8,), generator=generator)
        loss = F.cross_entropy(self.model(x), y)
        self.session.observe(loss=loss)
        loss.backward()
        return loss

    def steps(self, *seeds: int) -> None:
        for seed in seeds:
            self.backward(seed)
            self.optimizer.step()
            self.optimizer.zero_grad()


def everything(run: Run) -> dict[str, Any]:
    """What observing must not change."""
    named = dict(run.model.named_parameters())
    return frozen(
        {
            "parameters": named,
            "buffers": dict(run.model.named_buffers()),
            "gradients": {name: parameter.grad for name, parameter in named.items()},
            "requires_grad": {name: parameter.requires_grad for name, parameter in named.items()},
            "state": run.optimizer.state_dict(),
            "modes": {name: module.training for name, module in run.model.named_modules()},
            "torch": torch.get_rng_state(),
            "numpy": [str(part) for part in np.random.get_state()],  # noqa: NPY002 the run's own stream
            "python": random.getstate(),
            "grad mode": torch.is_grad_enabled(),
        }
    )


# Construction -----------------------------------------------------------------------------------------


def test_there_is_something_to_test() -> None:
    assert {kind.__name__ for kind in MONITORS} >= {"GhostRadius", "StepHealth", "UpdateSpectrum", "WeightSpectrum"}
    assert {kind.__name__ for kind in SINKS} >= {"ConsoleReport", "JsonlRecorder", "PrometheusExporter", "TextfileSink"}
    assert {type(monitor) for monitor in redline.default_monitors()} <= set(MONITORS)


@of_every_plugin
def test_it_can_be_made_with_its_defaults(kind: type) -> None:
    assert isinstance(kind(), (Monitor, Controller, Sink))


@of_every_plugin
def test_it_can_be_made_by_keyword_from_its_own_defaults(kind: type) -> None:
    """As a command line or a configuration file does; every argument has a default and a type."""
    parameters = inspect.signature(kind).parameters
    assert all(parameter.default is not parameter.empty for parameter in parameters.values())
    assert all(parameter.annotation is not parameter.empty for parameter in parameters.values())
    assert isinstance(kind(**{name: parameter.default for name, parameter in parameters.items()}), kind)


@of_every_plugin
def test_it_says_what_it_is(kind: type) -> None:
    assert inspect.getdoc(kind)
    assert kind.__doc__, "in words of its own"


@with_a_schedule
def test_its_schedule_is_an_int_or_a_callable(kind: type) -> None:
    assert [step for step in range(7) if make(kind, every=3).due(step)] == [0, 3, 6]
    assert [step for step in range(7) if make(kind, every=lambda step: step == 2).due(step)] == [2]


@with_a_schedule
@pytest.mark.parametrize("every", [0, -1])
def test_its_schedule_is_never_zero(kind: type, every: int) -> None:
    with pytest.raises(ConfigurationError, match=rf"got a schedule of {every}; expected at least 1 \(every step\)"):
        make(kind, every=every)


@of_every_monitor
def test_monitor_declares_what_it_needs(kind: type[Monitor]) -> None:
    assert isinstance(kind.needs, Need)
    assert isinstance(kind.after_commit, bool)


# Pickling and copying ---------------------------------------------------------------------------------


@of_every_plugin
@pytest.mark.parametrize("moment", ["fresh", "in use", "closed"])
def test_it_can_be_pickled_and_its_copy_used(kind: type, moment: str) -> None:
    plugin = often(kind)
    if moment == "fresh":
        twin = pickle.loads(pickle.dumps(plugin))
    else:
        run = Run(plugin)
        run.steps(0, 1)
        if moment == "closed":
            run.session.close()
        twin = pickle.loads(pickle.dumps(plugin))
        run.session.close()
    assert type(twin) is kind
    again = Run(twin)
    again.steps(0)
    assert again.session.latest.value("redline_steps_total") == 1
    assert again.session.notes == ()
    again.session.close()


@of_every_plugin
def test_it_can_be_deep_copied_while_in_use(kind: type) -> None:
    plugin = often(kind)
    run = Run(plugin)
    run.steps(0)
    twin = copy.deepcopy(plugin)
    run.steps(1)
    run.session.close()
    assert type(twin) is kind
    assert run.session.notes == ()


# State ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*MONITORS, *CONTROLLERS])
def test_its_state_goes_through_a_file_and_back(kind: type) -> None:
    plugin = often(kind)
    fresh = frozen(plugin.state_dict())
    run = Run(plugin)
    run.steps(0, 1, 2)
    state = plugin.state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    twin = often(kind)
    assert frozen(twin.state_dict()) == fresh
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert frozen(twin.state_dict()) == frozen(state)
    run.session.close()


@pytest.mark.parametrize("kind", [*MONITORS, *CONTROLLERS])
def test_a_fresh_state_can_be_loaded(kind: type) -> None:
    plugin, twin = often(kind), often(kind)
    twin.load_state_dict(plugin.state_dict())
    assert frozen(twin.state_dict()) == frozen(plugin.state_dict())
    run = Run(twin)
    run.steps(0)
    run.session.close()
    assert run.session.notes == ()


@of_every_monitor
def test_resumed_monitor_reads_what_it_would_have_read(kind: type[Monitor]) -> None:
    def readings(interrupted: bool) -> dict[Any, float]:
        run = Run(make(kind, every=1))
        run.steps(0, 1, 2)
        if interrupted:
            state = copy.deepcopy(run.session.state_dict())
            run.session.close()
            run.session = redline.attach(run.model, run.optimizer, monitors=[make(kind, every=1)], run="contract")
            run.session.load_state_dict(state)
        run.steps(3, 4)
        run.session.close()
        timed = ("redline_last_step_timestamp_seconds", "redline_overhead_ratio")
        values = run.session.latest.values
        return {series: value for series, value in values.items() if series.metric not in timed}

    assert readings(interrupted=True) == pytest.approx(readings(interrupted=False), rel=1e-5)


# Observing --------------------------------------------------------------------------------------------


@of_every_monitor
def test_measuring_changes_nothing(kind: type[Monitor]) -> None:
    """Everything is compared right before and right after the measurement itself."""
    monitor = make(kind, every=1)
    compared: list[int] = []
    run: Run

    class Between(kind):  # type: ignore[misc, valid-type]
        def measure(self, step: Step, readings: Readings) -> None:
            before = everything(run)
            monitor.measure(step, readings)
            assert everything(run) == before
            compared.append(step.index)

    run = Run(Between(every=1))
    run.steps(0, 1, 2)
    run.session.close()
    assert compared == [0, 1, 2]
    assert run.session.notes == ()


@pytest.mark.parametrize("kind", [*MONITORS, *SINKS])
def test_observed_run_ends_in_the_same_bits(kind: type) -> None:
    alone, watched = Run(make(redline.StepHealth, every=lambda step: False)), Run(often(kind))
    ends = []
    for run in (alone, watched):
        torch.manual_seed(1)
        np.random.seed(1)  # noqa: NPY002 the run's own stream
        random.seed(1)
        run.steps(*range(5))
        ends.append(everything(run))
        run.session.close()
    assert ends[0] == ends[1]


@of_every_monitor
def test_it_measures_something_and_is_counted(kind: type[Monitor]) -> None:
    run = Run(make(kind, every=2))
    at_start = set(run.session.latest.values)
    run.steps(0, 1, 2)
    latest = run.session.latest
    run.session.close()
    assert latest.value("redline_measurements_total", monitor=kind.__name__) == 2
    always = {"redline_step_scale", "redline_last_step_timestamp_seconds"}
    assert {series.metric for series in set(latest.values) - at_start} - always
    assert run.session.notes == ()


@of_every_monitor
def test_what_it_reads_is_defined(kind: type[Monitor]) -> None:
    run = Run(make(kind, every=1))
    run.steps(0)
    values = run.session.latest.values
    run.session.close()
    for series in values:
        assert len(series.labels) == len(redline.METRICS[series.metric].labels)


@of_every_monitor
def test_it_keeps_no_copy_of_the_parameters(kind: type[Monitor]) -> None:
    monitor = make(kind, every=1)
    run = Run(monitor)
    run.steps(0, 1)
    sizes = {tuple(parameter.shape) for parameter in run.model.parameters() if parameter.dim() > 1}
    kept = {tuple(tensor.shape) for tensor in tensors_in(vars(monitor))}
    run.session.close()
    assert sizes & kept == set()


def tensors_in(value: Any, seen: set[int] | None = None) -> list[Tensor]:
    seen = set() if seen is None else seen
    if id(value) in seen:
        return []
    seen.add(id(value))
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for inner in value.values() for tensor in tensors_in(inner, seen)]
    if isinstance(value, (list, tuple, set, frozenset)):
        return [tensor for inner in value for tensor in tensors_in(inner, seen)]
    return tensors_in(vars(value), seen) if hasattr(value, "__dict__") and not isinstance(value, type) else []


# In company -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MONITORS)
def test_two_of_a_kind_are_told_apart(kind: type[Monitor]) -> None:
    run = Run(make(kind, every=1), make(kind, every=2))
    run.steps(0, 1, 2)
    latest, state = run.session.latest, run.session.state_dict()
    run.session.close()
    name = kind.__name__
    assert latest.series("redline_measurements_total") == {(name,): 3, (f"{name}-2",): 2}
    assert set(state["monitors"]) == {name, f"{name}-2"}
    assert run.session.notes == ()


@pytest.mark.parametrize("kind", CONTROLLERS)
def test_two_controllers_of_a_kind_are_told_apart(kind: type[Controller]) -> None:
    run = Run(often(kind), often(kind))
    run.steps(0, 1)
    state = run.session.state_dict()
    run.session.close()
    controllers = set(state["control"]["controllers"])
    assert controllers == {kind.__name__, f"{kind.__name__}-2"}
    assert {one.controller for one in run.session.interventions} <= controllers
    assert run.session.notes == ()


@of_every_sink
def test_two_sinks_of_a_kind_go_side_by_side(kind: type[Sink]) -> None:
    run = Run(make(kind, every=1), make(kind, every=2))
    run.steps(0, 1, 2)
    run.session.close()
    assert run.session.notes == ()
    assert run.session.latest.value("redline_steps_total") == 3


@of_every_plugin
def test_it_can_be_used_in_one_session_after_another(kind: type) -> None:
    plugin = often(kind)
    for _ in range(2):
        run = Run(plugin)
        run.steps(0, 1)
        run.session.close()
        assert run.session.latest.value("redline_steps_total") == 2
        assert run.session.notes == ()


@of_every_plugin
def test_a_session_without_a_step_is_fine(kind: type) -> None:
    run = Run(often(kind))
    run.session.close()
    assert run.session.notes == ()


@of_every_plugin
def test_a_run_that_is_not_finite_is_survived(kind: type) -> None:
    """A NaN is what one wants to be told of; it must not end the telling. A controller may stop the run, with words."""
    run = Run(often(kind))
    run.steps(0)
    with torch.no_grad():
        run.model[0].weight[0, 0] = float("nan")
    stops = kind in (redline.StepClamp, redline.RadiusLR)
    with pytest.raises(RunStoppedError, match="the update was not finite") if stops else contextlib.nullcontext():
        run.steps(1, 2)
    run.session.close()
    steps = 2 if stops else 3
    assert run.session.latest.value("redline_steps_total") == steps
    assert run.session.notes == ()
    assert run.session.report().to_dict()["steps"] == steps


# Controllers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONTROLLERS)
def test_controller_changes_nothing_itself(kind: type[Controller]) -> None:
    controller = often(kind)
    asked: list[str] = []
    run: Run

    class Between(kind):  # type: ignore[misc, valid-type]
        def before_update(self, step: Step) -> Any:
            before = everything(run)
            decision = controller.before_update(step)
            assert everything(run) == before
            asked.append("before_update")
            return decision

        def inspect(self, step: Step) -> Any:
            before = everything(run)
            decisions = list(controller.inspect(step))
            assert everything(run) == before
            asked.append("inspect")
            return decisions

    run = Run(Between())
    run.steps(0, 1)
    run.session.close()
    assert asked.count("before_update") == 2


@pytest.mark.parametrize("kind", CONTROLLERS)
def test_every_decision_leaves_a_trace(kind: type[Controller]) -> None:
    run = Run(often(kind))
    run.steps(0, 1, 2)
    run.session.close()
    counted = run.session.latest.series("redline_interventions_total")
    traced: dict[tuple[str, str], int] = {}
    for one in run.session.interventions:
        traced[one.controller, one.action] = traced.get((one.controller, one.action), 0) + 1
        assert one.reason
    assert {labels: count for labels, count in counted.items() if count} == traced
