"""The session: what happens when in a step, and what is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from session_runs import (
    BATCH,
    CLASSES,
    WIDTH,
    Keeping,
    Run,
    Watching,
    norm,
    often,
    quiet_machine,  # noqa: F401 around every test
)
from torch import Tensor
from torch_optimizers import muon_and_adamw

import redline
from redline import ConfigurationError, Need, Readings, Scale, Snapshot, Step

# When things happen -------------------------------------------------------------------------------------


def test_step_happens_in_the_order_that_the_session_documents() -> None:
    run = Run()
    log: list[str] = []

    class Telling(redline.Controller):
        def before_update(self, step: Step) -> None:
            log.append(f"before the update of {step.index}, {moved()}")

        def inspect(self, step: Step) -> Iterable[Scale]:
            log.append(f"inspect {step.index}, {moved()}")
            return [Scale(0.0, "as told.")]

    class Logging(Keeping):
        def emit(self, snapshot: Snapshot) -> None:
            log.append(f"emit {snapshot.step}")

    start = run.parameters["body.weight"]

    def moved() -> str:
        return "moved" if not torch.equal(start, run.parameters["body.weight"]) else "as it was"

    def telling(what: str, **options: Any) -> Watching:
        return Watching(lambda step, readings: log.append(f"{what} {step.index}, {moved()}"), **options)

    with run.attach(
        telling("committed", after_commit=True), telling("proposed"), controllers=[Telling()], sinks=[Logging(2)]
    ):
        for seed in range(3):
            log.append("forward and backward")
            run.backward(seed)
            log.append("step")
            run.update()
    step = [
        "forward and backward",
        "step",
        "before the update of {}, as it was",
        "proposed {}, moved",
        "inspect {}, moved",
        "committed {}, as it was",
        "emit {}",
    ]
    # The sink is due at steps 0 and 2.
    expected = [line.format(index) for index in range(3) for line in step if index != 1 or line != "emit {}"]
    assert log == expected


def test_closure_is_evaluated_ahead_of_the_moment_before_the_update() -> None:
    run = Run()
    log: list[str] = []

    class Telling(redline.Controller):
        def before_update(self, step: Step) -> None:
            log.append("before the update")

    def closure() -> Tensor:
        run.optimizers[0].zero_grad()
        loss = run.loss(0)
        loss.backward()
        log.append("closure")
        return loss

    with run.attach(controllers=[Telling()]):
        run.optimizers[0].step(closure)
        run.optimizers[0].step(closure=closure)
    assert log == ["closure", "before the update"] * 2


def test_schedules_are_counted_in_optimizer_steps() -> None:
    run = Run()
    sink = Keeping(every=lambda step: step in (1, 4))
    due: list[int] = []
    with run.attach(Watching(lambda step, _: due.append(step.index), every=3), sinks=[sink]) as session:
        for index in range(8):
            run.backward(index)
            run.backward(index)  # accumulation: two forwards a step
            run.update()
        assert due == [0, 3, 6]
        assert [snapshot.step for snapshot in sink.snapshots] == [1, 4]
        assert session.latest.step == 7
        assert session.latest.value("redline_measurements_total", monitor="Watching") == 3


@pytest.mark.parametrize(
    "make",
    [
        redline.WeightSpectrum,
        redline.UpdateSpectrum,
        redline.GhostRadius,
        redline.StepHealth,
        redline.ConsoleReport,
        lambda every: redline.PrometheusExporter(every=every),
    ],
)
@pytest.mark.parametrize(
    ("every", "message"),
    [
        (0, r"got a schedule of 0; expected at least 1 \(every step\)"),
        (-3, "got a schedule of -3; expected at least 1"),
        (True, "got True as a schedule; expected an int"),
        (0.5, r"got 0.5 as a schedule; expected an int \(every n steps\) or a callable"),
        ("daily", "got 'daily' as a schedule; expected an int"),
    ],
)
def test_schedule_that_is_none_is_refused(make: Callable[[Any], Any], every: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make(every)


def test_monitors_share_what_they_need() -> None:
    """The update and the tangent are taken once a step, for all who ask."""
    run = Run()
    seen: list[int] = []

    def look(step: Step, _: Readings) -> None:
        seen.append(id(step.update.tensors))
        seen.append(id(step.tangent(None)))

    with run.attach(Watching(look, needs=Need.TANGENT), Watching(look, needs=Need.TANGENT)):
        run.step(0)
    assert len(seen) == 4
    assert len(set(seen)) == 2


# What is read -----------------------------------------------------------------------------------------


def test_readings_of_a_step_are_those_computed_by_hand() -> None:
    run = Run()
    with run.attach(*often()) as session:
        for seed in range(3):
            before = run.parameters
            loss = run.loss(seed)
            session.observe(loss=loss)
            loss.backward()
            gradient = run.gradient_norm
            run.update()
            update = {name: tensor - before[name] for name, tensor in run.parameters.items()}
            latest = session.latest
            assert latest.value("redline_loss") == pytest.approx(loss.item())
            assert latest.value("redline_gradient_norm") == pytest.approx(gradient, rel=1e-5)
            assert latest.value("redline_update_norm") == pytest.approx(norm(update.values()), rel=1e-5)
            assert latest.value("redline_learning_rate", optimizer="SGD", group="0") == 0.1
            assert latest.value("redline_weight_decay", optimizer="SGD", group="0") == 0
            for layer, sigma in latest.layers("redline_weight_spectral_norm").items():
                exact = torch.linalg.matrix_norm(run.parameters[layer].double(), 2)
                assert sigma == pytest.approx(float(exact), rel=1e-4)
            for layer, sigma in latest.layers("redline_update_spectral_norm").items():
                exact = torch.linalg.matrix_norm(update[layer].double(), 2)
                assert sigma == pytest.approx(float(exact), rel=1e-3)


def test_normalized_step_size_agrees_with_a_float64_reference() -> None:
    run = Run()
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(BATCH, WIDTH, generator=generator)
    before = {name: tensor.double() for name, tensor in run.parameters.items()}
    with run.attach(redline.GhostRadius(1, max_samples=None)) as session:
        F.cross_entropy(run.model(x), torch.arange(BATCH) % CLASSES).backward()
        run.update()
        r = session.latest.value("redline_normalized_step_size")
    update = {name: tensor.double() - before[name] for name, tensor in run.parameters.items()}

    def logits(t: float) -> Tensor:
        at = {name: before[name] + t * update[name] for name in before}
        return torch.func.functional_call(run.model.double(), at, (x.double(),))

    tangent = (logits(1e-5) - logits(-1e-5)) / 2e-5
    spread = tangent.amax(-1) - tangent.amin(-1)
    assert r == pytest.approx(float(spread.max()) / math.pi, rel=1e-4)


def test_loss_and_gradient_that_are_not_finite_are_counted_and_exported_as_they_are() -> None:
    run = Run()
    with run.attach(redline.StepHealth(1), redline.GhostRadius(1)) as session:
        session.observe(loss=float("nan"))
        run.backward(0)
        run.model.body.weight.grad[0, 0] = float("inf")  # type: ignore[index]
        run.update()
        latest = session.latest
    assert math.isnan(latest.value("redline_loss"))
    assert latest.value("redline_gradient_norm") == math.inf
    assert latest.value("redline_nonfinite_total", source="loss") == 1
    assert latest.value("redline_nonfinite_total", source="gradient") == 1
    assert latest.value("redline_nonfinite_total", source="update") == 1
    assert latest.value("redline_nonfinite_total", source="weight") == 0


def test_loss_is_that_of_the_step_it_was_observed_for() -> None:
    run = Run()
    with run.attach(redline.StepHealth(1)) as session:
        session.observe(loss=1.5)
        run.step(0)
        assert session.latest.value("redline_loss") == 1.5
        assert session.latest.measured_at[redline.Series("redline_loss")] == 0
        run.step(1)
        assert session.latest.measured_at[redline.Series("redline_loss")] == 0, "step 1 was not observed"
        session.observe(loss=torch.tensor([2.5]))
        run.step(2)
        assert session.latest.value("redline_loss") == 2.5


def test_loss_that_is_no_single_number_is_refused() -> None:
    with (
        Run().attach(redline.StepHealth()) as session,
        pytest.raises(ConfigurationError, match=r"got a loss of shape \(3,\); expected a single number, such as"),
    ):
        session.observe(loss=torch.zeros(3))


def test_loss_is_kept_as_it_was_when_it_was_observed() -> None:
    run = Run()
    with run.attach(redline.StepHealth(1)) as session:
        loss = run.loss(0)
        observed = loss.item()
        session.observe(loss=loss)
        loss /= 4  # as for gradient accumulation
        loss.backward()
        run.update()
        assert session.latest.value("redline_loss") == pytest.approx(observed)


def test_learning_rate_is_that_of_the_step_even_where_a_schedule_moves_a_tensor_in_place() -> None:
    run = Run(lambda model: [torch.optim.Adam(model.parameters(), torch.tensor(0.5))])
    schedule = torch.optim.lr_scheduler.ExponentialLR(run.optimizers[0], 0.1)
    with run.attach(redline.StepHealth(1)) as session:
        run.step(0)
        schedule.step()
        assert session.latest.value("redline_learning_rate", optimizer="Adam", group="0") == pytest.approx(0.5)
        run.step(1)
        schedule.step()
        assert session.latest.value("redline_learning_rate", optimizer="Adam", group="0") == pytest.approx(0.05)


def test_groups_are_told_apart_by_name_or_number() -> None:
    run = Run(
        lambda model: [
            torch.optim.AdamW(
                [
                    {"params": [model.body.weight], "lr": 1e-3, "name": "matrices", "weight_decay": 0.5},
                    {"params": [model.head.bias], "lr": 1e-2, "name": "vectors"},
                ]
            ),
            torch.optim.SGD([model.head.weight], 1e-1),
            torch.optim.SGD([model.body.bias], 1.0),
        ]
    )
    with run.attach(redline.StepHealth()) as session:
        run.step(0)
        latest = session.latest
    assert latest.series("redline_learning_rate") == {
        ("AdamW", "matrices"): 1e-3,
        ("AdamW", "vectors"): 1e-2,
        ("SGD", "0"): 1e-1,
        ("SGD-2", "0"): 1.0,
    }
    assert latest.value("redline_weight_decay", optimizer="AdamW", group="matrices") == 0.5


def test_counters_exist_at_zero_from_the_start() -> None:
    with Run().attach(*often()) as session:
        latest = session.latest
        assert latest.step == -1
        assert latest.value("redline_steps_total") == 0
        assert latest.series("redline_measurements_total") == dict.fromkeys(
            [("WeightSpectrum",), ("UpdateSpectrum",), ("GhostRadius",), ("StepHealth",)], 0
        )
        assert latest.series("redline_nonfinite_total") == dict.fromkeys(
            [("loss",), ("gradient",), ("update",), ("weight",)], 0
        )


def test_step_in_progress_does_not_hide_what_it_comes_to() -> None:
    """Whoever looks between the steps of two optimizers still finds the joint step when it is done."""
    run = Run(muon_and_adamw)
    with run.attach(redline.StepHealth(1), redline.UpdateSpectrum(1)) as session:
        run.step(0)
        run.backward(1)
        run.optimizers[0].step()
        assert session.latest.value("redline_steps_total") == 1
        run.optimizers[1].step()
        latest = session.latest
        assert latest.step == 1
        assert latest.value("redline_steps_total") == 2
        assert latest.measured_at[redline.Series("redline_update_norm")] == 1
        assert session.report().steps == 2
