"""Decisions on single matrices: the trace and the readings they leave."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from matrix_decision_runs import (
    DECAYS,
    FACTORS,
    LAYERS,
    WD,
    Answer,
    Deciding,
    Joint,
    Numbers,
    Run,
    assert_committed,
    at,
    decaying,
    elsewhere,
    host,
    jointly,
    muon_and_adamw,
    over,
    scaling,
)
from runs import HostReads
from torch import Tensor, nn
from torch.optim import SGD, AdamW

import redline
from redline import (
    Need,
    Scale,
    Step,
    metrics,
)
from redline.readings import Readings

# Traces -----------------------------------------------------------------------------------------------------------


def test_traces_say_what_was_done_and_name_the_worst_layer(numbers: Numbers) -> None:
    run = Run(over(AdamW))
    reason = "{layer} was {sigma:.3g} over {limit}; {{braces}}."
    two = {"conv.weight": 0.5, "experts[2]": 0.25}
    saw = {"worst": numbers([1.0])[0], "sigma": numbers([2.5])[0], "limit": 1.0}
    controllers = [Deciding(scaling(two, numbers, reason, **saw)), Deciding(decaying(two, numbers, reason, **saw))]
    with run.attach(*controllers) as session:
        run.step(2)
        run.step(3)
    words = "experts[2] was 2.5 over 1.0; {braces}."
    expected = {"worst": 1.0, "sigma": 2.5, "limit": 1.0}
    assert [(one.step, one.controller, one.action, one.reason, dict(one.saw)) for one in session.interventions] == [
        (0, "Deciding", "scale", words, expected),
        (0, "Deciding-2", "decay", words, expected),
        (1, "Deciding", "scale", words, expected),
        (1, "Deciding-2", "decay", words, expected),
    ]


def test_words_without_a_worst_layer_are_as_they_stand(numbers: Numbers) -> None:
    run = Run(over(AdamW))
    with run.attach(Deciding(scaling({"conv.weight": 0.5}, numbers, "{layer}, {x:.1f}", x=2.0))) as session:
        run.step(2)
    assert [one.reason for one in session.interventions] == ["{layer}, {x:.1f}"]


def test_a_decay_without_a_reason_leaves_no_trace_and_is_carried_out(numbers: Numbers) -> None:
    run = Run(over(AdamW))
    before, net = run.parameters, run.net(2)
    saw = {"worst": numbers([0.0])[0]}
    with run.attach(Deciding(decaying(DECAYS, numbers, None, **saw))) as session:
        run.step(2)
        assert session.interventions == ()
        assert session.latest.value("redline_interventions_total", controller="Deciding", action="decay") == 0
    assert_committed(run, before, net, run.rates, run.decays(), decays=DECAYS)
    assert not session.report().to_dict()["interventions"]


def test_interventions_are_counted_by_action_from_the_start(numbers: Numbers) -> None:
    run = Run(over(AdamW))
    with run.attach(Deciding(at(1, scaling(FACTORS, numbers)), decaying(DECAYS, numbers))) as session:
        total = session.latest.series("redline_interventions_total")
        assert total["Deciding", "scale"] == total["Deciding", "decay"] == 0
        for seed in range(3):
            run.step(seed)
        total = session.latest.series("redline_interventions_total")
    assert (total["Deciding", "scale"], total["Deciding", "decay"]) == (1, 3)
    assert sum(total.values()) == 4


def test_on_an_accelerator_nobody_waits_and_the_trace_is_told_later() -> None:
    def reads(numbers: Numbers) -> tuple[list[str], redline.Session]:
        run = Run(over(AdamW, fused=True), torch.float32)
        saw = {"worst": numbers([0.0])[0], "share": numbers([0.3])[0]}
        told = (scaling(FACTORS, numbers, "{share:.1f} of {layer}.", **saw), decaying(DECAYS, numbers, "decay", **saw))
        joint = Joint(jointly(numbers([0.5])[0]), needs=Need.UPDATE)
        session = run.attach(Deciding(*told), joint)
        run.step(2)  # at the first what optimizers keep is looked at
        run.feed(3)
        with HostReads() as found:
            run.update()
        return found.seen, session

    seen, session = reads(elsewhere)
    assert seen == []
    told = [(one.step, one.action, one.reason) for one in session.interventions]
    each_step = [("scale", "0.3 of experts[0]."), ("decay", "decay"), ("scale", "jointly.")]
    assert told == [(step, *one) for step in range(2) for one in each_step]
    total = session.latest.series("redline_interventions_total")
    assert (total["Deciding", "scale"], total["Deciding", "decay"], total["Joint", "scale"]) == (2, 2, 2)
    session.close()
    seen, session = reads(host)
    assert seen != [], "what is on the host is looked at"
    session.close()


@pytest.mark.parametrize(
    "second",
    [decaying(DECAYS, elsewhere, "second."), scaling(FACTORS, host, "second.")],
    ids=["a decay", "of the host"],
)
def test_on_an_accelerator_traces_are_told_oldest_first(second: Answer) -> None:
    """Also if a later one has nothing that would have to be waited for."""
    run = Run(over(AdamW))
    first = scaling(FACTORS, elsewhere, "first.")
    with run.attach(Deciding(at(0, first), at(1, second))) as session:
        run.step(2)
        run.step(3)
    assert [(one.step, one.reason) for one in session.interventions] == [(0, "first."), (1, "second.")]


def test_on_an_accelerator_the_run_is_that_of_the_host() -> None:
    def run(numbers: Numbers) -> tuple[dict[str, Tensor], Any, Any, Any]:
        one = Run(muon_and_adamw)
        change = {
            1: scaling(FACTORS, numbers, "{layer}", worst=numbers([2.0])[0]),
            2: decaying(DECAYS, numbers, "{layer}", worst=numbers([3.0])[0]),
        }
        change[3] = scaling(dict.fromkeys(LAYERS, 1.0), numbers)
        controller = Deciding(*(at(index, answer) for index, answer in change.items()))
        with one.attach(controller, Joint(at(2, jointly(numbers([0.5])[0])))) as session:
            for seed in range(5):
                one.step(seed)
            latest = session.latest
        return one.parameters, one.state, session.interventions, latest.series("redline_interventions_total")

    on_host, on_device = run(host), run(elsewhere)
    for name, tensor in on_host[0].items():
        torch.testing.assert_close(on_device[0][name], tensor, rtol=1e-13, atol=1e-14)
    assert on_device[1:] == on_host[1:]
    assert [one.action for one in on_host[2]] == ["scale", "decay", "scale"]


# Readings ---------------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """Logits that are linear in the one parameter: a scaled step has exactly a scaled r."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 20) / 20)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class LinearStack(nn.Module):
    """The same of a stack."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 4, 20) / 20)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.sum(0).T


def learn(run: Run) -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(16, 20, generator=generator, dtype=torch.float64)
    run.optimizers[0].zero_grad()
    F.cross_entropy(run.model(x), torch.arange(16) % 4).backward()
    run.update()


def measuring(factor: float) -> Answer:
    def answer(step: Step) -> Iterable[Scale]:
        assert step.tangent(None) is not None
        return [Scale(factor, "jointly.")]

    return answer


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_the_committed_size_is_that_of_what_matrix_decisions_left_if_someone_measured_it(
    factor: float, numbers: Numbers
) -> None:
    run = Run(over(SGD, weight_decay=0.0), model=Linear, steps=0)
    controllers = [Deciding(scaling({"weight": 0.25}, numbers)), Joint(measuring(factor), needs=Need.TANGENT)]
    with run.attach(*controllers, monitors=[redline.GhostRadius(1, max_samples=None)]) as session:
        learn(run)
        latest = session.latest
    proposed = latest.value("redline_normalized_step_size")
    assert latest.value("redline_committed_step_size") == pytest.approx(0.25 * factor * proposed, rel=1e-9)
    assert latest.value("redline_step_scale") == factor


@pytest.mark.parametrize("decided", ["scale", "decay"])
def test_the_committed_size_is_absent_where_nobody_measured_what_was_left(decided: str, numbers: Numbers) -> None:
    run = Run(over(SGD), model=Linear, steps=0)
    answer = (scaling if decided == "scale" else decaying)({"weight": 0.25}, numbers)
    with run.attach(Deciding(at(1, answer)), monitors=[redline.GhostRadius(1, max_samples=None)]) as session:
        learn(run)
        latest = session.latest
        assert latest.value("redline_committed_step_size") == latest.value("redline_normalized_step_size")
        learn(run)
        assert "redline_committed_step_size" not in session.latest
        assert session.latest.value("redline_step_scale") == 1


@pytest.mark.parametrize(("model", "names"), [(Linear, ["weight"]), (LinearStack, ["weight[0]", "weight[1]"])])
def test_factors_of_one_leave_the_committed_size_as_measured(model: type[nn.Module], names: list[str]) -> None:
    run = Run(over(SGD), model=model, steps=0)
    same = Deciding(scaling(dict.fromkeys(names, 1.0)))
    with run.attach(same, monitors=[redline.GhostRadius(1, max_samples=None)]) as session:
        learn(run)
        latest = session.latest
    assert latest.value("redline_committed_step_size") == latest.value("redline_normalized_step_size")


def test_a_decay_equal_to_the_groups_leaves_the_committed_size_as_measured() -> None:
    run = Run(over(SGD), model=Linear, steps=0)
    same = Deciding(decaying({"weight": WD}, reason=None))
    with run.attach(same, monitors=[redline.GhostRadius(1, max_samples=None)]) as session:
        learn(run)
        latest = session.latest
    assert latest.value("redline_committed_step_size") == latest.value("redline_normalized_step_size")


class ReadsOut(Deciding):
    """Reads something of each matrix, and keeps what it was shown."""

    def read_out(self, step: Step, readings: Readings) -> None:
        self.weights = {name: tensor.detach().clone() for name, tensor in step.weights.items()}
        self.in_force = dict(step.rates)
        names = [layer.name for layer in step.layers]
        values = torch.arange(len(names)) + 10.0 * step.index
        readings.layers(metrics.WEIGHT_DECAY_IN_FORCE, names, values, values != 1)


def test_readings_of_a_controller_reach_the_snapshot(numbers: Numbers) -> None:
    run = Run(over(AdamW))
    with run.attach(ReadsOut(decaying({"wide.weight": 0.25}, numbers))) as session:
        run.step(2)
        values = session.latest.layers("redline_weight_decay_in_force")
        assert values == {name: float(k) for k, name in enumerate(LAYERS) if k != 1}
        run.step(3)
        assert session.latest.layers("redline_weight_decay_in_force")["experts[2]"] == 12.0


def test_readings_are_asked_for_when_all_have_decided() -> None:
    run = Run(over(AdamW))
    first, second = ReadsOut(), Deciding(decaying({"wide.weight": 0.25}))
    with run.attach(first, second):
        run.step(2)
    assert first.rates[0]["wide.weight"].weight_decay == WD
    assert first.in_force["wide.weight"].weight_decay == 0.25
