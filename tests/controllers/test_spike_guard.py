"""SpikeGuard: a jump of the batch costs one step, a jump of the parameters is rolled back, to the bit.

Each controlled run is held against a twin without Redline that does by hand, through ``state_dict`` and
``load_state_dict``, what the guard is said to do.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR, LinearLR, OneCycleLR, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_leaves, tree_map

import redline
from redline import ConfigurationError, RunStoppedError
from redline.step import StepStart

COUNTER = "redline_interventions_total"


# Runs ---------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Two matrices around a BatchNorm, whose running statistics a roll-back has to bring back."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(torch.tanh(self.norm(self.body(x)))))


def sgd(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-3)]


def adamw_foreach(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.AdamW(model.parameters(), 1e-2, foreach=True, amsgrad=True)]


def adamw_fused(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.AdamW(model.parameters(), 1e-2, fused=True)]


def adamw_with_a_rate_in_a_tensor(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.AdamW(model.parameters(), torch.tensor(1e-2), foreach=False)]


def muon_and_adamw(model: nn.Module) -> list[Optimizer]:
    parameters = list(model.parameters())
    return [
        torch.optim.Muon([parameter for parameter in parameters if parameter.dim() == 2], 0.02),
        torch.optim.AdamW([parameter for parameter in parameters if parameter.dim() != 2], 1e-2),
    ]


EVERY_OPTIMIZER = pytest.mark.parametrize(
    "optimizers", [sgd, adamw_foreach, adamw_fused, adamw_with_a_rate_in_a_tensor, muon_and_adamw]
)


def no_schedulers(optimizers: Sequence[Optimizer]) -> list[Any]:
    return []


def falling(optimizers: Sequence[Optimizer]) -> list[Any]:
    return [ExponentialLR(optimizer, 0.99) for optimizer in optimizers]


def one_cycle(optimizers: Sequence[Optimizer]) -> list[Any]:
    """Sets the momentum too."""
    return [OneCycleLR(optimizer, 0.1, total_steps=200) for optimizer in optimizers]


Spoil = Callable[["Run"], None]


class Run:
    """A model in training; two made alike are alike.

    Attributes:
        before: of a run with Redline, everything that training changes, by step, after backward and before the update.
        after: the same after the update, before the schedulers step.
    """

    def __init__(
        self,
        optimizers: Callable[[nn.Module], list[Optimizer]] = sgd,
        schedulers: Callable[[Sequence[Optimizer]], list[Any]] = no_schedulers,
        controllers: Sequence[redline.Controller] | None = None,
        *,
        told_of_schedulers: bool = True,
        drop: float = 0.0,
    ) -> None:
        torch.manual_seed(0)
        self.model = Net(drop)
        self.optimizers = optimizers(self.model)
        self.schedulers = schedulers(self.optimizers)
        self.losses: list[float] = []
        self.before: list[dict[str, Any]] = []
        self.after: list[dict[str, Any]] = []
        self._session: redline.Session | None = None
        if controllers is not None:
            self._session = redline.attach(
                self.model,
                self.optimizers,
                monitors=[],
                controllers=controllers,
                schedulers=self.schedulers if told_of_schedulers else [],
            )

    @property
    def session(self) -> redline.Session:
        assert self._session is not None
        return self._session

    @property
    def did(self) -> list[tuple[int, str]]:
        return [(one.step, one.action) for one in self.session.interventions]

    @property
    def groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def state(self) -> dict[str, Any]:
        parts: dict[str, Any] = {"model": self.model}
        parts |= {f"optimizer {k}": optimizer for k, optimizer in enumerate(self.optimizers)}
        parts |= {f"scheduler {k}": scheduler for k, scheduler in enumerate(self.schedulers)}
        return {name: copied(part.state_dict()) for name, part in parts.items()}

    def load(self, state: dict[str, Any]) -> None:
        """By hand what a roll-back is said to do."""
        state = copied(state)
        self.model.load_state_dict(state["model"])
        for k, optimizer in enumerate(self.optimizers):
            optimizer.load_state_dict(state[f"optimizer {k}"])
        for k, scheduler in enumerate(self.schedulers):
            scheduler.load_state_dict(state[f"scheduler {k}"])

    def step(self, *, spoil: Sequence[str] = (), shown: float | None = None, shift: int = 0) -> None:
        """One step, on a batch of its own.

        Args:
            spoil: "batch" has all labels wrong and counts ten times, "nan" has a NaN among the inputs, "parameters" are
                multiplied by -30 ahead of the step, the "rate" is a thousand times as high in this step.
            shown: the loss to tell the session, in place of the true one.
            shift: of the labels: another task.
        """
        if "parameters" in spoil:
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.mul_(-30)
        x, y = batch(len(self.losses))
        if "batch" in spoil:
            y = (y + 1) % 3
        if "nan" in spoil:
            x[0, 0] = math.nan
        loss = F.cross_entropy(self.model(x), (y + shift) % 3) * (10 if "batch" in spoil else 1)
        self.losses.append(loss.item())
        if self._session is not None:
            self._session.observe(loss=loss if shown is None else shown)
        loss.backward()
        rates = [copy.deepcopy(group["lr"]) for group in self.groups]
        if "rate" in spoil:
            for group in self.groups:
                group["lr"] *= 1000
        if self._session is not None:
            self.before.append(self.state())
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if "rate" in spoil:
            for group, rate in zip(self.groups, rates, strict=True):
                group["lr"] = rate
        if self._session is not None:
            self.after.append(self.state())
        for scheduler in self.schedulers:
            scheduler.step()

    def skip(self, back_to: dict[str, Any] | None = None) -> None:
        """By hand what a withheld step, or one that is rolled back, is said to be."""
        if back_to is not None:
            self.load(back_to)
        self.losses.append(math.nan)
        for scheduler in self.schedulers:
            scheduler.step()

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()


def batch(seed: int) -> tuple[Tensor, Tensor]:
    """64 samples of a task that can be learned."""
    teacher = torch.randn(6, 3, generator=torch.Generator().manual_seed(1234))
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(seed))
    return x, (x @ teacher).argmax(1)


def copied(state: dict[str, Any]) -> dict[str, Any]:
    """A copy of plain containers with tensors in them."""
    return tree_map(lambda value: value.detach().clone() if isinstance(value, Tensor) else value, dict(state))


def bits(value: Any) -> Any:
    """A value of plain containers that is equal only to one of the same bits."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.detach().contiguous().numpy().tobytes()
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, dict):
        return {key: bits(one) for key, one in value.items()}
    return [bits(one) for one in value] if isinstance(value, (list, tuple)) else value


def assert_same(one: Any, other: Any) -> None:
    assert bits(one) == bits(other)


def differing(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    """The parts of two states that are not the same bits."""
    return {name for name in one.keys() | other.keys() if bits(one.get(name)) != bits(other.get(name))}


# A run without incident ---------------------------------------------------------------------------


@EVERY_OPTIMIZER
@pytest.mark.parametrize("memory", ["device", "host"])
def test_a_healthy_run_is_its_own_to_the_bit(optimizers: Callable[[nn.Module], list[Optimizer]], memory: Any) -> None:
    alone = Run(optimizers, falling, drop=0.1)
    alone.steps(50)
    random = torch.get_rng_state()
    guarded = Run(optimizers, falling, [redline.SpikeGuard(every=5, memory=memory)], drop=0.1)
    guarded.steps(50)
    assert guarded.did == []
    assert guarded.session.report().snapshots[0].step == 45
    assert guarded.losses == alone.losses
    assert_same(guarded.state(), alone.state())
    assert torch.equal(torch.get_rng_state(), random)


# A jump of the batch ------------------------------------------------------------------------------


@EVERY_OPTIMIZER
@pytest.mark.parametrize("spoil", ["batch", "nan"])
def test_a_jump_of_the_batch_alone_costs_one_step(
    optimizers: Callable[[nn.Module], list[Optimizer]], spoil: str
) -> None:
    guarded, twin = Run(optimizers, falling, [redline.SpikeGuard()]), Run(optimizers, falling)
    for run in (guarded, twin):
        run.steps(30)
    guarded.step(spoil=[spoil])
    twin.skip()
    assert_same(guarded.state(), twin.state())
    assert differing(guarded.before[30], guarded.after[30]) == {"model"}  # the running statistics had seen the batch
    for run in (guarded, twin):
        run.steps(10)
    assert guarded.did == [(30, "withhold")]
    assert_same(guarded.state(), twin.state())
    assert guarded.losses[31:] == twin.losses[31:]


def test_so_many_jumps_in_a_row_as_patience_says_are_withheld() -> None:
    guarded = Run(controllers=[redline.SpikeGuard(patience=3)])
    guarded.steps(30)
    for spoil in ("batch", "nan", "batch", ""):
        guarded.step(spoil=[spoil])
    guarded.steps(1)
    for _ in range(4):
        guarded.step(spoil=["batch"])
    assert [step for step, _ in guarded.did] == [30, 31, 32, 35, 36, 37, 38]
    assert [action for _, action in guarded.did] == ["withhold"] * 6 + ["rollback"]


# A jump of the parameters -------------------------------------------------------------------------


@pytest.mark.parametrize("spoil", ["parameters", "rate"])
@pytest.mark.parametrize(
    ("optimizers", "schedulers"),
    [
        (sgd, no_schedulers),
        (sgd, one_cycle),
        (adamw_foreach, falling),
        (adamw_fused, no_schedulers),
        (adamw_fused, one_cycle),
        (adamw_with_a_rate_in_a_tensor, falling),
        (muon_and_adamw, no_schedulers),
        (muon_and_adamw, falling),
    ],
)
def test_jumped_parameters_are_rolled_back_to_the_snapshot_and_the_run_goes_on(
    optimizers: Callable[[nn.Module], list[Optimizer]],
    schedulers: Callable[[Sequence[Optimizer]], list[Any]],
    spoil: str,
) -> None:
    guarded, twin = Run(optimizers, schedulers, [redline.SpikeGuard()]), Run(optimizers, schedulers)
    for run in (guarded, twin):
        run.steps(29)
    if spoil == "rate":  # seen at the next step
        guarded.step(spoil=["rate"])
        guarded.step()
    else:
        guarded.step()
        guarded.step(spoil=["parameters"])
    guarded.step()
    assert guarded.did == [(30, "withhold"), (31, "rollback")]
    at_snapshot, back = guarded.before[20], guarded.after[31]
    moved = {"model", *(f"optimizer {k}" for k in range(len(guarded.optimizers)))}
    moved |= {f"scheduler {k}" for k in range(len(guarded.schedulers))}
    assert differing(at_snapshot, guarded.before[31]) == moved
    assert_same(back, at_snapshot)

    twin.steps(1)
    twin.skip()
    twin.skip(at_snapshot)
    for run in (guarded, twin):
        run.steps(15)
    assert len(guarded.did) == 2
    assert_same(guarded.state(), twin.state())
    assert guarded.losses[32:] == twin.losses[32:]
    assert guarded.losses[-1] < guarded.losses[0]


@EVERY_OPTIMIZER
def test_without_patience_it_rolls_back_at_once(optimizers: Callable[[nn.Module], list[Optimizer]]) -> None:
    guarded = Run(optimizers, falling, [redline.SpikeGuard(patience=0, every=8)])
    guarded.steps(30)
    guarded.step(spoil=["parameters"])
    assert guarded.did == [(30, "rollback")]
    assert_same(guarded.after[30], guarded.before[24])


@EVERY_OPTIMIZER
def test_a_snapshot_can_be_gone_back_to_twice(optimizers: Callable[[nn.Module], list[Optimizer]]) -> None:
    guarded = Run(optimizers, falling, [redline.SpikeGuard(patience=0)])
    guarded.steps(30)
    guarded.step(spoil=["parameters"])
    guarded.steps(5)
    assert_same(guarded.after[30], guarded.before[20])
    assert differing(guarded.before[20], guarded.after[35]) == guarded.before[20].keys()
    guarded.step(spoil=["parameters"])
    guarded.step(spoil=["parameters"])
    assert guarded.did == [(30, "rollback"), (36, "rollback"), (37, "rollback")]
    assert_same(guarded.after[36], guarded.before[20])
    assert_same(guarded.after[37], guarded.before[20])


@EVERY_OPTIMIZER
def test_state_that_was_taken_away_since_comes_back_twice(optimizers: Callable[[nn.Module], list[Optimizer]]) -> None:
    guarded = Run(optimizers, falling, [redline.SpikeGuard(patience=0)])
    guarded.steps(30)
    for optimizer in guarded.optimizers:
        optimizer.state.clear()
    guarded.step(spoil=["parameters"])
    guarded.steps(3)
    guarded.step(spoil=["parameters"])
    assert guarded.did == [(30, "rollback"), (34, "rollback")]
    assert_same(guarded.after[30], guarded.before[20])
    assert_same(guarded.after[34], guarded.before[20])


@EVERY_OPTIMIZER
def test_back_at_the_first_step_there_is_no_state_again(optimizers: Callable[[nn.Module], list[Optimizer]]) -> None:
    guarded = Run(optimizers, falling, [redline.SpikeGuard(patience=0, every=1000)])
    guarded.steps(20)
    guarded.step(spoil=["parameters"])
    assert all(guarded.before[19][f"optimizer {k}"]["state"] for k in range(len(guarded.optimizers)))
    assert_same(guarded.after[20], guarded.before[0])
    assert not any(optimizer.state for optimizer in guarded.optimizers)
    guarded.steps(10)
    assert len(guarded.did) == 1


def test_a_snapshot_is_renewed_while_the_loss_is_good() -> None:
    guarded = Run(controllers=[redline.SpikeGuard(every=7, patience=20)])
    kept = []
    for index in range(40):
        guarded.step(spoil=["batch"] if 20 <= index < 24 else [])
        kept.append(guarded.session.report().snapshots[0].step)
    assert guarded.did == [(index, "withhold") for index in range(20, 24)]
    # That of step 21 is put off until the loss is good again.
    assert kept == [0] * 7 + [7] * 7 + [14] * 10 + [24] * 7 + [31] * 7 + [38] * 2


def test_a_rate_spiked_in_the_very_step_of_the_snapshot_does_not_come_back() -> None:
    guarded = Run(sgd, falling, [redline.SpikeGuard(patience=0)])
    guarded.steps(20)
    guarded.step(spoil=["rate"])
    guarded.step()
    assert guarded.did == [(21, "rollback")]
    assert guarded.after[21]["optimizer 0"]["param_groups"][0]["lr"] == pytest.approx(0.05 * 0.99**20, rel=1e-12)
    for name in ("model", "scheduler 0"):
        assert_same(guarded.after[21][name], guarded.before[20][name])


def warm_up_and_plateau(optimizers: Sequence[Optimizer]) -> list[Any]:
    """Two schedulers of one optimizer: the first steps each time, the second only at the end of an epoch."""

    class AtTheEndOfAnEpoch(ReduceLROnPlateau):
        def step(self, *_: Any) -> None:
            pass

    return [LinearLR(optimizers[0], 0.1, total_iters=100), AtTheEndOfAnEpoch(optimizers[0])]


def plateau_and_warm_up(optimizers: Sequence[Optimizer]) -> list[Any]:
    """The same the other way round."""
    return warm_up_and_plateau(optimizers)[::-1]


@pytest.mark.parametrize("schedulers", [warm_up_and_plateau, plateau_and_warm_up])
def test_with_two_schedulers_of_one_optimizer_its_rate_is_that_of_the_snapshot(
    schedulers: Callable[[Sequence[Optimizer]], list[Any]],
) -> None:
    guarded = Run(sgd, schedulers, [redline.SpikeGuard(patience=0)])
    guarded.steps(30)
    guarded.step(spoil=["parameters"])
    assert guarded.did == [(30, "rollback")]
    rates = [state["optimizer 0"]["param_groups"][0]["lr"] for state in (guarded.before[20], guarded.after[30])]
    assert rates[0] == rates[1] == pytest.approx(0.05 * (0.1 + 0.9 * 20 / 100))


@pytest.mark.parametrize("told_of_schedulers", [True, False])
def test_group_settings_come_back_only_together_with_schedulers(told_of_schedulers: bool) -> None:
    guarded = Run(sgd, falling, [redline.SpikeGuard(patience=0)], told_of_schedulers=told_of_schedulers)
    guarded.steps(30)
    guarded.groups[0]["weight_decay"] = 0.25
    guarded.step(spoil=["parameters"])
    assert guarded.did == [(30, "rollback")]
    (back,) = guarded.after[30]["optimizer 0"]["param_groups"]
    (then,) = guarded.before[20]["optimizer 0"]["param_groups"]
    (late,) = guarded.before[30]["optimizer 0"]["param_groups"]
    assert late["lr"] != then["lr"]
    if told_of_schedulers:
        assert (back["lr"], back["weight_decay"]) == (then["lr"], 1e-3)
        assert guarded.after[30]["scheduler 0"] == guarded.before[20]["scheduler 0"]
    else:
        assert (back["lr"], back["weight_decay"]) == (late["lr"], 0.25)
        assert guarded.after[30]["scheduler 0"] == guarded.before[30]["scheduler 0"]
    for part in ("model", "optimizer 0"):
        kept, found = (dict(state[part]) for state in (guarded.before[20], guarded.after[30]))
        assert_same(kept.pop("state", kept), found.pop("state", found))


def test_anything_with_a_state_dict_comes_back_too() -> None:
    average = AveragedModel(Net())

    def averaging(optimizers: Sequence[Optimizer]) -> list[Any]:
        average.step = lambda: average.update_parameters(guarded.model)  # type: ignore[assignment]
        return [average]

    guarded = Run(sgd, averaging, [redline.SpikeGuard(patience=0)])
    guarded.steps(30)
    guarded.step(spoil=["parameters"])
    assert guarded.did == [(30, "rollback")]
    assert differing(guarded.before[20], guarded.before[30]) == {"model", "optimizer 0", "scheduler 0"}
    assert_same(guarded.after[30], guarded.before[20])


class Course:
    """Has a state that it changes in place."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def step(self) -> None:
        self.taken.append(len(self.taken))

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = state["taken"]


def test_what_changes_its_state_in_place_comes_back_twice() -> None:
    course = Course()
    guarded = Run(sgd, lambda _: [course], [redline.SpikeGuard(patience=0)])
    lengths = []
    for index in range(36):
        guarded.step(spoil=["parameters"] if index in (30, 35) else [])
        lengths.append(len(course.taken))
    assert guarded.did == [(30, "rollback"), (35, "rollback")]
    assert (lengths[19], lengths[29], lengths[30], lengths[34], lengths[35]) == (20, 30, 21, 25, 21)


def test_a_guard_that_served_another_run_begins_anew() -> None:
    guard = redline.SpikeGuard(patience=0)
    first = Run(controllers=[guard])
    first.steps(45)
    first.session.close()
    second = Run(controllers=[guard])
    second.steps(18)
    second.step(spoil=["parameters"])
    assert second.did == [(18, "rollback")]
    assert_same(second.after[18], second.before[0])


# What is a jump -----------------------------------------------------------------------------------


def shown(guard: redline.SpikeGuard, index: int, loss: float) -> Any:
    return guard.before_update(SimpleNamespace(index=index, start=StepStart(loss, None, False)))  # type: ignore[arg-type]


class Reference:
    """The rule, by numpy, with the window as a plain list."""

    def __init__(self, threshold: float, min_jump: float, window: int, patience: int, most: int, every: int) -> None:
        self.threshold, self.min_jump, self.window = threshold, min_jump, window
        self.patience, self.most, self.every = patience, most, every
        self.good: list[float] = []
        self.in_a_row, self.kept_at = 0, -math.inf

    def numbers(self, loss: float) -> dict[str, float]:
        last = np.array(self.good[-self.window :])
        if len(last) < 16:
            return {}
        median = float(np.median(last))
        mad = float(np.median(np.abs(last - median)))
        with np.errstate(divide="ignore", invalid="ignore"):
            return {"median": median, "z": float(np.float64(loss - median) / (1.4826 * mad))}

    def answer(self, index: int, loss: float) -> str:
        seen = self.numbers(loss)
        is_jump = not np.isfinite(loss) or bool(
            seen and loss - seen["median"] > self.min_jump and seen["z"] > self.threshold
        )
        if not is_jump:
            self.good.append(loss)
            self.in_a_row = 0
            if index >= self.kept_at + self.every:
                self.kept_at = index
                return "Keep"
            return "None"
        self.in_a_row += 1
        if self.in_a_row <= self.patience:
            return "Withhold"
        if self.in_a_row <= self.patience + self.most:
            return "RollBack" if self.kept_at >= 0 else "Withhold"
        self.in_a_row = 0
        if not np.isfinite(loss):
            return "Stop"
        self.good = [loss]
        return "Withhold"


LOSSES = st.lists(
    st.one_of(
        *[st.floats(0, 2, width=32)] * 6,
        *[st.sampled_from([0.5, 1.0, 1.0, 1.25])] * 3,
        st.floats(-1, 60, width=32),
        st.lists(st.sampled_from([math.nan, math.inf, -math.inf, 40.0, 41.0]), min_size=1, max_size=7),
    ),
    min_size=30,
    max_size=90,
).map(lambda parts: [loss for part in parts for loss in (part if isinstance(part, list) else [part])])


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    losses=LOSSES,
    threshold=st.sampled_from([0.0, 3.0, 8.0]),
    min_jump=st.sampled_from([0.0, 0.5, 4.0]),
    window=st.integers(16, 40),
    patience=st.integers(0, 2),
    most=st.integers(1, 3),
    every=st.integers(1, 30),
)
def test_jumps_and_answers_are_those_of_numpy(
    losses: list[float], threshold: float, min_jump: float, window: int, patience: int, most: int, every: int
) -> None:
    guard = redline.SpikeGuard(
        threshold=threshold, min_jump=min_jump, window=window, patience=patience, max_roll_backs=most, every=every
    )
    reference = Reference(threshold, min_jump, window, patience, most, every)
    for index, loss in enumerate(losses):
        numbers = reference.numbers(loss)
        answer = shown(guard, index, loss)
        assert type(answer).__name__.replace("NoneType", "None") == reference.answer(index, loss), (index, loss)
        if hasattr(answer, "saw"):
            saw = dict(answer.saw)
            assert saw.pop("loss") == pytest.approx(loss, nan_ok=True)
            if np.isfinite(loss):
                assert saw == pytest.approx(numbers, rel=1e-12)
            else:
                assert saw.keys() == numbers.keys()


@pytest.mark.parametrize(
    ("loss", "is_jump"),
    [(1.0 + 0.75 + 1e-6, True), (1.0 + 0.75 - 1e-6, False), (-50.0, False), (math.nan, True), (-math.inf, True)],
)
def test_a_jump_is_so_many_robust_deviations_above_the_median(loss: float, is_jump: bool) -> None:
    deviation = 0.75 / 8.0 / 1.4826  # eight robust deviations are 0.75
    guard = redline.SpikeGuard()
    for index in range(40):
        assert not isinstance(shown(guard, index, 1.0 + deviation * (-1) ** index), redline.Withhold)
    assert isinstance(shown(guard, 40, loss), redline.Withhold) is is_jump


@pytest.mark.parametrize(("loss", "is_jump"), [(1.5, False), (1.5 + 1e-6, True)])
def test_on_a_level_loss_a_jump_is_more_than_min_jump(loss: float, is_jump: bool) -> None:
    guard = redline.SpikeGuard(min_jump=0.5)
    for index in range(20):
        shown(guard, index, 1.0)
    assert isinstance(shown(guard, 20, loss), redline.Withhold) is is_jump


def test_no_finite_loss_is_a_jump_before_sixteen() -> None:
    guard = redline.SpikeGuard()
    for index in range(15):
        shown(guard, index, 1.0)
    assert isinstance(shown(guard, 15, math.inf), redline.Withhold)
    assert shown(guard, 16, 100.0) is None
    assert isinstance(shown(guard, 17, 100.0), redline.Withhold)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_losses_that_are_not_finite_do_not_poison_the_window(value: float) -> None:
    """They are rolled back or withheld; a jump is still one afterwards, and a good loss still good."""
    guarded = Run(controllers=[redline.SpikeGuard(window=16, max_roll_backs=100)])
    guarded.steps(20)
    for _ in range(40):
        guarded.step(shown=value)
    (state,) = guarded.session.state_dict()["control"]["controllers"].values()
    assert state["losses"] == pytest.approx(guarded.losses[4:20])
    guarded.steps(3)
    assert len(guarded.did) == 40
    guarded.step(spoil=["batch"])
    assert guarded.did[-1] == (63, "withhold")
    assert all(torch.isfinite(tensor).all() for tensor in guarded.model.state_dict().values())


def test_jumps_do_not_raise_the_bar_for_the_next() -> None:
    guarded = Run(controllers=[redline.SpikeGuard(window=16, patience=1)])
    guarded.steps(20)
    for _ in range(30):
        guarded.step(spoil=["batch"])
        guarded.step()
    assert guarded.did == [(20 + 2 * index, "withhold") for index in range(30)]


# A jump that lasts --------------------------------------------------------------------------------


@pytest.mark.parametrize(("patience", "most"), [(1, 3), (0, 1), (2, 2)])
def test_a_lasting_new_level_is_accepted(patience: int, most: int) -> None:
    guarded = Run(sgd, falling, [redline.SpikeGuard(patience=patience, max_roll_backs=most)])
    guarded.steps(30)
    for _ in range(60):
        guarded.step(shift=1)  # other labels from here on
    count = patience + most + 1
    actions = ["withhold"] * patience + ["rollback"] * most + ["withhold"]
    assert guarded.did == [(30 + index, action) for index, action in enumerate(actions)]
    last = guarded.session.interventions[-1]
    assert "stays there" in last.reason
    assert "new level" in last.reason
    for index in range(30 + patience, 30 + count):
        assert_same(guarded.after[index]["model"], guarded.before[20]["model"])
    assert guarded.losses[30 + count] > guarded.losses[29] + 0.5  # nothing was learned of it yet
    assert guarded.losses[-1] < guarded.losses[30 + count] - 0.5  # and now it was


def test_from_the_new_level_on_jumps_are_measured_anew() -> None:
    guarded = Run(controllers=[redline.SpikeGuard(patience=0, max_roll_backs=1)])
    for _ in range(20):
        guarded.step(shown=1.0)
    for _ in range(20):
        guarded.step(shown=5.0)
    guarded.step(shown=5.4)
    guarded.step(shown=6.0)
    assert guarded.did == [(20, "rollback"), (21, "withhold"), (41, "rollback")]
    assert guarded.session.interventions[-1].saw["median"] == 5.0


@pytest.mark.parametrize(("patience", "most"), [(1, 3), (0, 1)])
def test_a_lasting_nan_stops_the_run(patience: int, most: int) -> None:
    guarded = Run(sgd, falling, [redline.SpikeGuard(patience=patience, max_roll_backs=most)])
    guarded.steps(30)
    count = patience + most
    for _ in range(count):
        guarded.step(spoil=["nan"])
    at = 30 + count
    with pytest.raises(RunStoppedError, match=rf"SpikeGuard stopped the run at step {at}: the loss jumped to nan"):
        guarded.step(spoil=["nan"])
    assert guarded.did == [
        (30 + index, action) for index, action in enumerate(["withhold"] * patience + ["rollback"] * most + ["stop"])
    ]
    assert f"{most} roll-backs did not help" in guarded.session.interventions[-1].reason
    for name, parameter in guarded.model.named_parameters():
        assert_same(parameter, guarded.before[20]["model"][name])


def test_a_run_that_is_nan_from_its_start_is_stopped_and_no_roll_back_is_spoken_of() -> None:
    guarded = Run(controllers=[redline.SpikeGuard(max_roll_backs=2)])
    for _ in range(3):
        guarded.step(spoil=["nan"])
    with pytest.raises(RunStoppedError, match="SpikeGuard stopped the run at step 3"):
        guarded.step(spoil=["nan"])
    assert guarded.did == [(0, "withhold"), (1, "withhold"), (2, "withhold"), (3, "stop")]
    assert "there was no good step to go back to" in guarded.session.interventions[-1].reason


def test_whoever_goes_on_after_a_stop_begins_anew() -> None:
    guarded = Run(controllers=[redline.SpikeGuard(patience=1, max_roll_backs=1)])
    guarded.steps(20)
    for _ in range(2):
        guarded.step(spoil=["nan"])
    with pytest.raises(RunStoppedError):
        guarded.step(spoil=["nan"])
    for optimizer in guarded.optimizers:
        optimizer.zero_grad()
    guarded.model.load_state_dict(guarded.before[0]["model"])
    guarded.step()
    guarded.step(spoil=["nan"])
    assert [action for _, action in guarded.did] == ["withhold", "rollback", "stop", "withhold"]


# Beside another controller ------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 1])
def test_a_roll_back_saves_a_run_that_another_would_stop(first: int) -> None:
    guards = [redline.SpikeGuard(patience=0), redline.NonFiniteGuard(stop_after=1)]
    guarded = Run(controllers=[guards[first], guards[1 - first]])
    guarded.steps(30)
    guarded.step(spoil=["nan"])
    assert guarded.did == [(30, "rollback")]
    assert_same(guarded.after[30], guarded.before[20])
    guarded.step()


class Withholding(redline.Controller):
    """Withholds one step."""

    needs = redline.Need.NOTHING

    def __init__(self, index: int) -> None:
        self.index = index

    def before_update(self, step: redline.Step) -> redline.Withhold | None:
        return redline.Withhold("as told.") if step.index == self.index else None


@pytest.mark.parametrize("first", [0, 1])
def test_a_roll_back_outranks_withholding(first: int) -> None:
    controllers = [redline.SpikeGuard(patience=0), Withholding(30)]
    guarded = Run(sgd, falling, [controllers[first], controllers[1 - first]])
    guarded.steps(30)
    guarded.step(spoil=["parameters"])
    assert sorted(guarded.did) == [(30, "rollback"), (30, "withhold")]
    assert_same(guarded.after[30], guarded.before[20])


@pytest.mark.parametrize("first", [0, 1])
def test_a_snapshot_due_at_a_step_that_another_withholds_has_seen_nothing_of_its_batch(first: int) -> None:
    controllers = [redline.SpikeGuard(patience=0), Withholding(20)]
    guarded = Run(sgd, falling, [controllers[first], controllers[1 - first]])
    guarded.steps(30)
    assert guarded.session.report().snapshots[0].step == 20
    assert differing(guarded.before[20], guarded.after[20]) == {"model"}  # the running statistics
    guarded.step(spoil=["parameters"])
    assert guarded.did == [(20, "withhold"), (30, "rollback")]
    assert_same(guarded.after[30], guarded.after[20])


# What it needs, and what it refuses ---------------------------------------------------------------


@EVERY_OPTIMIZER
def test_a_loop_that_observes_no_loss_is_told_how_to(optimizers: Callable[[nn.Module], list[Optimizer]]) -> None:
    guarded = Run(optimizers, controllers=[redline.SpikeGuard()])
    guarded.session.close()
    before = guarded.state()
    with redline.attach(guarded.model, guarded.optimizers, monitors=[], controllers=[redline.SpikeGuard()]) as session:
        x, y = batch(0)
        F.cross_entropy(guarded.model(x), y).backward()
        with pytest.raises(ConfigurationError, match=r"session\.observe\(loss=loss\) before each optimizer\.step\(\)"):
            guarded.optimizers[0].step()
        assert session.interventions == ()
    after = guarded.state()
    for name, parameter in guarded.model.named_parameters():
        assert_same(parameter, before["model"][name])
    assert_same({**after, "model": {}}, {**before, "model": {}})


def test_a_later_step_without_a_loss_is_taken_as_it_is() -> None:
    guarded, twin = Run(controllers=[redline.SpikeGuard(patience=0)]), Run()
    for run in (guarded, twin):
        run.steps(20)
        F.cross_entropy(run.model(batch(100)[0]), batch(100)[1]).backward()
        run.optimizers[0].step()
        run.optimizers[0].zero_grad()
        run.steps(5)
    assert guarded.did == []
    assert_same(guarded.state(), twin.state())


@pytest.mark.parametrize("kind", [float, torch.tensor, lambda value: torch.tensor([value], dtype=torch.float64)])
def test_a_loss_may_be_observed_as_a_number_or_a_tensor(kind: Callable[[float], Any]) -> None:
    guarded = Run(controllers=[redline.SpikeGuard()])
    for _ in range(20):
        guarded.step(shown=kind(1.0))
    guarded.step(shown=kind(4.0))
    assert guarded.did == [(20, "withhold")]


@pytest.mark.parametrize(
    ("argument", "match"),
    [
        ({"threshold": -1.0}, "got threshold=-1.0; expected at least 0"),
        ({"threshold": math.inf}, "got threshold=inf"),
        ({"threshold": math.nan}, "got threshold=nan"),
        ({"min_jump": -0.1}, "got min_jump=-0.1; expected at least 0"),
        ({"window": 15}, "got window=15; expected at least 16"),
        ({"patience": -1}, "got patience=-1; expected at least 0"),
        ({"max_roll_backs": 0}, "got max_roll_backs=0; expected at least 1"),
        ({"every": 0}, "got every=0; expected at least 1"),
        ({"memory": "disk"}, "got memory='disk'; expected 'device' or 'host'"),
    ],
)
def test_limits_that_cannot_work_are_refused(argument: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        redline.SpikeGuard(**argument)


@pytest.mark.parametrize(
    "argument",
    [{"threshold": 0}, {"min_jump": 0}, {"window": 16}, {"patience": 0}, {"max_roll_backs": 1}, {"every": 1}],
)
def test_the_least_limits_are_accepted(argument: dict[str, Any]) -> None:
    redline.SpikeGuard(**argument)


# Its trace ----------------------------------------------------------------------------------------


def test_every_decision_is_told_in_words_and_numbers_and_counted() -> None:
    guarded = Run(controllers=[redline.SpikeGuard(max_roll_backs=1, every=10)])
    assert guarded.session.latest.series(COUNTER) == {
        ("SpikeGuard", action): 0.0 for action in ("scale", "decay", "withhold", "reject", "rollback", "stop")
    }
    for index in range(16):
        guarded.step(shown=1.0 + 0.1 * (-1) ** index)
    for loss in (9.0, 9.0, math.nan):
        if math.isnan(loss):
            with pytest.raises(RunStoppedError, match="the loss jumped to nan from 1, and 1 roll-backs did not help"):
                guarded.step(shown=loss)
        else:
            guarded.step(shown=loss)
    first, second, third = guarded.session.interventions
    assert {one.controller for one in (first, second, third)} == {"SpikeGuard"}
    assert [(one.step, one.action) for one in (first, second, third)] == [
        (16, "withhold"),
        (17, "rollback"),
        (18, "stop"),
    ]
    assert first.reason == "the loss jumped to 9 from 1: the step was withheld."
    assert second.reason == "the loss jumped to 9 from 1 and stayed: the run was rolled back to step 10."
    for one in (first, second):
        assert one.saw == pytest.approx({"loss": 9.0, "median": 1.0, "z": 8.0 / (1.4826 * 0.1)})
    assert math.isnan(third.saw["loss"])
    counted = guarded.session.latest.series(COUNTER)
    assert {action: count for (_, action), count in counted.items() if count} == {
        "withhold": 1,
        "rollback": 1,
        "stop": 1,
    }
    tallies = guarded.session.report().interventions
    assert [(one.action, one.count, one.first_step) for one in tallies] == [
        ("withhold", 1, 16),
        ("rollback", 1, 17),
        ("stop", 1, 18),
    ]


def test_of_a_jump_before_there_is_a_median_the_loss_alone_is_told() -> None:
    guarded = Run(controllers=[redline.SpikeGuard()])
    guarded.step(shown=math.inf)
    (one,) = guarded.session.interventions
    assert one.reason == "the loss jumped to inf: the step was withheld."
    assert one.saw == {"loss": math.inf}


# What it holds ------------------------------------------------------------------------------------


def printed(report: redline.StabilityReport) -> str:
    console = Console(file=io.StringIO(), width=200, color_system=None)
    console.print(report)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def tensor_bytes(state: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(state) if isinstance(leaf, Tensor))


PARAMETERS, MATRICES = (6 * 16 + 16) + 2 * 16 + (16 * 3 + 3), 6 * 16 + 16 * 3
BUFFERS = 4 * 2 * 16 + 8  # running mean and variance, and a count in 64 bits


@pytest.mark.parametrize(
    ("optimizers", "held"),
    [
        (sgd, 4 * PARAMETERS),
        (adamw_foreach, 3 * 4 * PARAMETERS + 6 * 4),  # two moments, their maximum, a count for each of 6 parameters
        (adamw_fused, 2 * 4 * PARAMETERS + 6 * 4),
        (adamw_with_a_rate_in_a_tensor, 2 * 4 * PARAMETERS + 6 * 4 + 4),
        (muon_and_adamw, 4 * MATRICES + 2 * 4 * (PARAMETERS - MATRICES) + 4 * 4),
    ],
)
@pytest.mark.parametrize(("memory", "in_checkpoints"), [("device", True), ("host", False)])
def test_the_report_says_what_is_held_in_memory(
    optimizers: Callable[[nn.Module], list[Optimizer]], held: int, memory: Any, in_checkpoints: bool
) -> None:
    guarded = Run(optimizers, controllers=[redline.SpikeGuard(every=10, memory=memory, in_checkpoints=in_checkpoints)])
    assert guarded.session.report().snapshots == ()
    assert "a copy of the run" not in printed(guarded.session.report())
    guarded.steps(15)
    (kept,) = guarded.session.report().snapshots
    size = 4 * PARAMETERS + BUFFERS + held
    assert (kept.controller, kept.step, kept.memory, kept.in_checkpoints) == (
        "SpikeGuard",
        10,
        memory,
        in_checkpoints,
    )
    assert kept.bytes == size
    assert guarded.session.report().to_dict()["snapshots"] == (vars(kept),)
    line = next(line for line in printed(guarded.session.report()).splitlines() if "copy of the run" in line)
    assert line.strip("│ ").startswith("kept ")
    assert f"SpikeGuard: a copy of the run at step 10, {size / 2**20:.3g} MiB in {memory} memory; " in line
    assert ("checkpoints carry it" if in_checkpoints else "checkpoints leave it out") in line
    guarded.session.close()
    assert guarded.session.report().snapshots == (kept,)


def test_the_report_counts_what_came_with_the_schedulers() -> None:
    average = AveragedModel(Net())
    average.step = lambda: None  # type: ignore[assignment]
    guarded = Run(sgd, lambda _: [average], [redline.SpikeGuard()])
    guarded.steps(1)
    (kept,) = guarded.session.report().snapshots
    assert kept.bytes == 4 * PARAMETERS + BUFFERS + tensor_bytes(
        average.state_dict()
    )  # before the first update there are no moments


@EVERY_OPTIMIZER
def test_kept_in_host_memory_it_comes_back_alike(optimizers: Callable[[nn.Module], list[Optimizer]]) -> None:
    device, host = (
        Run(optimizers, falling, [redline.SpikeGuard(memory=memory)])  # type: ignore[arg-type]
        for memory in ("device", "host")
    )
    for run in (device, host):
        run.steps(30)
        run.step(spoil=["parameters"])
        run.steps(10)
    assert host.did == device.did == [(30, "withhold"), (31, "rollback")]
    assert_same(host.after[31], host.before[20])
    assert_same(host.after, device.after)


# In checkpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize("in_checkpoints", [True, False])
def test_session_state_carries_the_snapshot_where_asked(in_checkpoints: bool) -> None:
    guarded = Run(sgd, falling, [redline.SpikeGuard(in_checkpoints=in_checkpoints)])
    guarded.steps(30)
    state = guarded.session.state_dict()
    assert tensor_bytes(state) == (guarded.session.report().snapshots[0].bytes if in_checkpoints else 0)


def resumed(guarded: Run, guard: redline.SpikeGuard) -> Run:
    """Another run that goes on where this one is, through a file."""
    file = io.BytesIO()
    torch.save({"run": guarded.state(), "session": guarded.session.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    run = Run(sgd, falling, [guard])
    run.load(saved["run"])
    run.session.load_state_dict(saved["session"])
    run.losses, run.before, run.after = (list(one) for one in (guarded.losses, guarded.before, guarded.after))
    return run


def test_left_out_of_checkpoints_a_resumed_run_takes_a_new_one_at_once() -> None:
    guarded = Run(sgd, falling, [redline.SpikeGuard(in_checkpoints=False)])
    guarded.steps(30)
    run = resumed(guarded, redline.SpikeGuard(in_checkpoints=False))
    assert run.session.report().snapshots == ()
    run.steps(1)
    assert [kept.step for kept in run.session.report().snapshots] == [30]
    run.steps(2)
    run.step(spoil=["parameters"])
    run.step()
    assert run.did == [(33, "withhold"), (34, "rollback")]
    assert_same(run.after[34], run.before[30])


def test_left_out_of_checkpoints_a_run_resumed_amid_jumps_waits_for_a_good_loss() -> None:
    guarded = Run(sgd, falling, [redline.SpikeGuard(in_checkpoints=False)])
    guarded.steps(30)
    guarded.step(spoil=["batch"])
    run = resumed(guarded, redline.SpikeGuard(in_checkpoints=False))
    run.step(spoil=["batch"])
    assert run.session.report().snapshots == ()
    run.step()
    assert run.did == [(30, "withhold"), (31, "withhold")]
    assert [kept.step for kept in run.session.report().snapshots] == [32]


@pytest.mark.parametrize("then", [True, False])
def test_a_run_may_be_resumed_with_another_choice_of_in_checkpoints(then: bool) -> None:
    guarded = Run(sgd, falling, [redline.SpikeGuard(in_checkpoints=then)])
    guarded.steps(30)
    run = resumed(guarded, redline.SpikeGuard(in_checkpoints=not then))
    run.steps(1)
    run.step(spoil=["parameters"])
    run.step()
    assert run.did == [(31, "withhold"), (32, "rollback")]
    (kept,) = run.session.report().snapshots
    assert_same(run.after[32], run.before[kept.step])


def test_a_state_taken_is_not_changed_by_the_run_that_goes_on() -> None:
    guarded = Run(sgd, falling, [redline.SpikeGuard(patience=0)])
    guarded.steps(30)
    state = guarded.session.state_dict()
    then = bits(state)
    guarded.step(spoil=["parameters"])
    guarded.steps(30)
    assert [action for _, action in guarded.did] == ["rollback"]
    assert bits(state) == then


def test_a_run_is_not_changed_by_another_that_loaded_its_state() -> None:
    guarded = Run(sgd, falling, [redline.SpikeGuard(patience=0)])
    guarded.steps(30)
    other = Run(sgd, falling, [redline.SpikeGuard(patience=0)])
    other.load(guarded.state())
    other.session.load_state_dict(guarded.session.state_dict())
    other.losses = list(guarded.losses)
    other.step(spoil=["parameters"])
    other.steps(9)
    assert [action for _, action in other.did] == ["rollback"]
    guarded.step(spoil=["parameters"])
    assert_same(guarded.after[30], guarded.before[20])
