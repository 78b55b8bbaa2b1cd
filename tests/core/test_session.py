"""The session: when things happen, what is kept and let go of, what survives failures, and how it ends and resumes."""

from __future__ import annotations

import gc
import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import redline
from redline import ConfigurationError, Need, Readings, RedlineWarning, Scale, Snapshot, Step, metrics


@pytest.fixture(autouse=True, scope="module")
def quiet_machine() -> Iterator[None]:
    """One thread, since with tensors this small several only wait for one another, and few objects to search."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


# Doubles ----------------------------------------------------------------------------------------------


class Watching(redline.Monitor):
    """Does what it is told at each step at which it is due."""

    def __init__(
        self,
        act: Callable[[Step, Readings], None] = lambda step, readings: None,
        every: int | Callable[[int], bool] = 1,
        *,
        needs: Need = Need.NOTHING,
        after_commit: bool = False,
    ) -> None:
        super().__init__(every)
        self.act, self.needs, self.after_commit = act, needs, after_commit

    def measure(self, step: Step, readings: Readings) -> None:
        self.act(step, readings)


class Keeping(redline.Sink):
    """Keeps what it is handed."""

    def __init__(self, every: int | Callable[[int], bool] = 1) -> None:
        super().__init__(every)
        self.opened: list[redline.RunInfo] = []
        self.snapshots: list[Snapshot] = []
        self.reports: list[redline.StabilityReport] = []

    def open(self, run: redline.RunInfo) -> None:
        self.opened.append(run)

    def emit(self, snapshot: Snapshot) -> None:
        self.snapshots.append(snapshot)

    def close(self, report: redline.StabilityReport) -> None:
        self.reports.append(report)


class Scaling(redline.Controller):
    """Scales every step, and remembers how many."""

    def __init__(self, factor: float = 0.5) -> None:
        self.factor, self.inspected = factor, 0

    def inspect(self, step: Step) -> Iterable[Scale]:
        self.inspected += 1
        return [Scale(self.factor, "as told.", saw={"tau": float(step.update.norm)})]

    def state_dict(self) -> dict[str, Any]:
        return {"inspected": self.inspected}

    def load_state_dict(self, state: Any) -> None:
        self.inspected = state["inspected"]


# Runs -------------------------------------------------------------------------------------------------

WIDTH, CLASSES, BATCH = 37, 5, 11  # odd sizes: a tensor of (37, 37) in memory is the body's or made from it


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


def sgd(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)]


def muon_and_adamw(model: nn.Module) -> list[Optimizer]:
    parameters = list(model.parameters())
    return [
        torch.optim.Muon([parameter for parameter in parameters if parameter.dim() == 2], 0.02),
        torch.optim.AdamW([parameter for parameter in parameters if parameter.dim() != 2], 1e-2),
    ]


class Run:
    """A model with its optimizers; two made alike are alike."""

    def __init__(
        self,
        optimizers: Callable[[nn.Module], list[Optimizer]] = sgd,
        model: Callable[[], nn.Module] = Net,
    ) -> None:
        torch.manual_seed(0)
        self.model = model()
        self.optimizers = optimizers(self.model)

    def loss(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(BATCH, WIDTH, generator=generator)
        y = torch.randint(0, CLASSES, (BATCH,), generator=generator)
        return F.cross_entropy(self.model(x), y)

    def backward(self, seed: int) -> None:
        self.loss(seed).backward()

    def update(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self, seed: int) -> None:
        self.backward(seed)
        self.update()

    def attach(
        self,
        *monitors: redline.Monitor,
        controllers: Sequence[redline.Controller] = (),
        sinks: Sequence[redline.Sink] = (),
        **options: Any,
    ) -> redline.Session:
        return redline.attach(
            self.model, self.optimizers, monitors=monitors, controllers=controllers, sinks=sinks, **options
        )

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    @property
    def gradient_norm(self) -> float:
        return norm([p.grad for p in self.model.parameters() if p.grad is not None])

    def hooks(self) -> int:
        """How many hooks there are on the model's modules and on the optimizers."""
        on_modules = (
            len(hooks)
            for module in self.model.modules()
            for kind, hooks in vars(module).items()
            if kind.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))
        )
        on_optimizers = (
            len(hooks)
            for optimizer in self.optimizers
            for kind, hooks in vars(optimizer).items()
            if kind.endswith("_hooks")
        )
        return sum(on_modules) + sum(on_optimizers)


def norm(tensors: Iterable[Tensor]) -> float:
    return float(torch.stack([tensor.detach().double().norm() for tensor in tensors]).norm())


def often() -> list[redline.Monitor]:
    """The default monitors, due much more often than by default."""
    return [
        redline.WeightSpectrum(1),
        redline.UpdateSpectrum(1),
        redline.GhostRadius(1, max_samples=None),
        redline.StepHealth(1),
    ]


def in_memory(*shape: int) -> int:
    """How many tensors of this shape are alive in the process."""
    gc.collect()
    return sum(isinstance(one, Tensor) and tuple(one.shape) == shape for one in gc.get_objects())


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
    assert [verdict.text for verdict in report.verdicts] == ["No optimizer step was taken."]
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
        pytest.raises(ConfigurationError, match="got a session state of version 99; expected 3"),
    ):
        session.load_state_dict({"version": 99})


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
