"""Observing alone changes nothing: a watched run and an unwatched one are the same in every bit, at every step."""

from __future__ import annotations

import copy
import hashlib
import io
import random
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import redline

STEPS = 100
MEASURED = (
    "redline_weight_spectral_norm",
    "redline_weight_spectral_residual",
    "redline_weight_stable_rank",
    "redline_weight_spectral_condition",
    "redline_update_spectral_norm",
    "redline_update_spectral_condition",
    "redline_update_to_weight_ratio",
    "redline_update_norm",
    "redline_ghost_radius",
    "redline_normalized_step_size",
    "redline_committed_step_size",
    "redline_step_scale",
    "redline_loss",
    "redline_gradient_norm",
    "redline_learning_rate",
    "redline_last_step_timestamp_seconds",
)


# What is trained ----------------------------------------------------------------------------------


class Convolutional(nn.Module):
    """BatchNorm in training and another frozen in eval, dropout as a module and as a call, one parameter unused."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3)
        self.normalization = nn.BatchNorm2d(4)
        self.frozen = nn.Sequential(nn.Linear(36, 36), nn.BatchNorm1d(36), nn.Dropout(0.5))
        self.hidden = nn.Linear(36, 16)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(16, 5)
        self.unused = nn.Parameter(torch.ones(3))
        self.frozen.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.normalization(self.convolution(x))).flatten(1)
        hidden = hidden + self.frozen(hidden)
        hidden = self.dropout(F.relu(self.hidden(hidden)))
        return self.head(F.dropout(hidden, 0.1, self.training))

    @staticmethod
    def batch() -> tuple[Tensor, Tensor]:
        # From all three streams of random numbers, so that a draw too many shows in the losses.
        x = torch.randn(8, 1, 5, 5) * float(1 + np.random.rand()) + random.random()  # noqa: NPY002 the run's own stream
        return x, torch.randint(0, 5, (8,))


class Attention(nn.Module):
    """Attention, which drops by itself while in train mode, over tokens; measured on a sub-sample of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(tokens)))

    @staticmethod
    def batch() -> tuple[Tensor, Tensor]:
        tokens = torch.randint(0, 11, (8, 6))
        return tokens, (tokens + random.randrange(2) + np.random.randint(2)) % 5  # noqa: NPY002 the run's own stream


def sgd(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-2)]


def adam(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.Adam(model.parameters(), 3e-3)]


def adamw_foreach(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.AdamW(model.parameters(), 3e-3, foreach=True)]


def adamw_fused(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.AdamW(model.parameters(), 3e-3, fused=True)]


def muon_and_adamw(model: nn.Module) -> list[Optimizer]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        torch.optim.Muon([parameter for parameter in trained if parameter.dim() == 2], 0.02),
        torch.optim.AdamW([parameter for parameter in trained if parameter.dim() != 2], 3e-3),
    ]


def lbfgs(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.LBFGS(model.parameters(), 0.1, max_iter=3)]


# How it is trained --------------------------------------------------------------------------------


class Run:
    """One training run, watched by as many sessions as it is given, and a fingerprint of everything at each step."""

    def __init__(self, kind: type[Any], optimizers: Callable[[nn.Module], list[Optimizer]], loop: Loop) -> None:
        self.model: nn.Module = kind()
        self.called: nn.Module = self.model
        self.batch: Callable[[], tuple[Tensor, Tensor]] = kind.batch
        self.optimizers = optimizers(self.model)
        self.loop = loop
        self.sessions: list[redline.Session] = []
        self.prints: list[dict[str, str]] = []
        self.scrape = ""

    def loss(self) -> Tensor:
        x, y = self.batch()
        logits = self.called(x)
        return F.cross_entropy(logits.flatten(0, -2), y.flatten())

    def observe(self, loss: Tensor) -> None:
        for session in self.sessions:
            session.observe(loss=loss)

    def step(self) -> None:
        loss = self.loop(self)
        self.prints.append(fingerprint(self.model, self.optimizers, loss))
        for optimizer in self.optimizers:
            optimizer.zero_grad()


Loop = Callable[[Run], Tensor]


def plain(run: Run) -> Tensor:
    loss = run.loss()
    run.observe(loss)
    loss.backward()
    for optimizer in run.optimizers:
        optimizer.step()
    return loss


def accumulating(run: Run) -> Tensor:
    total = torch.zeros(())
    for _ in range(3):
        loss = run.loss() / 3
        loss.backward()
        total += loss.detach()
    run.observe(total)
    for optimizer in run.optimizers:
        optimizer.step()
    return total


def with_closure(run: Run) -> Tensor:
    def closure() -> Tensor:
        for optimizer in run.optimizers:
            optimizer.zero_grad()
        loss = run.loss()
        run.observe(loss)
        loss.backward()
        return loss

    (optimizer,) = run.optimizers
    return optimizer.step(closure)


def with_closure_by_keyword(run: Run) -> Tensor:
    def closure() -> Tensor:
        run.optimizers[0].zero_grad()
        loss = run.loss()
        run.observe(loss)
        loss.backward()
        return loss

    return run.optimizers[0].step(closure=closure)


def under_autocast(run: Run) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = run.loss()
    run.observe(loss)
    loss.backward()
    for optimizer in run.optimizers:
        optimizer.step()
    return loss


def train(
    kind: type[Any] = Convolutional,
    optimizers: Callable[[nn.Module], list[Optimizer]] = sgd,
    loop: Loop = plain,
    *,
    sessions: int,
    steps: int = STEPS,
    prepare: Callable[[Run], None] | None = None,
    midway: Callable[[Run], None] | None = None,
    monitors: Callable[[], list[redline.Monitor]] | None = None,
) -> Run:
    seed()
    run = Run(kind, optimizers, loop)
    if prepare:
        prepare(run)
    exporters = [redline.PrometheusExporter(port=0, every=3) for _ in range(sessions)]
    for exporter in exporters:
        run.sessions.append(attach(run, exporter, monitors() if monitors else often()))
    for step in range(steps):
        if step == steps // 2 and midway:
            midway(run)
        run.step()
    if exporters:
        run.scrape = urllib.request.urlopen(exporters[0].url or "").read().decode()
    for session in run.sessions:
        session.close()
    return run


def seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 the run's own stream
    random.seed(0)


def often() -> list[redline.Monitor]:
    """The default monitors, due much more often than by default."""
    return [
        redline.WeightSpectrum(3),
        redline.UpdateSpectrum(2),
        redline.GhostRadius(1, max_samples=4),
        redline.StepHealth(1),
    ]


def attach(run: Run, exporter: redline.PrometheusExporter, monitors: list[redline.Monitor]) -> redline.Session:
    return redline.attach(
        run.called,
        run.optimizers,
        monitors=monitors,
        sinks=[redline.ConsoleReport(every=7), exporter],
    )


# What is compared ---------------------------------------------------------------------------------


def fingerprint(model: nn.Module, optimizers: list[Optimizer], loss: Tensor) -> dict[str, str]:
    """A digest of each kind of thing that observing must not change."""
    named = dict(model.named_parameters())
    return {
        "loss": digest(loss),
        "parameters": digest(named),
        "buffers": digest(dict(model.named_buffers())),
        "gradients": digest({name: parameter.grad for name, parameter in named.items()}),
        "optimizer state": digest([optimizer.state_dict() for optimizer in optimizers]),
        "requires_grad": digest({name: parameter.requires_grad for name, parameter in named.items()}),
        "modes": digest({name: module.training for name, module in model.named_modules()}),
        "torch's stream": digest(torch.get_rng_state()),
        "numpy's stream": digest(np.random.get_state()),  # noqa: NPY002 the run's own stream
        "python's stream": digest(random.getstate()),
        "settings": digest(settings()),
    }


def settings() -> list[Any]:
    return [
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_cache_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.mkldnn.enabled,
        torch.backends.mkldnn.deterministic,
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.are_deterministic_algorithms_enabled(),
    ]


def digest(value: Any) -> str:
    sha = hashlib.sha256()

    def take(value: Any) -> None:
        if isinstance(value, Tensor):
            sha.update(repr((value.dtype, tuple(value.shape))).encode())
            sha.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, np.ndarray):
            sha.update(value.tobytes())
        elif isinstance(value, dict):
            for key, inner in value.items():
                sha.update(repr(key).encode())
                take(inner)
        elif isinstance(value, (list, tuple)):
            sha.update(str(len(value)).encode())
            for inner in value:
                take(inner)
        else:
            sha.update(repr(value).encode())

    take(value)
    return sha.hexdigest()


def differences(watched: Run, unwatched: Run) -> list[tuple[int, list[str]]]:
    """At which steps which kinds of things differ."""
    assert len(watched.prints) == len(unwatched.prints) > 0
    pairs = enumerate(zip(watched.prints, unwatched.prints, strict=True))
    found = ((step, [kind for kind in one if one[kind] != other[kind]]) for step, (one, other) in pairs)
    return [(step, kinds) for step, kinds in found if kinds]


def assert_really_measured(run: Run, steps: int = STEPS) -> None:
    """Or else the comparison would pass because nothing was done."""
    assert run.sessions
    for session in run.sessions:
        latest = session.latest
        assert session.notes == ()
        assert [metric for metric in MEASURED if metric not in latest] == []
        assert latest.value("redline_steps_total") == steps
        assert latest.series("redline_measurements_total") == {
            ("WeightSpectrum",): len(range(0, steps, 3)),
            ("UpdateSpectrum",): len(range(0, steps, 2)),
            ("GhostRadius",): steps,
            ("StepHealth",): steps,
        }
        assert 0 < latest.value("redline_normalized_step_size") < 1e3
        assert set(latest.layers("redline_weight_spectral_norm")) == {
            name for name, parameter in run.model.named_parameters() if parameter.dim() > 1
        }
        assert not session.interventions
    assert "\nredline_normalized_step_size " in run.scrape
    assert '\nredline_weight_spectral_norm{layer="head.weight"} ' in run.scrape


def assert_unchanged(capsys: pytest.CaptureFixture[str], steps: int = STEPS, **case: Any) -> None:
    unwatched = train(sessions=0, steps=steps, **case)
    assert capsys.readouterr().out == ""
    watched = train(sessions=1, steps=steps, **case)
    assert "redline" in capsys.readouterr().out
    assert_really_measured(watched, steps)
    assert differences(watched, unwatched) == []


# The law ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Convolutional, Attention])
@pytest.mark.parametrize("optimizers", [sgd, adam, adamw_foreach, adamw_fused, muon_and_adamw])
def test_plain_loop_is_unchanged(
    kind: type[nn.Module],
    optimizers: Callable[[nn.Module], list[Optimizer]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert_unchanged(capsys, kind=kind, optimizers=optimizers)


@pytest.mark.parametrize(
    ("loop", "optimizers"),
    [
        (accumulating, sgd),
        (accumulating, muon_and_adamw),
        (with_closure, sgd),
        (with_closure, adamw_fused),
        (with_closure_by_keyword, adam),
        (under_autocast, adamw_foreach),
    ],
)
def test_other_loops_are_unchanged(
    loop: Loop, optimizers: Callable[[nn.Module], list[Optimizer]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert_unchanged(capsys, loop=loop, optimizers=optimizers)


def test_line_search_that_calls_its_closure_many_times_is_unchanged(capsys: pytest.CaptureFixture[str]) -> None:
    assert_unchanged(capsys, steps=20, loop=with_closure, optimizers=lbfgs)


def test_attention_under_autocast_is_unchanged(capsys: pytest.CaptureFixture[str]) -> None:
    assert_unchanged(capsys, kind=Attention, loop=under_autocast, optimizers=adam)


def test_default_monitors_on_their_default_schedules_change_nothing() -> None:
    unwatched = train(sessions=0)
    watched = train(sessions=1, monitors=redline.default_monitors)
    assert watched.sessions[0].latest.series("redline_measurements_total") == {
        ("WeightSpectrum",): 2,
        ("UpdateSpectrum",): 2,
        ("GhostRadius",): 2,
        ("StepHealth",): 100,
    }
    assert differences(watched, unwatched) == []


class Noisy(Convolutional):
    """Draws from all three streams in its forward, as stochastic depth and noise layers do."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.1 * torch.randn_like(x) + 0.1 * float(np.random.rand())  # noqa: NPY002 the run's own stream
        return super().forward(x) if random.random() < 0.8 else 0.5 * super().forward(x)


@pytest.mark.parametrize("optimizers", [sgd, muon_and_adamw])
def test_model_that_draws_random_numbers_itself_is_unchanged(
    optimizers: Callable[[nn.Module], list[Optimizer]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert_unchanged(capsys, steps=30, kind=Noisy, optimizers=optimizers)


class WorkingInPlace(nn.Module):
    """Normalizes its input in place, as some do to save memory."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.mul_(0.9))


@pytest.mark.filterwarnings("ignore::redline.RedlineWarning")
def test_data_that_the_model_works_on_in_place_is_worked_on_once() -> None:
    """Batches are views of the data: replaying the model on them would change what the next epoch sees."""

    def data_after(watched: bool) -> Tensor:
        seed()
        model, data = WorkingInPlace(), torch.randn(12, 6)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        monitors: list[redline.Monitor] = [redline.GhostRadius(1)] if watched else []
        with redline.attach(model, optimizer, monitors=monitors):
            for step in range(4):
                batch = data[6 * (step % 2) : 6 * (step % 2) + 6]
                F.cross_entropy(model(batch), torch.arange(6) % 5).backward()
                optimizer.step()
                optimizer.zero_grad()
        return data

    assert torch.equal(data_after(watched=True), data_after(watched=False))


class Remembering(nn.Module):
    """Leaves what it computed in plain attributes, as models with an online probe or auxiliary loss do."""

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh())
        self.head = nn.Linear(8, 5)
        self.calls = 0
        self.seen: list[int] = []
        self.scale = scale
        self.features: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(len(x))
        self.features = self.body(x) * self.scale
        return self.head(self.features)


@pytest.mark.parametrize("scale", [torch.ones(8), torch.ones(1).expand(8)], ids=["plain", "expanded"])
def test_what_a_model_remembers_is_left_alone_and_can_be_trained_on_after_the_step(scale: Tensor) -> None:
    def train_with_probe(watched: bool) -> tuple[list[str], int, list[int]]:
        seed()
        model, probe = Remembering(scale), nn.Linear(8, 5)
        optimizer, other = (torch.optim.SGD(module.parameters(), 0.1) for module in (model, probe))
        monitors: list[redline.Monitor] = [redline.GhostRadius(1)] if watched else []
        prints: list[str] = []
        with redline.attach(model, optimizer, monitors=monitors) as session:
            for _ in range(4):
                F.cross_entropy(model(torch.randn(6, 6)), torch.arange(6) % 5).backward()
                assert model.features is not None
                of_probe = F.cross_entropy(probe(model.features.detach()), torch.arange(6) % 5)
                features = model.features
                optimizer.step()
                assert model.features is features
                of_probe.backward()  # of what was computed before the step
                other.step()
                optimizer.zero_grad()
                other.zero_grad()
                prints.append(digest([dict(model.named_parameters()), dict(probe.named_parameters()), features]))
            if watched:
                assert session.notes == ()
                assert session.latest.value("redline_measurements_total", monitor="GhostRadius") == 4
                assert session.latest.value("redline_normalized_step_size") > 0
        return prints, model.calls, model.seen

    assert train_with_probe(watched=True) == train_with_probe(watched=False)


def test_submodules_frozen_in_eval_stay_in_eval() -> None:
    run = train(sessions=1, steps=4)
    modes = {name: module.training for name, module in run.model.named_modules()}
    assert not any(mode for name, mode in modes.items() if name.startswith("frozen"))
    assert all(mode for name, mode in modes.items() if not name.startswith("frozen"))
    assert torch.equal(run.model.get_buffer("frozen.1.running_mean"), torch.zeros(36))
    assert run.model.get_buffer("normalization.num_batches_tracked") == 4


# Copies, wrappers and a second session ------------------------------------------------------------


def train_aside(run: Run, model: nn.Module, steps: int = 3) -> None:
    """Train a copy of the run's model for itself: nobody watches it."""
    before = [session.latest.value("redline_steps_total") for session in run.sessions]
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for _ in range(steps):
        x, y = run.batch()
        loss = F.cross_entropy(model(x).flatten(0, -2), y.flatten())
        loss.backward()
        optimizer.step()
        run.prints.append(fingerprint(model, [optimizer], loss))
        optimizer.zero_grad()
    assert [session.latest.value("redline_steps_total") for session in run.sessions] == before


def deep_copied(run: Run) -> None:
    train_aside(run, copy.deepcopy(run.model))


def saved_and_loaded(run: Run) -> None:
    file = io.BytesIO()
    torch.save(run.model, file)
    file.seek(0)
    train_aside(run, torch.load(file, weights_only=False))


@pytest.mark.parametrize("midway", [deep_copied, saved_and_loaded])
@pytest.mark.parametrize("optimizers", [sgd, muon_and_adamw])
def test_model_copied_midway_is_unchanged_and_its_copy_inert(
    midway: Callable[[Run], None],
    optimizers: Callable[[nn.Module], list[Optimizer]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert_unchanged(capsys, steps=20, midway=midway, optimizers=optimizers)


def test_copy_called_between_forward_and_step_leaves_the_measurement_alone() -> None:
    """An EMA copy that predicts, and trains, before the original steps: its inputs are not the original's."""

    def measure(meddle: bool) -> float:
        seed()
        run = Run(Convolutional, sgd, plain)
        with redline.attach(run.model, run.optimizers, monitors=[redline.GhostRadius(1)]) as session:
            average = copy.deepcopy(run.model)
            x, y = run.batch()
            F.cross_entropy(run.model(x), y).backward()
            if meddle:
                average(torch.full_like(x, 1e3)).sum().backward()
            run.optimizers[0].step()
            return session.latest.value("redline_normalized_step_size")

    assert measure(meddle=True) == measure(meddle=False)


class Compiling:
    """Compiles the model midway."""

    def __init__(self, backend: str, **options: Any) -> None:
        self.backend, self.options = backend, options

    def __call__(self, run: Run) -> None:
        torch.compiler.reset()
        run.called = torch.compile(run.model, backend=self.backend, **self.options)  # type: ignore[assignment]


@pytest.mark.parametrize("kind", [Convolutional, Attention])
def test_model_compiled_midway_is_unchanged(kind: type[nn.Module], capsys: pytest.CaptureFixture[str]) -> None:
    assert_unchanged(capsys, steps=10, kind=kind, midway=Compiling("aot_eager"))


def test_model_compiled_ahead_is_unchanged(capsys: pytest.CaptureFixture[str]) -> None:
    assert_unchanged(capsys, steps=10, prepare=Compiling("aot_eager"))


def test_model_compiled_in_place_is_unchanged(capsys: pytest.CaptureFixture[str]) -> None:
    def compiled_in_place(run: Run) -> None:
        torch.compiler.reset()
        run.model.compile(backend="aot_eager")

    assert_unchanged(capsys, steps=10, midway=compiled_in_place)


def test_model_compiled_as_one_graph_is_unchanged(capsys: pytest.CaptureFixture[str]) -> None:
    """``fullgraph=True`` refuses graph breaks: a hook that breaks the graph would end the run."""
    assert_unchanged(capsys, steps=10, midway=Compiling("aot_eager", fullgraph=True))


def compiled_step(run: Run) -> None:
    """Compile the optimizer's step, as is recommended to fuse it."""
    torch.compiler.reset()
    (optimizer,) = run.optimizers
    step = optimizer.step

    @torch.compile(backend="aot_eager")
    def compiled() -> None:
        step()

    def loop(run: Run) -> Tensor:
        loss = run.loss()
        run.observe(loss)
        loss.backward()
        compiled()
        return loss

    run.loop = loop


@pytest.mark.parametrize("optimizers", [sgd, adam])
def test_compiled_optimizer_step_is_unchanged(
    optimizers: Callable[[nn.Module], list[Optimizer]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert_unchanged(capsys, steps=10, optimizers=optimizers, midway=compiled_step)


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))), reason="inductor needs a C++ compiler")
def test_model_compiled_by_inductor_is_unchanged(capsys: pytest.CaptureFixture[str]) -> None:
    assert_unchanged(capsys, steps=8, midway=Compiling("inductor"))


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def distribute(run: Run) -> None:
    run.called = nn.parallel.DistributedDataParallel(run.model, find_unused_parameters=True)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("moment", ["prepare", "midway"])
@pytest.mark.parametrize("optimizers", [sgd, muon_and_adamw])
def test_distributed_data_parallel_is_unchanged(
    moment: str, optimizers: Callable[[nn.Module], list[Optimizer]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert_unchanged(capsys, steps=20, optimizers=optimizers, **{moment: distribute})


@pytest.mark.parametrize("optimizers", [sgd, muon_and_adamw])
def test_two_sessions_on_one_model_change_nothing(optimizers: Callable[[nn.Module], list[Optimizer]]) -> None:
    unwatched = train(optimizers=optimizers, sessions=0, steps=30)
    watched = train(optimizers=optimizers, sessions=2, steps=30)
    assert_really_measured(watched, 30)
    assert differences(watched, unwatched) == []
    one, other = (session.latest for session in watched.sessions)
    timed = {"redline_overhead_ratio", "redline_monitoring_ratio", "redline_last_step_timestamp_seconds"}
    assert {series: value for series, value in one.values.items() if series.metric not in timed} == {
        series: value for series, value in other.values.items() if series.metric not in timed
    }


def test_two_runs_side_by_side_are_unchanged() -> None:
    def side_by_side(sessions: bool) -> list[Run]:
        seed()
        runs = [Run(Convolutional, sgd, plain), Run(Attention, muon_and_adamw, plain)]
        if sessions:
            for run in runs:
                exporter = redline.PrometheusExporter(port=0, every=3)
                run.sessions.append(attach(run, exporter, often()))
        for _ in range(30):
            for run in runs:
                run.step()
        for run in runs:
            for session in run.sessions:
                session.close()
        return runs

    for watched, unwatched in zip(side_by_side(True), side_by_side(False), strict=True):
        assert differences(watched, unwatched) == []
        (session,) = watched.sessions
        assert session.notes == ()
        assert session.latest.value("redline_steps_total") == 30
        assert session.latest.value("redline_measurements_total", monitor="GhostRadius") == 30
        assert set(session.latest.layers("redline_weight_spectral_norm")) == {
            name for name, parameter in watched.model.named_parameters() if parameter.dim() > 1
        }


# The comparison itself notices --------------------------------------------------------------------


class Meddling(redline.Monitor):
    """A monitor that breaks the law, once."""

    def __init__(self, meddle: Callable[[], Any]) -> None:
        super().__init__(lambda step: step == 1)
        self.meddle = meddle

    def measure(self, step: redline.Step, readings: redline.Readings) -> None:
        self.meddle()


def _nudge(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.reshape(-1)[:1] = torch.nextafter(tensor.reshape(-1)[:1], torch.tensor(float("inf")))


@pytest.mark.parametrize(
    ("changed", "meddle"),
    [
        ("parameters", lambda run: _nudge(run.model.head.weight)),
        ("buffers", lambda run: _nudge(run.model.normalization.running_mean)),
        ("gradients", lambda run: _nudge(run.model.head.weight.grad)),
        ("gradients", lambda run: setattr(run.model.head.bias, "grad", None)),
        ("optimizer state", lambda run: _nudge(run.optimizers[0].state[run.model.head.weight]["momentum_buffer"])),
        ("requires_grad", lambda run: run.model.unused.requires_grad_(False)),
        ("modes", lambda run: run.model.frozen[1].train()),
        ("torch's stream", lambda run: torch.rand(1)),
        ("numpy's stream", lambda run: np.random.rand()),  # noqa: NPY002 the run's own stream
        ("python's stream", lambda run: random.random()),
        ("settings", lambda run: torch.backends.mha.set_fastpath_enabled(False)),
    ],
)
def test_comparison_notices_a_monitor_that_meddles(changed: str, meddle: Callable[[Run], Any]) -> None:
    fast_path = torch.backends.mha.get_fastpath_enabled()
    seed()
    unwatched = Run(Convolutional, sgd, plain)
    for _ in range(3):
        unwatched.step()
    seed()
    watched = Run(Convolutional, sgd, plain)
    try:
        with redline.attach(watched.model, watched.optimizers, monitors=[Meddling(lambda: meddle(watched))]):
            for _ in range(3):
                watched.step()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    step, kinds = differences(watched, unwatched)[0]
    assert (step, changed) == (1, *[kind for kind in kinds if kind == changed])
