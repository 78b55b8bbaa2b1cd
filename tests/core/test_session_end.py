"""What a session keeps and lets go of, its end, and resuming it."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from session_runs import (
    BATCH,
    WIDTH,
    Keeping,
    Run,
    Scaling,
    in_memory,
    often,
    quiet_machine,  # noqa: F401 around every test
    sgd,
)
from torch import Tensor, nn
from torch.optim import Optimizer
from torch_optimizers import muon_and_adamw

import redline
from redline import ConfigurationError, Step

# What is kept, and let go of ------------------------------------------------------------------------------


class Snapshotting(Scaling):
    """Pays for copies of the optimizer's state, and rejects every other step."""

    snapshots_state = True

    def inspect(self, step: Step) -> Any:
        return [redline.Reject("as told.")] if step.index % 2 else super().inspect(step)


class Withholding(redline.Controller):
    """Withholds every other step."""

    def before_update(self, step: Step) -> redline.Withhold | None:
        return redline.Withhold("as told.") if step.index % 2 else None


@pytest.mark.parametrize(
    "controllers",
    [
        lambda: [],
        lambda: [Scaling(0.9)],
        lambda: [Snapshotting(0.9)],
        lambda: [Withholding()],
    ],
    ids=["watched", "scaled", "rejected", "withheld"],
)
@pytest.mark.parametrize("optimizers", [sgd, muon_and_adamw])
def test_nothing_of_a_parameters_size_is_kept_between_steps(
    optimizers: Callable[[nn.Module], list[Optimizer]], controllers: Callable[[], list[redline.Controller]]
) -> None:
    run = Run(optimizers)
    run.step(0)
    weights, inputs = in_memory(WIDTH, WIDTH), in_memory(BATCH, WIDTH)
    with run.attach(*often(), controllers=controllers()) as session:
        for seed in range(4):
            run.step(seed)
            assert in_memory(WIDTH, WIDTH) == weights
            assert in_memory(BATCH, WIDTH) == inputs
        assert session.latest.value("redline_measurements_total", monitor="StepHealth") == 4
        assert session.latest.value("redline_measurements_total", monitor="GhostRadius") >= 2
    assert in_memory(WIDTH, WIDTH) == weights


def test_copy_of_the_parameters_is_held_on_due_steps_only() -> None:
    """Counted within the step, after the update and before the session sees it."""
    run = Run()
    run.step(0)
    held: list[int] = []
    run.optimizers[0].register_step_post_hook(lambda *_: held.append(in_memory(WIDTH, WIDTH)))
    run.step(1)
    with run.attach(
        redline.UpdateSpectrum(3), redline.GhostRadius(lambda step: step == 5), redline.StepHealth(1)
    ) as session:
        for seed in range(7):
            run.step(seed)
        assert session.latest.value("redline_measurements_total", monitor="UpdateSpectrum") == 3
    unwatched, due = held[0], [count - held[0] for count in held[1:]]
    assert unwatched > 0
    assert due == [1, 0, 0, 1, 0, 1, 1]


def test_inputs_are_held_only_for_a_tangent_that_is_due() -> None:
    run = Run()
    inputs = in_memory(BATCH, WIDTH)
    held: list[int] = []
    with run.attach(redline.GhostRadius(2), redline.WeightSpectrum(1), redline.UpdateSpectrum(1)):
        for seed in range(4):
            run.backward(seed)
            held.append(in_memory(BATCH, WIDTH) - inputs)
            run.update()
    # On due steps also the body's output of the same shape, which is the input of the head.
    assert [count > 0 for count in held] == [True, False, True, False]


def test_session_lets_go_of_the_run_once_closed_and_forgotten() -> None:
    run = Run()
    before = in_memory(WIDTH, WIDTH)
    session = run.attach(*often())
    run.step(0)
    session.close()
    del session
    del run
    assert in_memory(WIDTH, WIDTH) < before


# The end, and after -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizers", [sgd, muon_and_adamw])
def test_close_takes_every_hook_off_and_may_be_called_again(
    optimizers: Callable[[nn.Module], list[Optimizer]],
) -> None:
    run = Run(optimizers)
    run.model.body.register_forward_hook(lambda *_: None)
    run.optimizers[0].register_step_post_hook(lambda *_: None)
    hooks = run.hooks()
    sink = Keeping(1)
    session = run.attach(*often(), controllers=[Scaling()], sinks=[sink])
    assert run.hooks() > hooks
    run.step(0)
    session.close()
    assert run.hooks() == hooks
    session.close()
    session.__exit__(None, None, None)
    assert len(sink.reports) == 1
    run.step(1)
    assert session.latest.value("redline_steps_total") == 1
    assert len(sink.snapshots) == 1


def test_everything_can_be_asked_after_close() -> None:
    run = Run()
    with run.attach(*often(), controllers=[Scaling()]) as session:
        for seed in range(3):
            session.observe(loss=float(seed))
            run.step(seed)
    assert session.latest.step == 2
    assert session.latest.value("redline_normalized_step_size") > 0
    assert set(session.latest.layers("redline_weight_spectral_norm")) == {"body.weight", "head.weight"}
    assert [one.step for one in session.interventions] == [0, 1, 2]
    report = session.report()
    assert report.steps == 3
    assert (report.first_loss, report.last_loss) == (0.0, 2.0)
    assert [(one.controller, one.action, one.count) for one in report.interventions] == [("Scaling", "scale", 3)]
    assert report.step_sizes is not None
    assert report.step_sizes.measured == 3
    assert report.to_dict()["steps"] == 3
    assert session.state_dict()["index"] == 3


def test_session_ends_with_its_block_even_if_the_run_fails() -> None:
    run = Run()
    hooks = run.hooks()
    sink = Keeping(1)

    def broken_run() -> None:
        with run.attach(*often(), sinks=[sink]):
            run.step(0)
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        broken_run()
    assert run.hooks() == hooks
    assert len(sink.reports) == 1


def test_session_without_any_step_can_be_closed_and_reports_so() -> None:
    with Run().attach(*often()) as session:
        pass
    report = session.report()
    assert report.steps == 0
    assert [verdict.seen for verdict in report.verdicts] == ["No optimizer step was taken."]
    assert report.step_sizes is None
    assert report.overhead_ratio is None


def test_refusal_leaves_no_hook_behind() -> None:
    run = Run()
    hooks = run.hooks()
    with pytest.raises(ConfigurationError, match="got module='neck'"):
        run.attach(module="neck")
    assert run.hooks() == hooks


# Resuming -----------------------------------------------------------------------------------------------


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def plugins() -> dict[str, Any]:
    return {
        "monitors": [
            redline.WeightSpectrum(2),
            redline.UpdateSpectrum(2),
            redline.GhostRadius(3, max_samples=None),
            redline.StepHealth(1),
        ],
        "controllers": [Scaling(0.5)],
    }


def attach_again(run: Run) -> redline.Session:
    return redline.attach(run.model, run.optimizers, run="again", **plugins())


def train(run: Run, session: redline.Session, seeds: Iterable[int]) -> Iterator[None]:
    for seed in seeds:
        session.observe(loss=float(seed))
        run.step(seed)
        yield


def comparable(values: Any) -> dict[Any, float]:
    timed = {"redline_overhead_ratio", "redline_last_step_timestamp_seconds"}
    return {series: value for series, value in values.items() if series.metric not in timed}


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def test_state_goes_through_a_file_and_back() -> None:
    run = Run()
    with attach_again(run) as session:
        list(train(run, session, range(5)))
        state = session.state_dict()
        again = Run()
        with attach_again(again) as resumed:
            resumed.load_state_dict(through_a_file(state))
            assert equal(resumed.state_dict(), state)


def test_resumed_run_goes_on_as_if_it_had_never_stopped() -> None:
    whole = Run()
    with attach_again(whole) as session:
        list(train(whole, session, range(9)))
    expected, expected_report = session.latest, session.report()

    run = Run()
    with attach_again(run) as first:
        list(train(run, first, range(4)))
        state = through_a_file(first.state_dict())
    with attach_again(run) as second:
        second.load_state_dict(state)
        assert second.latest.step == 3
        assert second.latest.value("redline_steps_total") == 4
        list(train(run, second, range(4, 9)))
    assert second.interventions == session.interventions
    assert comparable(second.latest.values) == pytest.approx(comparable(expected.values), rel=1e-5)
    assert second.latest.measured_at == expected.measured_at
    report = second.report()
    assert (report.steps, report.first_loss, report.last_loss) == (9, 0.0, 8.0)
    assert report.step_sizes == expected_report.step_sizes
    assert report.layers == expected_report.layers
    assert [(one.controller, one.action, one.count) for one in report.interventions] == [("Scaling", "scale", 9)]
    assert second.state_dict()["control"]["controllers"]["Scaling"] == {"inspected": 9}


def test_state_taken_between_two_optimizers_loses_nothing() -> None:
    run = Run(muon_and_adamw)
    with run.attach(redline.StepHealth(1), redline.UpdateSpectrum(1)) as session:
        run.step(0)
        run.backward(1)
        run.optimizers[0].step()
        session.state_dict()
        run.optimizers[1].step()
        assert dict_of(session.state_dict()["readings"]["counts"])["redline_steps_total", ()] == 2


def dict_of(counts: Iterable[Any]) -> dict[Any, float]:
    return {(metric, tuple(labels)): value for metric, labels, value in counts}


def test_state_of_another_set_of_monitors_is_taken_up_as_far_as_it_goes() -> None:
    run = Run()
    with attach_again(run) as session:
        list(train(run, session, range(3)))
        state = through_a_file(session.state_dict())
    with run.attach(redline.StepHealth(1)) as resumed:
        resumed.load_state_dict(state)
        run.step(3)
        assert resumed.latest.step == 3
        assert resumed.latest.value("redline_measurements_total", monitor="StepHealth") == 4
    with run.attach(*often(), redline.StepHealth(1), controllers=[Scaling(), Scaling()]) as resumed:
        resumed.load_state_dict(state)
        run.step(3)
        assert resumed.latest.value("redline_measurements_total", monitor="StepHealth-2") == 1


def test_state_of_an_unknown_version_is_refused() -> None:
    with (
        Run().attach() as session,
        pytest.raises(ConfigurationError, match="got a session state of version 99; expected 4"),
    ):
        session.load_state_dict({"version": 99})
