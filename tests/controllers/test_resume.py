"""A run that is cut and resumed equals one that was not, to the bit: with each controller, and with all of them.

What travels is what a user would save: the ``state_dict`` of model, optimizers, schedulers and session, through
``torch.save`` and ``torch.load(weights_only=True)``, or a Lightning checkpoint.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader, TensorDataset

import redline
from redline.integrations.lightning import RedlineCallback

COUNTER = "redline_interventions_total"
STEPS = 40


# What is trained, and what goes wrong -------------------------------------------------------------


class Net(nn.Module):
    """Two matrices around a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.body(x))))


def sgd(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)]


def adamw_foreach(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.AdamW(model.parameters(), 1e-2, foreach=True)]


def adamw_fused(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.AdamW(model.parameters(), 1e-2, fused=True)]


def muon_and_adamw(model: nn.Module) -> list[Optimizer]:
    parameters = list(model.parameters())
    return [
        torch.optim.Muon([parameter for parameter in parameters if parameter.dim() == 2], 0.02),
        torch.optim.AdamW([parameter for parameter in parameters if parameter.dim() != 2], 1e-2),
    ]


def clamp() -> list[redline.Controller]:
    return [redline.StepClamp(max_r=0.05)]


def non_finite() -> list[redline.Controller]:
    return [redline.NonFiniteGuard(stop_after=4)]


def non_finite_with_state() -> list[redline.Controller]:
    return [redline.NonFiniteGuard(stop_after=4, restore_state=True)]


def spike() -> list[redline.Controller]:
    return [redline.SpikeGuard(window=18, every=18)]


def all_three() -> list[redline.Controller]:
    return [*non_finite(), *spike(), *clamp()]


Made = Callable[[], list[redline.Controller]]
Incidents = Mapping[int, str]
Did = dict[str, list[int]]  # steps at which the guards did something, by action


def batch(seed: int, incident: str = "") -> tuple[Tensor, Tensor]:
    """64 samples of a task that can be learned, with a NaN among them or all labels wrong."""
    teacher = torch.randn(6, 3, generator=torch.Generator().manual_seed(1234))
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(seed))
    y = (x @ teacher).argmax(1)
    if incident == "nan":
        x[0, 0] = math.nan
    return x, (y + 1) % 3 if incident == "batch" else y


def loss_of(net: nn.Module, index: int, incident: str) -> Tensor:
    if incident == "parameters":
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(-30)
    x, y = batch(index, incident)
    return F.cross_entropy(net(x), y) * (10 if incident == "batch" else 1)


def bits(value: Any) -> Any:
    """A value of plain containers that is equal only to one of the same bits."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.detach().contiguous().numpy().tobytes()
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, Mapping):
        return {key: bits(one) for key, one in value.items()}
    return [bits(one) for one in value] if isinstance(value, (list, tuple)) else value


def trace(session: redline.Session) -> list[Any]:
    return bits([vars(one) for one in session.interventions])


def guards_did(session: redline.Session) -> Did:
    """What was done beside scaling."""
    found: Did = {}
    for one in session.interventions:
        if one.action != "scale":
            steps = found.setdefault(one.action, [])
            if one.step not in steps:
                steps.append(one.step)
    return found


def assert_sessions_agree(one: redline.Session, other: redline.Session) -> None:
    """In all that is no time: log, counters, readings, history and the controllers' own state."""
    assert trace(one) == trace(other)
    for metric in (COUNTER, "redline_steps_total", "redline_nonfinite_total"):
        assert one.latest.series(metric) == other.latest.series(metric)
    for metric in ("redline_loss", "redline_step_scale", "redline_gradient_norm"):
        assert bits(one.latest.value(metric)) == bits(other.latest.value(metric))
    assert bits(one.state_dict()["control"]) == bits(other.state_dict()["control"])
    reports = [session.report() for session in (one, other)]
    assert reports[0].snapshots == reports[1].snapshots
    assert reports[0].interventions == reports[1].interventions
    assert bits([reports[0].first_loss, reports[0].last_loss]) == bits([reports[1].first_loss, reports[1].last_loss])


# Where runs are cut -------------------------------------------------------------------------------

# Each with what the guards together have to do about it: (name, controllers, incidents, cut after so many steps, what).
# The snapshots are of steps 0, 18 and 36.
CASES: list[tuple[str, Made, Incidents, int, Did]] = [
    ("clamp", clamp, {}, 3, {}),
    ("clamp, later", clamp, {25: "batch"}, 25, {}),
    ("NaN before the cut", non_finite, {20: "nan"}, 22, {"withhold": [20]}),
    ("NaN after the cut", non_finite, {24: "nan"}, 22, {"withhold": [24]}),
    ("NaN around the cut", non_finite, {20: "nan", 21: "nan", 22: "nan"}, 21, {"withhold": [20, 21, 22]}),
    ("state restored", non_finite_with_state, {20: "nan", 22: "nan"}, 21, {"withhold": [20, 22]}),
    ("spike before the cut", spike, {20: "batch"}, 22, {"withhold": [20]}),
    ("spike after the cut", spike, {24: "batch"}, 22, {"withhold": [24]}),
    ("roll-back before the cut", spike, {24: "parameters"}, 28, {"withhold": [24], "rollback": [25]}),
    ("roll-back after the cut", spike, {24: "parameters"}, 22, {"withhold": [24], "rollback": [25]}),
    ("cut ahead of the roll-back", spike, {24: "parameters"}, 25, {"withhold": [24], "rollback": [25]}),
    ("cut behind the roll-back", spike, {24: "parameters"}, 26, {"withhold": [24], "rollback": [25]}),
    (
        "the snapshot twice",
        spike,
        {20: "parameters", 26: "parameters"},
        23,
        {"withhold": [20, 26], "rollback": [21, 27]},
    ),
    (
        "cut amid roll-backs",
        spike,
        {index: "batch" for index in range(24, 29)},
        26,
        {"withhold": [24, 28], "rollback": [25, 26, 27]},
    ),
    ("cut behind a new snapshot", spike, {38: "parameters"}, 37, {"withhold": [38], "rollback": [39]}),
    (
        "all three",
        all_three,
        {20: "nan", 24: "parameters", 30: "batch"},
        22,
        {"withhold": [20, 24, 30], "rollback": [25]},
    ),
    (
        "all three, cut amid jumps",
        all_three,
        {20: "batch", 24: "parameters", 30: "nan"},
        25,
        {"withhold": [20, 24, 30], "rollback": [25]},
    ),
]
EVERY_CASE = pytest.mark.parametrize(
    ("controllers", "incidents", "cut", "did"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)


# A plain loop -------------------------------------------------------------------------------------


class Run:
    """A model in training, with Redline."""

    def __init__(
        self,
        optimizers: Callable[[nn.Module], list[Optimizer]],
        controllers: Sequence[redline.Controller],
        incidents: Incidents,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        self.model = Net()
        self.optimizers = optimizers(self.model)
        self.schedulers = [ExponentialLR(optimizer, 0.99) for optimizer in self.optimizers]
        self.incidents = incidents
        self.session = redline.attach(
            self.model,
            self.optimizers,
            monitors=[redline.StepHealth()],
            controllers=controllers,
            schedulers=self.schedulers,
        )

    def steps(self, first: int, last: int) -> None:
        for index in range(first, last):
            loss = loss_of(self.model, index, self.incidents.get(index, ""))
            self.session.observe(loss=loss)
            loss.backward()
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            for scheduler in self.schedulers:
                scheduler.step()

    def parts(self) -> list[Any]:
        return [self.model, *self.optimizers, *self.schedulers]

    def training(self) -> Any:
        return bits([part.state_dict() for part in self.parts()])

    def save(self) -> io.BytesIO:
        file = io.BytesIO()
        torch.save([part.state_dict() for part in (*self.parts(), self.session)], file)
        return file

    def load(self, file: io.BytesIO) -> None:
        file.seek(0)
        for part, state in zip((*self.parts(), self.session), torch.load(file, weights_only=True), strict=True):
            part.load_state_dict(state)


def cut_and_resumed(
    optimizers: Callable[[nn.Module], list[Optimizer]], controllers: Made, incidents: Incidents, cut: int
) -> Run:
    first = Run(optimizers, controllers(), incidents)
    first.steps(0, cut)
    file = first.save()
    first.session.close()
    second = Run(optimizers, controllers(), incidents, seed=1)
    second.load(file)
    second.steps(cut, STEPS)
    return second


@EVERY_CASE
def test_a_run_that_was_cut_equals_one_that_was_not(
    controllers: Made, incidents: Incidents, cut: int, did: Did
) -> None:
    through = Run(sgd, controllers(), incidents)
    through.steps(0, STEPS)
    assert guards_did(through.session) == did
    second = cut_and_resumed(sgd, controllers, incidents, cut)
    assert second.training() == through.training()
    assert_sessions_agree(second.session, through.session)
    if controllers in (clamp, all_three):
        scaled = {one.step for one in through.session.interventions if one.action == "scale"}
        assert min(scaled) < cut
    if controllers is not clamp:
        assert all(torch.isfinite(tensor).all() for tensor in through.model.state_dict().values())


@pytest.mark.parametrize("optimizers", [adamw_foreach, adamw_fused, muon_and_adamw])
@pytest.mark.parametrize("cut", [25, 31])
def test_any_optimizer_resumes_with_all_three(optimizers: Callable[[nn.Module], list[Optimizer]], cut: int) -> None:
    incidents = {20: "nan", 24: "parameters", 30: "batch", 32: "nan"}
    through = Run(optimizers, all_three(), incidents)
    through.steps(0, STEPS)
    assert guards_did(through.session) == {"withhold": [20, 24, 30, 32], "rollback": [25]}
    assert "scale" in [one.action for one in through.session.interventions]
    second = cut_and_resumed(optimizers, all_three, incidents, cut)
    assert second.training() == through.training()
    assert_sessions_agree(second.session, through.session)


def test_a_run_may_be_cut_after_every_step() -> None:
    incidents = {20: "nan", 24: "parameters", 30: "batch"}
    through = Run(adamw_fused, all_three(), incidents)
    through.steps(0, STEPS)
    run = Run(adamw_fused, all_three(), incidents)
    for index in range(STEPS):
        run.steps(index, index + 1)
        file = run.save()
        run.session.close()
        run = Run(adamw_fused, all_three(), incidents, seed=index)
        run.load(file)
    assert run.training() == through.training()
    assert trace(run.session) == trace(through.session)
    assert guards_did(run.session) == {"withhold": [20, 24, 30], "rollback": [25]}


def test_without_the_sessions_state_it_would_be_another_run() -> None:
    """The incidents are such that it matters."""
    incidents = {24: "parameters"}
    through = Run(sgd, spike(), incidents)
    through.steps(0, STEPS)
    first = Run(sgd, spike(), incidents)
    first.steps(0, 25)
    second = Run(sgd, spike(), incidents, seed=1)
    for part, other in zip(second.parts(), first.parts(), strict=True):
        part.load_state_dict(other.state_dict())
    second.steps(25, STEPS)
    assert second.training() != through.training()


def test_a_resumed_run_that_goes_on_with_nan_is_stopped_where_the_uncut_one_is() -> None:
    incidents = {index: "nan" for index in range(20, STEPS)}
    messages = []
    for cut in (None, 22):
        run = Run(sgd, non_finite(), incidents)
        if cut is not None:
            run.steps(0, cut)
            file = run.save()
            run = Run(sgd, non_finite(), incidents, seed=1)
            run.load(file)
        with pytest.raises(redline.RunStoppedError, match="at 4 steps in a row") as stopped:
            run.steps(cut or 0, STEPS)
        messages.append(str(stopped.value))
        assert run.session.interventions[-1].step == 23
    assert messages[0] == messages[1]


def test_a_resumed_run_does_not_take_a_snapshot_ahead_of_its_time() -> None:
    second = cut_and_resumed(sgd, spike, {}, 22)
    assert [kept.step for kept in second.session.report().snapshots] == [36]
    first = Run(sgd, spike(), {})
    first.steps(0, 22)
    second = Run(sgd, spike(), {}, seed=1)
    second.load(first.save())
    second.steps(22, 30)
    assert [kept.step for kept in second.session.report().snapshots] == [18]


@pytest.mark.parametrize("schedulers", [0, 2])
def test_a_state_with_other_schedulers_is_refused_when_it_is_loaded_and_not_in_the_midst_of_a_roll_back(
    schedulers: int,
) -> None:
    """Or it is made do with; but the run must not die of the guard."""
    first = Run(sgd, spike(), {})
    first.steps(0, 22)
    state = first.session.state_dict()
    second = Run(sgd, spike(), {24: "parameters"})
    second.session.close()
    second.schedulers = [ExponentialLR(second.optimizers[0], 0.99) for _ in range(schedulers)]
    second.session = redline.attach(
        second.model,
        second.optimizers,
        monitors=[],
        controllers=spike(),
        schedulers=second.schedulers,
    )
    for part, other in zip((second.model, *second.optimizers), (first.model, *first.optimizers), strict=True):
        part.load_state_dict(other.state_dict())
    refusal = ""
    try:
        second.session.load_state_dict(state)
    except redline.ConfigurationError as error:
        refusal = str(error)
    if refusal:
        assert "schedulers" in refusal
    else:
        second.steps(22, 30)
        assert guards_did(second.session) == {"withhold": [24], "rollback": [25]}


# Lightning ----------------------------------------------------------------------------------------


class Task(pl.LightningModule):
    """The same task by automatic optimization; the batch is that of the global step."""

    def __init__(self, incidents: Incidents, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = Net()
        self.incidents = incidents

    def training_step(self, _: Any) -> Tensor:
        index = self.trainer.global_step
        return loss_of(self.net, index, self.incidents.get(index, ""))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
        return [optimizer], [{"scheduler": ExponentialLR(optimizer, 0.99), "interval": "step"}]


class Manual(Task):
    """Muon beside AdamW, by manual optimization: a joint step is two of Lightning's global steps."""

    def __init__(self, incidents: Incidents, seed: int = 0) -> None:
        super().__init__(incidents, seed)
        self.automatic_optimization = False

    def training_step(self, _: Any) -> None:
        index = self.trainer.global_step // 2
        loss = loss_of(self.net, index, self.incidents.get(index, ""))
        self.manual_backward(loss)
        for optimizer, scheduler in zip(self.optimizers(), self.lr_schedulers(), strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()

    def configure_optimizers(self) -> Any:
        optimizers = muon_and_adamw(self)
        return optimizers, [ExponentialLR(optimizer, 0.99) for optimizer in optimizers]


class Fit:
    """A fit with Redline, as it stood at its end."""

    def __init__(
        self,
        task: type[Task],
        controllers: Made,
        incidents: Incidents,
        last: int,
        *,
        save_in: Path | None = None,
        resume_from: Path | None = None,
    ) -> None:
        self.module = task(incidents, seed=0 if resume_from is None else 1)
        callback = RedlineCallback(monitors=[redline.StepHealth()], controllers=controllers(), run="resumed")
        per_step = 2 if task is Manual else 1
        saving = [] if save_in is None else [ModelCheckpoint(save_in, "cut", every_n_train_steps=last * per_step)]
        self.trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=last * per_step,
            callbacks=[callback, *saving],
            logger=False,
            enable_checkpointing=save_in is not None,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        self.trainer.fit(
            self.module,
            DataLoader(TensorDataset(torch.zeros(STEPS, 1))),
            ckpt_path=resume_from,
            weights_only=True if resume_from else None,
        )
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        self.training = bits(
            [part.state_dict() for part in (self.module, *self.trainer.optimizers, *schedulers)],
        )
        self.rates_set = [scheduler.last_epoch for scheduler in schedulers]
        assert callback.session is not None
        self.session = callback.session


@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX`:UserWarning")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization:UserWarning")
@pytest.mark.parametrize(
    ("task", "controllers", "incidents", "cut", "did"),
    [
        (Task, clamp, {25: "batch"}, 24, {}),
        (Task, non_finite, {20: "nan", 21: "nan", 22: "nan"}, 21, {"withhold": [20, 21, 22]}),
        (Task, spike, {20: "batch", 24: "parameters"}, 22, {"withhold": [20, 24], "rollback": [25]}),
        (Task, spike, {24: "parameters", 30: "batch"}, 25, {"withhold": [24, 30], "rollback": [25]}),
        (
            Task,
            all_three,
            {20: "nan", 24: "parameters", 30: "batch"},
            22,
            {"withhold": [20, 24, 30], "rollback": [25]},
        ),
        (
            Manual,
            all_three,
            {20: "batch", 24: "parameters", 30: "nan"},
            25,
            {"withhold": [20, 24, 30], "rollback": [25]},
        ),
    ],
    ids=["clamp", "non-finite", "spike and roll-back", "cut amid jumps", "all three", "all three, two optimizers"],
)
def test_a_fit_resumed_from_a_checkpoint_equals_one_that_was_not_cut(
    tmp_path: Path, task: type[Task], controllers: Made, incidents: Incidents, cut: int, did: Did
) -> None:
    through = Fit(task, controllers, incidents, STEPS)
    assert guards_did(through.session) == did
    # A roll-back from step 25 to 18 takes the schedulers back with it.
    assert set(through.rates_set) == {STEPS - 7 if "rollback" in did else STEPS}
    first = Fit(task, controllers, incidents, cut, save_in=tmp_path)
    second = Fit(task, controllers, incidents, STEPS, resume_from=tmp_path / "cut.ckpt")
    assert first.session.latest.value("redline_steps_total") == cut
    assert second.session.latest.value("redline_steps_total") == STEPS
    assert second.training == through.training
    assert_sessions_agree(second.session, through.session)
    if controllers in (clamp, all_three):
        assert "scale" in [one.action for one in through.session.interventions]
