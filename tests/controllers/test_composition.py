"""Controllers together: the order of the list does not matter, each has its effect, and all of them tell of it.

What lengthens a step decides first, single matrices next, the clamp on the whole last; among equals the list decides.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import io
import itertools
import json
import math
import typing
from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import ControlledRun, frozen
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

import redline
from redline import NonFiniteGuard, RadiusLR, SpikeGuard, StepClamp, UpdateClamp, WeightDecayControl
from redline.integrations.lightning import RedlineCallback

FEATURES, CLASSES, BATCH = 6, 3, 16
BODY, HEAD = "body.weight", "head.weight"
IN_FORCE, CEILING = "redline_weight_decay_in_force", "redline_weight_spectral_ceiling"
COMMITTED, SCALE = "redline_committed_step_size", "redline_step_scale"


pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX`:UserWarning"),
]

# Runs -------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


def adamw(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.AdamW(model.parameters(), 2e-2, weight_decay=0.3)]


def muon_and_adamw(model: nn.Module) -> list[Optimizer]:
    body, *rest = model.parameters()
    return [torch.optim.Muon([body], 0.05, weight_decay=0.2), torch.optim.AdamW(rest, 2e-2, weight_decay=0.3)]


EVERY_OPTIMIZER = pytest.mark.parametrize("optimizers", [adamw, muon_and_adamw], ids=lambda make: make.__name__)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(BATCH, FEATURES, generator=torch.Generator().manual_seed(seed))
    return x, x[:, :CLASSES].argmax(1)


class Run(ControlledRun):
    """A model with its optimizers; two made alike are alike."""

    def __init__(self, optimizers: Callable[[nn.Module], list[Optimizer]] = adamw) -> None:
        torch.manual_seed(0)
        self.model = Net()
        self.optimizers = optimizers(self.model)
        self.session: redline.Session | None = None

    def step(self, seed: int, broken: bool = False) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        x, y = batch(seed)
        loss = F.cross_entropy(self.model(x), y)
        if self.session is not None:
            self.session.observe(loss=loss)
        loss.backward()
        if broken:
            next(self.model.parameters()).grad.view(-1)[0] = math.nan  # type: ignore[union-attr]
        for optimizer in self.optimizers:
            optimizer.step()

    def steps(self, first: int, last: int) -> None:
        for seed in range(first, last):
            self.step(seed)


def sigma(tensor: Tensor) -> float:
    return float(torch.linalg.matrix_norm(tensor.detach().double(), 2))


def reference(model: nn.Module, before: dict[str, Tensor], after: dict[str, Tensor], x: Tensor) -> float:
    """``r`` by the whole Jacobian, in float64."""
    model = copy.deepcopy(model).double()
    point = {name: tensor.double() for name, tensor in before.items()}
    jacobian = jacrev(lambda parameters: functional_call(model, parameters, (x.double(),)))(point)
    tangent = sum((jacobian[name].flatten(2) @ (after[name].double() - point[name]).flatten()) for name in point)
    return float((tangent.amax(-1) - tangent.amin(-1)).max() / math.pi)


def radius_lr(r: float) -> RadiusLR:
    return RadiusLR(r, max_update_to_weight=None, max_growth=None)


# Each acts: the length, the whole, single matrices, decay, and a batch that is not finite.
FIVE: dict[str, Callable[[], redline.Controller]] = {
    "UpdateClamp": lambda: UpdateClamp(0.02),
    "WeightDecayControl": lambda: WeightDecayControl({BODY: 1.3, HEAD: 0.8}, every=2, horizon=20),
    "RadiusLR": lambda: radius_lr(0.5),
    "StepClamp": lambda: StepClamp(0.02),
    "NonFiniteGuard": lambda: NonFiniteGuard(),
}


def trained(
    optimizers: Callable[[nn.Module], list[Optimizer]], names: Sequence[str]
) -> tuple[Run, redline.Session, dict[str, float]]:
    """Four steps, of which the second has a NaN in its gradients."""
    run = Run(optimizers)
    with run.attach(*(FIVE[name]() for name in names)) as session:
        for seed in range(4):
            run.step(seed, broken=seed == 1)
    return run, session, session.latest.layers(IN_FORCE)


# Any order --------------------------------------------------------------------------------------------------------


def test_every_order_of_the_list_gives_the_same_run() -> None:
    """Bit for bit, but for UpdateClamp and WeightDecayControl: which of these decides first shows in the rounding."""
    ends: dict[bool, list[Any]] = {True: [], False: []}
    for names in itertools.permutations(FIVE):
        run, session, decays = trained(muon_and_adamw, names)
        told = sorted((one.step, one.controller, one.action, one.reason) for one in session.interventions)
        ends[names.index("UpdateClamp") < names.index("WeightDecayControl")].append(
            (run.everything, frozen(decays), told, run.parameters)
        )
    for same in ends.values():
        assert len(same) == 60
        for what in range(3):
            assert all(one[what] == same[0][what] for one in same)
    one, other = ends[True][0], ends[False][0]
    for name, parameter in one[3].items():
        torch.testing.assert_close(parameter, other[3][name], rtol=1e-5, atol=1e-7)
    assert [entry[:3] for entry in one[2]] == [entry[:3] for entry in other[2]]


@EVERY_OPTIMIZER
def test_all_of_them_tell_what_they_did_and_are_counted(optimizers: Callable[[nn.Module], list[Optimizer]]) -> None:
    _, session, decays = trained(optimizers, list(FIVE))
    told = [(one.step, one.controller, one.action) for one in session.interventions]
    acted = {(controller, action) for _, controller, action in told}
    assert acted == {
        ("UpdateClamp", "scale"),
        ("WeightDecayControl", "decay"),
        ("RadiusLR", "scale"),
        ("StepClamp", "scale"),
        ("NonFiniteGuard", "withhold"),
    }
    expected = [
        ("RadiusLR", "scale"),
        ("UpdateClamp", "scale"),
        ("WeightDecayControl", "decay"),
        ("StepClamp", "scale"),
    ]
    assert [entry[1:] for entry in told if entry[0] == 0] == expected, "in the order in which they decide"
    assert [entry[1:] for entry in told if entry[0] == 1] == [("NonFiniteGuard", "withhold")]
    for controller, action in acted:
        counted = session.latest.value("redline_interventions_total", controller=controller, action=action)
        assert counted == sum(entry[1:] == (controller, action) for entry in told)
    assert decays.keys() == {BODY, HEAD}
    by_kind = {(tally.controller, tally.action): tally.count for tally in session.report().interventions}
    assert by_kind.keys() == acted


@EVERY_OPTIMIZER
def test_each_leaves_what_it_is_there_for(optimizers: Callable[[nn.Module], list[Optimizer]]) -> None:
    """All five at once: the committed step is inside the radius, matrices are inside their limit, decay is in force."""
    run = Run(optimizers)
    rates = {BODY: (0.05, 0.2) if optimizers is muon_and_adamw else (2e-2, 0.3), HEAD: (2e-2, 0.3)}
    with run.attach(*(one() for one in FIVE.values())) as session:
        for seed in range(6):
            alone, before = run.uncontrolled(), run.parameters
            alone.step(seed)
            run.step(seed)
            told = {one.controller: one for one in session.interventions if one.step == seed}
            after, proposed = run.parameters, alone.parameters
            assert reference(run.model, before, after, batch(seed)[0]) <= 0.02 * (1 + 1e-3)
            scale = session.latest.value(SCALE)
            lengthened = told["RadiusLR"].saw["scale"]
            assert scale == pytest.approx(lengthened * told["StepClamp"].saw["scale"])
            for name in (BODY, HEAD):
                lr, group_decay = rates[name]
                decay = session.latest.layers(IN_FORCE)[name]
                w, p = before[name].double(), proposed[name].double() - before[name].double()
                net = lengthened * (p + lr * group_decay * w)
                net *= min(1.0, 0.02 * sigma(w) / sigma(net))
                wanted = w + scale / lengthened * (net - lengthened * lr * decay * w)
                torch.testing.assert_close(after[name].double(), wanted, rtol=0, atol=3e-3 * float(p.abs().max()))
            for name in ("body.bias", "head.bias"):
                wanted = before[name] + scale * (proposed[name] - before[name])
                torch.testing.assert_close(after[name], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("order", [1, -1])
def test_the_clamp_has_the_last_word_on_the_length(order: int) -> None:
    run = Run()
    with run.attach(*[radius_lr(2.0), StepClamp()][::order], monitors=[redline.GhostRadius(1)]) as session:
        for seed in range(4):
            before = run.parameters
            run.step(seed)
            assert reference(run.model, before, run.parameters, batch(seed)[0]) == pytest.approx(1, rel=1e-3)
            assert session.latest.value(COMMITTED) == pytest.approx(1, rel=1e-4)
            one, other = session.interventions[-2:]
            assert (one.controller, other.controller) == ("RadiusLR", "StepClamp")
            assert (other.saw["r"], other.saw["scale"]) == pytest.approx((2, 0.5), rel=1e-4)
            assert session.latest.value(SCALE) == pytest.approx(one.saw["scale"] / 2, rel=1e-4)
            assert session.latest.value("redline_normalized_step_size") == pytest.approx(one.saw["r"], rel=1e-4)


def test_a_clamp_above_the_length_asked_for_changes_nothing() -> None:
    runs = []
    for controllers in ([radius_lr(0.5)], [StepClamp(), radius_lr(0.5)]):
        run = Run()
        with run.attach(*controllers) as session:
            run.steps(0, 5)
        runs.append(run.everything)
        assert {one.controller for one in session.interventions} == {"RadiusLR"}
    assert runs[0] == runs[1]


# Decay in force ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, -1])
def test_the_ceiling_of_the_update_clamp_goes_by_the_decay_in_force(order: int) -> None:
    """Lowered, it raises the ceiling; which does not come down again, since a weight may be there by then."""
    run, limit = Run(), 3.0
    controllers = [
        UpdateClamp(limit, "fan"),
        WeightDecayControl({BODY: 9.0, HEAD: 0.6}, every=2, horizon=2, bounds=(0.05, 4)),
    ]
    fans = {BODY: math.sqrt(8 / FEATURES), HEAD: math.sqrt(CLASSES / 8)}
    start, least = {name: sigma(run.parameters[name]) for name in fans}, dict.fromkeys(fans, math.inf)
    with run.attach(*controllers[::order]) as session:
        for seed in range(8):
            run.step(seed)
            decays = session.latest.layers(IN_FORCE)
            least = {name: min(least[name], decays[name]) for name in least}
            wanted = {name: max(start[name], limit * fans[name] / least[name]) for name in least}
            assert session.latest.layers(CEILING) == pytest.approx(wanted, rel=2e-3)
        assert least[BODY] == pytest.approx(0.05) and decays[HEAD] > 0.3  # noqa: PT018
    alone = Run()
    with alone.attach(UpdateClamp(limit, "fan")) as session:
        alone.step(0)
        by_group = session.latest.layers(CEILING)
    assert wanted[BODY] == pytest.approx(0.3 / 0.05 * by_group[BODY], rel=2e-3)


@pytest.mark.parametrize("order", [1, -1])
def test_what_the_update_clamp_leaves_whole_is_the_decay_in_force(order: int) -> None:
    run = Run()
    controllers = [UpdateClamp(0.01), WeightDecayControl({BODY: 0.5, HEAD: 9.0}, every=1, horizon=1)]
    with run.attach(*controllers[::order]) as session:
        for seed in range(4):
            alone, before = run.uncontrolled(), run.parameters
            alone.step(seed)
            run.step(seed)
            for name, decay in session.latest.layers(IN_FORCE).items():
                w = before[name].double()
                net = alone.parameters[name].double() - w + 2e-2 * 0.3 * w
                factor = min(1.0, 0.01 * sigma(w) / sigma(net))
                assert factor < 1
                wanted = w + factor * net - 2e-2 * decay * w
                torch.testing.assert_close(
                    run.parameters[name].double(), wanted, rtol=0, atol=2e-3 * float(w.abs().max()) * 0.01
                )


# Holding sigma_1 beside what scales the step ----------------------------------------------------------------------


class Invariant(nn.Module):
    """Indifferent to the scale of its matrices: each is followed by an RMS norm. The readout does not train."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(2))
        self.register_buffer("readout", 3 * torch.randn(10, width) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.rms_norm(layer(x), (x.shape[-1],))
        return x @ self.readout.T


LAYERS = ["layers.0.weight", "layers.1.weight"]


def at_rest(lr: float, steps: int, *controllers: redline.Controller) -> np.ndarray:
    """``sigma_1`` of both layers, averaged over the last third of a run."""
    torch.manual_seed(0)
    model = Invariant(16)
    optimizer = torch.optim.AdamW(model.parameters(), lr, (0.9, 0.95), weight_decay=0.1, fused=True)
    generator = torch.Generator().manual_seed(1)
    found = []
    with redline.attach(model, optimizer, monitors=[], controllers=controllers):
        for index in range(steps):
            x, y = torch.randn(32, 16, generator=generator), torch.randint(0, 10, (32,), generator=generator)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            if index % 10 == 0:
                found.append([sigma(layer.weight) for layer in model.layers])
    return np.array(found)[-len(found) // 3 :].mean(0)


def holding(target: float) -> WeightDecayControl:
    return WeightDecayControl(dict.fromkeys(LAYERS, target))


def test_it_is_held_beside_a_clamp_that_shortens_every_step() -> None:
    """Not as closely: the clamp decides after the decay, and by how much shows only in what the weights then do."""
    target = 2.0
    free, held = at_rest(0.05, 900, StepClamp(0.2)), at_rest(0.05, 900, holding(target), StepClamp(0.2))
    # A run of clamped steps goes its own way on each kind of processor: 10 to 18 % off were seen, of 150 without.
    assert (np.abs(np.log(held / target)) < np.abs(np.log(free / target)) / 4).all(), (held, free)


def test_it_is_held_beside_a_radius_that_sets_the_rate() -> None:
    """Decay goes by the rate that results, here some 20 times that of the group."""
    held = at_rest(1e-3, 900, holding(2.0), radius_lr(0.1))
    np.testing.assert_allclose(held, 2.0, rtol=0.06)


def test_beside_steps_of_a_whole_radius_it_makes_nothing_worse() -> None:
    """The radius changes much from step to step, and what is decayed with it."""
    target = 3.0
    free, held = at_rest(0.01, 500, RadiusLR(1.0)), at_rest(0.01, 500, holding(target), RadiusLR(1.0))
    assert np.isfinite(held).all()
    assert (np.abs(np.log(held / target)) <= np.abs(np.log(free / target)) + 0.1).all(), (held, free)


# State ------------------------------------------------------------------------------------------------------------


@EVERY_OPTIMIZER
def test_a_run_under_all_of_them_may_be_cut_after_every_step(
    optimizers: Callable[[nn.Module], list[Optimizer]],
) -> None:
    def controllers() -> list[redline.Controller]:
        return [*(one() for one in FIVE.values()), SpikeGuard(window=16, every=4), RadiusLR(0.9)]

    through, run = Run(optimizers), Run(optimizers)
    with through.attach(*controllers()) as whole:
        for seed in range(10):
            through.step(seed, broken=seed in (3, 6))
    session = run.attach(*controllers())
    for seed in range(10):
        run.step(seed, broken=seed in (3, 6))
        file = io.BytesIO()
        torch.save([part.state_dict() for part in (run.model, *run.optimizers, session)], file)
        session.close()
        run = Run(optimizers)
        session = run.attach(*controllers())
        file.seek(0)
        for part, state in zip((run.model, *run.optimizers, session), torch.load(file, weights_only=True), strict=True):
            part.load_state_dict(state)
    assert run.everything == through.everything
    assert frozen([vars(one) for one in session.interventions]) == frozen([vars(one) for one in whole.interventions])
    session.close()


# Lightning --------------------------------------------------------------------------------------------------------


class Task(pl.LightningModule):
    """The same by automatic optimization; the batch is that of the global step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = Net()

    def training_step(self, _: Any) -> Tensor:
        x, y = batch(self.trainer.global_step)
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return adamw(self.net)[0]


class Manual(Task):
    """Muon beside AdamW, by manual optimization: a joint step is two of Lightning's."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, _: Any) -> None:
        x, y = batch(self.trainer.global_step // 2)
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self.net(x), y))
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return muon_and_adamw(self.net)


def in_lightning() -> list[redline.Controller]:
    """With the layers' names in a LightningModule."""
    target = {f"net.{BODY}": 1.3, f"net.{HEAD}": 0.8}
    return [UpdateClamp(0.02), WeightDecayControl(target, every=2, horizon=20), RadiusLR(0.5), StepClamp(0.02)]


def fit(task: Task, callback: RedlineCallback, steps: int) -> None:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps * (2 if isinstance(task, Manual) else 1),
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, DataLoader(TensorDataset(torch.zeros(steps, 1))))


@pytest.mark.parametrize(("task", "optimizers"), [(Task, adamw), (Manual, muon_and_adamw)])
def test_a_fit_is_the_plain_loop_to_the_bit(
    task: type[Task], optimizers: Callable[[nn.Module], list[Optimizer]]
) -> None:
    run = Run(optimizers)
    plain = [UpdateClamp(0.02), WeightDecayControl({BODY: 1.3, HEAD: 0.8}, every=2, horizon=20)]
    with run.attach(*plain, RadiusLR(0.5), StepClamp(0.02)) as session:
        run.steps(0, 7)
    module, callback = task(), RedlineCallback(monitors=[], controllers=in_lightning())
    fit(module, callback, 7)
    assert frozen(dict(module.net.state_dict())) == frozen(dict(run.model.state_dict()))
    assert callback.session is not None
    assert {one.controller for one in callback.session.interventions} == {
        "UpdateClamp",
        "WeightDecayControl",
        "RadiusLR",
        "StepClamp",
    }
    assert [(one.step, one.controller, frozen(dict(one.saw))) for one in callback.session.interventions] == [
        (one.step, one.controller, frozen(dict(one.saw))) for one in session.interventions
    ]
    found = callback.session.latest.layers(IN_FORCE)
    assert {name.removeprefix("net."): value for name, value in found.items()} == session.latest.layers(IN_FORCE)


# From a configuration ---------------------------------------------------------------------------------------------

CONFIG = """
{"class_path": "redline.integrations.lightning.RedlineCallback", "init_args": {"monitors": [], "controllers": [
  {"class_path": "redline.UpdateClamp", "init_args": {"limit": 0.02, "relative_to": "weight"}},
  {"class_path": "redline.WeightDecayControl", "init_args":
      {"target": {"net.body.weight": 1.3, "net.head.weight": 0.8}, "freeze_at": 0, "every": 2, "horizon": 20,
       "bounds": [0, 10]}},
  {"class_path": "redline.RadiusLR", "init_args":
      {"r": 0.5, "max_update_to_weight": 0.3, "max_growth": 1.02, "reduction": "max", "max_samples": 32}},
  {"class_path": "redline.StepClamp", "init_args": {"max_r": 0.02, "reduction": 1, "max_samples": null}}]}}
"""


def built(config: Any) -> Any:
    """As LightningCLI does it: plain values all the way down, classes by path."""
    if isinstance(config, list):
        return [built(one) for one in config]
    if isinstance(config, dict) and "class_path" in config:
        module, _, name = config["class_path"].rpartition(".")
        arguments = {key: built(value) for key, value in config.get("init_args", {}).items()}
        return getattr(importlib.import_module(module), name)(**arguments)
    return config


def test_they_can_be_built_from_plain_values() -> None:
    by_hand, by_config = Task(), Task()
    fit(by_hand, RedlineCallback(monitors=[], controllers=in_lightning()), 5)
    fit(by_config, built(json.loads(CONFIG)), 5)
    assert frozen(dict(by_config.state_dict())) == frozen(dict(by_hand.state_dict()))


PLAIN = {int, float, bool, str, type(None)}


def is_plain(hint: Any) -> bool:
    """Whether a configuration file can hold a value of this type."""
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return all(type(value) in PLAIN for value in typing.get_args(hint))
    return hint in PLAIN if origin is None else all(is_plain(one) for one in typing.get_args(hint))


@pytest.mark.parametrize("kind", [UpdateClamp, WeightDecayControl, RadiusLR, StepClamp])
def test_their_arguments_are_typed_and_plain(kind: type) -> None:
    hints = typing.get_type_hints(kind.__init__)
    hints.pop("return")
    assert hints.keys() == inspect.signature(kind).parameters.keys()
    assert all(is_plain(hint) for hint in hints.values()), hints
