"""The session on models and optimizers as they come, and what cannot be attached to."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from session_runs import (
    Keeping,
    Net,
    Run,
    Scaling,
    norm,
    often,
    quiet_machine,  # noqa: F401 around every test
)
from torch import Tensor, nn
from torch.optim import Optimizer

import redline
from redline import ConfigurationError, RedlineWarning

# What models and optimizers come with -------------------------------------------------------------------------


def test_group_added_midway_counts_from_its_first_step_on() -> None:
    run = Run(lambda model: [torch.optim.SGD(model.body.parameters(), 0.1)])
    with run.attach(*often(), controllers=[Scaling(0.5)]) as session:
        run.step(0)
        assert set(session.latest.layers("redline_update_spectral_norm")) == {"body.weight"}
        run.optimizers[0].add_param_group({"params": list(run.model.head.parameters()), "lr": 0.01})
        before = run.parameters
        run.step(1)
        latest = session.latest
        update = {name: tensor - before[name] for name, tensor in run.parameters.items()}
        assert update["head.weight"].any()
        assert 0.5 * latest.value("redline_update_norm") == pytest.approx(norm(update.values()), rel=1e-4)
        assert set(latest.layers("redline_update_spectral_norm")) == {"body.weight", "head.weight"}
        assert latest.value("redline_learning_rate", optimizer="SGD", group="1") == 0.01
        run.step(2)
        assert session.latest.value("redline_measurements_total", monitor="GhostRadius") == 3


class Awkward(nn.Module):
    """Frozen, tied, unused, all-zero and sparsely trained parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.sparse = nn.Embedding(13, 7, sparse=True)
        self.dense = nn.Embedding(13, 7)
        self.frozen = nn.Linear(7, 7).requires_grad_(False)
        self.zero = nn.Linear(7, 7, bias=False)
        self.unused = nn.Linear(7, 7)
        self.scalar = nn.Parameter(torch.tensor(0.5))
        self.head = nn.Linear(7, 13, bias=False)
        self.head.weight = self.dense.weight
        nn.init.zeros_(self.zero.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.frozen(self.sparse(tokens) + self.dense(tokens))
        return self.head(hidden + self.zero(0 * hidden)) * self.scalar


def awkward(model: Any) -> list[Optimizer]:
    rest = [parameter for name, parameter in model.named_parameters() if name != "sparse.weight"]
    return [torch.optim.SGD(rest, 0.1, momentum=0.9), torch.optim.SparseAdam([model.sparse.weight], 1e-2)]


def test_frozen_tied_unused_zero_and_sparse_parameters_are_never_fatal() -> None:
    run = Run(awkward, Awkward)
    with run.attach(*often(), controllers=[Scaling(0.5)], sinks=[Keeping(1)]) as session:
        for seed in range(4):
            tokens = torch.randint(0, 13, (6, 3), generator=torch.Generator().manual_seed(seed))
            F.cross_entropy(run.model(tokens).flatten(0, 1), tokens.flatten()).backward()
            assert run.model.sparse.weight.grad.is_sparse
            dense = [p.grad for p in run.model.parameters() if p.grad is not None and not p.grad.is_sparse]
            expected = norm([*dense, run.model.sparse.weight.grad.coalesce().values()])
            before = run.parameters
            run.update()
            update = [tensor - before[name] for name, tensor in run.parameters.items()]
            latest = session.latest
            assert latest.value("redline_gradient_norm") == pytest.approx(expected, rel=1e-5)
            assert 0.5 * latest.value("redline_update_norm") == pytest.approx(norm(update), rel=1e-3)
            assert 0 < latest.value("redline_normalized_step_size") < math.inf
        assert session.notes == ()
        assert session.latest.series("redline_nonfinite_total") == dict.fromkeys(
            [("loss",), ("gradient",), ("update",), ("weight",)], 0
        )
    matrices = {"sparse.weight", "dense.weight", "frozen.weight", "zero.weight", "unused.weight"}
    assert set(latest.layers("redline_weight_spectral_norm")) == matrices, "tied ones once"
    assert set(latest.layers("redline_update_spectral_norm")) == matrices - {"frozen.weight"}
    assert latest.layers("redline_update_spectral_norm")["unused.weight"] == 0
    assert latest.layers("redline_weight_spectral_norm")["zero.weight"] == 0
    assert "zero.weight" not in latest.layers("redline_weight_stable_rank")
    assert "zero.weight" not in latest.layers("redline_update_to_weight_ratio")


def test_step_that_moves_nothing_is_measured() -> None:
    run = Run(lambda model: [torch.optim.SGD(model.parameters(), 0.0)])
    with run.attach(*often()) as session:
        run.step(0)
        latest = session.latest
    assert latest.value("redline_update_norm") == 0
    assert latest.value("redline_normalized_step_size") == 0
    assert latest.value("redline_ghost_radius") == math.inf
    assert latest.value("redline_measurements_total", monitor="GhostRadius") == 1


def test_step_without_any_gradient_is_measured() -> None:
    run = Run()
    with run.attach(redline.WeightSpectrum(1), redline.UpdateSpectrum(1), redline.StepHealth(1)) as session:
        run.loss(0)
        run.optimizers[0].step()
        latest = session.latest
    assert latest.value("redline_steps_total") == 1
    assert latest.value("redline_update_norm") == 0
    assert "redline_gradient_norm" not in latest


def test_steps_without_a_forward_are_measured_but_for_their_tangent() -> None:
    run = Run()
    for parameter in run.model.parameters():
        parameter.grad = torch.ones_like(parameter)

    def two_steps() -> None:
        run.optimizers[0].step()
        run.optimizers[0].step()

    session = run.attach(redline.GhostRadius(1))
    with pytest.warns(RedlineWarning, match="not called in training mode with gradients enabled since the last"):
        two_steps()
    session.close()
    assert session.latest.value("redline_steps_total") == 2
    assert session.latest.value("redline_update_norm") > 0
    assert "redline_normalized_step_size" not in session.latest
    assert len(session.notes) == 1


def test_parameter_outside_the_model_is_noted_and_counts_in_the_norm() -> None:
    outside = nn.Parameter(torch.zeros(3))
    run = Run(lambda model: [torch.optim.SGD([*model.parameters(), outside], 1.0)])
    with run.attach(redline.GhostRadius(1)) as session:
        before = run.parameters
        run.backward(0)
        outside.grad = torch.full((3,), 10.0)
        with pytest.warns(RedlineWarning, match=r"SGD\[0\]\[4\] is in the optimizer but not in the model"):
            run.update()
        update = [*(tensor - before[name] for name, tensor in run.parameters.items()), outside]
        assert session.latest.value("redline_update_norm") == pytest.approx(norm(update), rel=1e-5)
        assert session.latest.value("redline_normalized_step_size") > 0


# What can be attached -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "Net"}, "got a str as model; expected a torch.nn.Module"),
        ({"optimizer": "SGD"}, "got a str as optimizer; expected a torch.optim.Optimizer"),
        ({"optimizer": []}, "got 0 optimizers, none or one twice"),
        ({"batch_dim": -1}, "got batch_dim=-1; expected 0 or more"),
        ({"monitors": [redline.GhostRadius]}, "got the class GhostRadius as monitor; expected an instance"),
        ({"monitors": ["GhostRadius"]}, "got a str as monitor; expected an instance with a method `measure`"),
        ({"controllers": [redline.GhostRadius()]}, "got a GhostRadius as controller; expected an instance with a"),
        ({"sinks": [redline.GhostRadius()]}, "got a GhostRadius as sink; expected an instance with a method `emit`"),
        ({"module": "neck"}, r"got module='neck'; expected the qualified name of a submodule of Net, such as 'body'"),
    ],
)
def test_arguments_that_cannot_work_are_refused(arguments: dict[str, Any], message: str) -> None:
    run = Run()
    with pytest.raises(ConfigurationError, match=message):
        redline.attach(**{"model": run.model, "optimizer": run.optimizers, **arguments})


def test_one_optimizer_twice_is_refused() -> None:
    run = Run()
    with pytest.raises(ConfigurationError, match="got 2 optimizers, none or one twice"):
        redline.attach(run.model, run.optimizers * 2)


def test_optimizer_of_another_model_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"got a model \(Net\) none of whose 4 parameters is in the optimizer"):
        redline.attach(Net(), Run().optimizers)


def test_plugins_of_one_class_have_names_of_their_own() -> None:
    run = Run()
    with run.attach(
        redline.GhostRadius(1, max_samples=2),
        redline.GhostRadius(1, max_samples=None),
        controllers=[Scaling(), Scaling()],
    ) as session:
        run.step(0)
        latest = session.latest
        state = session.state_dict()
    assert latest.series("redline_measurements_total") == {("GhostRadius",): 1, ("GhostRadius-2",): 1}
    assert latest.value("redline_interventions_total", controller="Scaling-2", action="scale") == 1
    assert set(state["monitors"]) == {"GhostRadius", "GhostRadius-2"}
    assert set(state["control"]["controllers"]) == {"Scaling", "Scaling-2"}


def test_snapshots_are_immutable_and_stay_what_they_were() -> None:
    run = Run()
    sink = Keeping(1)
    with run.attach(*often(), sinks=[sink]):
        run.step(0)
        before = dict(sink.snapshots[0].values)
        run.step(1)
    assert dict(sink.snapshots[0].values) == before
    with pytest.raises(TypeError, match="does not support item assignment"):
        sink.snapshots[0].values[redline.Series("redline_loss")] = 0.0  # type: ignore[index]
    with pytest.raises(AttributeError, match="cannot assign"):
        sink.snapshots[0].step = 3  # type: ignore[misc]
