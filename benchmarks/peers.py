"""Other tools that watch a training, side by side with Redline on one model: what they measure, and what a call costs.

    pip install -c constraints.txt -r benchmarks/requirements.txt
    python benchmarks/peers.py --write                 # 5 repetitions of everything in turn
    python benchmarks/peers.py --only weightwatcher    # one of them

A peer that is not installed, or does not run, has a row that says so.
"""

import argparse
import contextlib
import importlib
import io
import logging
import math
import os
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from frame import Benchmark, Page, Setting, median_and_spread, timed
from pairs import Trainer, Workload, byte_level
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import redline
from redline.numerics import top_singular_values

SAMPLES = 32  # what GhostRadius takes of a batch; those that need several passes get as many


@dataclass
class Bench:
    """What every case is given: a training of its own, a batch, and where to say how good its answer is.

    Attributes:
        workload: what is trained.
        trainer: after a few steps.
        inputs, targets: the next batch, on the device.
        answer: what a case found, to be compared: sigma_1 by parameter name, or the Hessian's top eigenvalue.
    """

    workload: Workload
    trainer: Trainer
    inputs: Tensor
    targets: Tensor
    answer: dict[str, float] | float | None = None

    @property
    def some(self) -> tuple[Tensor, Tensor]:
        return self.inputs[:SAMPLES], self.targets[:SAMPLES]

    def step(self) -> None:
        self.trainer.step(self.inputs, self.targets)

    def matrices(self) -> dict[str, Tensor]:
        return {name: one.detach() for name, one in self.trainer.model.named_parameters() if one.dim() == 2}


def loss_of(output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, -2), targets.flatten())


Call = Callable[[], object]
Prepare = Callable[[Bench], Call]


def plain(bench: Bench) -> Call:
    return bench.step


def redline_step(bench: Bench) -> Call:
    monitors = [kind(every=1) for kind in (redline.WeightSpectrum, redline.UpdateSpectrum, redline.GhostRadius)]
    trainer = bench.trainer
    trainer.session = redline.attach(trainer.model, trainer.optimizer, monitors=[*monitors, redline.StepHealth()])
    return bench.step


def redline_health(bench: Bench) -> Call:
    trainer = bench.trainer
    trainer.session = redline.attach(trainer.model, trainer.optimizer, monitors=[redline.StepHealth()])
    return bench.step


def redline_spectra(bench: Bench) -> Call:
    matrices = bench.matrices()
    state = top_singular_values(list(matrices.values())).state
    for _ in range(10):  # so that it is as warm as within a run
        bench.step()

    def call() -> None:
        sigma = top_singular_values(list(matrices.values()), state).sigma
        bench.answer = dict(zip(matrices, sigma.tolist(), strict=True))

    return call


def weightwatcher(bench: Bench) -> Call:
    module = importlib.import_module("weightwatcher")
    logging.getLogger("weightwatcher").setLevel(logging.ERROR)

    def call() -> None:
        details = module.WeightWatcher(model=bench.trainer.model).analyze()
        names = [f"{name}.weight" for name in details["longname"]]
        # its spectral norm is that of W^T W
        bench.answer = dict(zip(names, np.sqrt(details["spectral_norm"].to_numpy(float)).tolist(), strict=True))

    return call


def curvlinops(bench: Bench) -> Call:
    module, linalg = (importlib.import_module(name) for name in ("curvlinops", "scipy.sparse.linalg"))
    parameters = dict(bench.trainer.model.named_parameters())

    def call() -> None:
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            operator = module.HessianLinearOperator(
                bench.trainer.model, _Loss(), list(parameters.values()), [bench.some], check_deterministic=False
            )
            scipy = operator.to_scipy()
            start = np.random.default_rng(0).standard_normal(scipy.shape[0]).astype(scipy.dtype)
            [bench.answer] = linalg.eigsh(
                scipy, k=1, which="LA", tol=1e-3, v0=start, return_eigenvectors=False
            ).tolist()

    return call


def pyhessian(bench: Bench) -> Call:
    module = importlib.import_module("pyhessian")

    def call() -> None:
        with sdpa_kernel(SDPBackend.MATH):
            found = module.hessian(bench.trainer.model, _Loss(), data=bench.some, cuda=bench.inputs.is_cuda)
            bench.answer = float(found.eigenvalues(top_n=1)[0][0])
        bench.trainer.optimizer.zero_grad()

    return call


def hessian_eigenthings(bench: Bench) -> Call:
    module = importlib.import_module("hessian_eigenthings")

    def call() -> None:
        with sdpa_kernel(SDPBackend.MATH):
            operator = module.HessianOperator(bench.trainer.model, [bench.some], module.supervised_loss(loss_of))
            bench.answer = float(module.lanczos(operator, k=1, which="LA", max_iter=30).eigenvalues[0])

    return call


def delve(bench: Bench) -> Call:
    module = importlib.import_module("delve")
    folder = tempfile.mkdtemp()
    tracker = module.SaturationTracker(
        str(Path(folder) / "delve"), "csv", bench.trainer.model, stats=["lsat"], device=bench.inputs.device.type
    )

    def call() -> None:
        bench.step()
        tracker.add_saturations()

    return call


def wandb(bench: Bench) -> Call:
    module = importlib.import_module("wandb")
    os.environ["WANDB_SILENT"] = "true"
    run = module.init(mode="offline", dir=tempfile.mkdtemp(), project="benchmark")
    run.watch(bench.trainer.model, log="all", log_freq=1)

    def call() -> None:
        bench.step()
        run.log({"step": 1})

    return call


def cockpit(bench: Bench) -> Call:
    module, quantities = (importlib.import_module(name) for name in ("cockpit", "cockpit.quantities"))
    every = importlib.import_module("cockpit.utils.schedules").linear(1)
    trainer = bench.trainer
    kinds = (quantities.Loss, quantities.GradNorm, quantities.UpdateSize, quantities.Distance, quantities.Parameters)
    tracker = module.Cockpit(list(trainer.model.parameters()), [kind(every) for kind in kinds[:4]])
    steps = iter(range(1_000_000))

    def call() -> None:
        losses = F.cross_entropy(trainer.model(bench.inputs).flatten(0, -2), bench.targets.flatten(), reduction="none")
        loss = losses.mean()
        info = {"batch_size": len(losses), "individual_losses": losses, "loss": loss, "optimizer": trainer.optimizer}
        with tracker(next(steps), info=info):
            loss.backward(create_graph=tracker.create_graph(0))
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    return call


class _Loss(nn.CrossEntropyLoss):
    """Over positions."""

    def forward(self, output: Tensor, targets: Tensor) -> Tensor:
        return super().forward(output.flatten(0, -2), targets.flatten())


@dataclass(frozen=True)
class Case:
    """One tool: how it is called, and what it measures; ``package``: as in requirements.txt, None for Redline's own."""

    prepare: Prepare
    measures: str
    package: str | None = None


PLAIN = "plain step"
HESSIAN = f"top Hessian eigenvalue of the loss on {SAMPLES} samples"
CASES = {
    PLAIN: Case(plain, "nothing"),
    "Redline, a step on which all default monitors are due": Case(
        redline_step, f"sigma_1 of weights and updates, r on {SAMPLES} samples, loss, norms, rates"
    ),
    "Redline, a step with StepHealth": Case(redline_health, "loss, gradient norm, rates, what is not finite"),
    "Redline, a warm tick of top_singular_values": Case(redline_spectra, "sigma_1 of every weight matrix"),
    "weightwatcher, analyze()": Case(
        weightwatcher, "whole spectrum of every layer's weights, power-law fits", "weightwatcher"
    ),
    "curvlinops, Hessian and scipy's eigsh(tol=1e-3)": Case(curvlinops, HESSIAN, "curvlinops-for-pytorch"),
    "pyhessian, eigenvalues()": Case(pyhessian, HESSIAN, "pyhessian"),
    "hessian-eigenthings, lanczos(max_iter=30)": Case(hessian_eigenthings, HESSIAN, "hessian-eigenthings"),
    "delve, a step with layer saturation": Case(
        delve, "covariance of every layer's outputs, its rank by explained variance", "delve"
    ),
    "wandb.watch(log='all', log_freq=1), a step, offline": Case(
        wandb, "histograms of every parameter and gradient", "wandb"
    ),
    "cockpit, a step with loss, gradient norm, update size, distance": Case(
        cockpit, "loss, norms of gradient and update, distance from the start", "cockpit-for-pytorch"
    ),
}


def exact_spectra(bench: Bench) -> dict[str, float]:
    return {name: torch.linalg.svdvals(one.double())[0].item() for name, one in bench.matrices().items()}


def exact_curvature(bench: Bench, iterations: int) -> float:
    """The Hessian's top eigenvalue by Lanczos in float64, with all vectors kept and made orthogonal again."""
    trainer = bench.trainer
    model = bench.workload.model().to(bench.inputs.device).double()
    model.load_state_dict({name: one.double() for name, one in trainer.model.state_dict().items()})
    parameters = list(model.parameters())
    inputs, targets = bench.some
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    with sdpa_kernel(SDPBackend.MATH):
        gradients = torch.autograd.grad(loss_of(model(inputs), targets), parameters, create_graph=True)
        gradient = torch.cat([one.flatten() for one in gradients])
        generator = torch.Generator().manual_seed(0)
        vector = torch.randn(len(gradient), dtype=torch.float64, generator=generator).to(gradient.device)
        basis, diagonal, beside = [vector / vector.norm()], [], []
        for _ in range(iterations):
            product = torch.autograd.grad(gradient, parameters, basis[-1].view_as(gradient), retain_graph=True)
            vector = torch.cat([one.flatten() for one in product])
            diagonal.append(vector @ basis[-1])
            kept = torch.stack(basis)
            for _ in range(2):
                vector = vector - kept.T @ (kept @ vector)
            beside.append(vector.norm())
            basis.append(vector / beside[-1])
    middle, side = torch.stack(diagonal), torch.stack(beside[:-1])
    return torch.linalg.eigvalsh(torch.diag(middle) + torch.diag(side, 1) + torch.diag(side, -1))[-1].item()


@dataclass
class Taken:
    """One case's times and errors."""

    case: Case
    bench: Bench
    call: Call | None = None
    seconds: list[float] = field(default_factory=list)
    reason: str = ""


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """Peers print and warn."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def run(page: Page, options: argparse.Namespace) -> None:
    workload, pins = byte_level(options.batch), _pins()
    page.text(
        f"ByteLM ({workload.parameters:,} parameters), batch {options.batch} x 64 bytes, AdamW, {options.device}, "
        f"after {options.warmup} steps of training; {options.repeats} repetitions of all in turn, after one untimed, "
        "nothing trimmed. A step is timed with what the tool adds to it; anything else is a call between steps. Errors "
        "are against float64: singular values of every matrix (the largest relative error), or the Hessian's largest "
        "eigenvalue, algebraically, by Lanczos; pyhessian takes the largest in magnitude."
    )
    taken: dict[str, Taken] = {}
    for name, case in CASES.items():
        if options.only in name or name == PLAIN:
            _show(f"{name}: once, untimed")
            windows = torch.Generator().manual_seed(0)
            trainer = Trainer(workload.model, options.device)
            for _ in range(options.warmup):
                trainer.step(*workload.batches(windows))
            batch = [one.to(options.device) for one in workload.batches(windows)]
            taken[name] = _prepared(case, Bench(workload, trainer, *batch), pins)
    for repeat in range(options.repeats):
        _show(f"repetition {repeat + 1} of {options.repeats}")
        for one in taken.values():
            if one.call is not None:
                with unheard():
                    one.seconds.append(timed(one.call, options.device)[0])

    @cache  # those that ask are in the same state: the same seed, batches and steps
    def curvature() -> float:
        _show("the Hessian's largest eigenvalue in float64")
        one = next(one.bench for one in taken.values() if isinstance(one.bench.answer, float))
        return exact_curvature(one, options.iterations)

    steps = taken[PLAIN].seconds
    page.table("tool", "measures", "ms: median", "min – max", "over the plain step: median", "relative error")
    for name, one in taken.items():
        if one.call is None:
            page.row(name, one.case.measures, "–", "–", "–", one.reason)
            continue
        page.row(
            name,
            one.case.measures,
            *median_and_spread([1e3 * seconds for seconds in one.seconds], ".1f"),
            f"{statistics.median(seconds / step for seconds, step in zip(one.seconds, steps, strict=True)):.2f}",
            _error(one.bench, curvature),
        )
        if one.bench.trainer.session is not None:
            one.bench.trainer.session.close()


def _show(text: str) -> None:
    print(f"... {text}", file=sys.stderr, flush=True)


def _pins() -> dict[str, str]:
    """Pinned requirement by package name, those commented out among them."""
    lines = (Path(__file__).parent / "requirements.txt").read_text().splitlines()
    pinned = [line.lstrip("# ").split()[0] for line in lines if "==" in line]
    return {pin.split("==")[0]: pin for pin in pinned}


def _prepared(case: Case, bench: Bench, pins: dict[str, str]) -> Taken:
    try:
        with unheard():
            call = case.prepare(bench)
            call()
    except ModuleNotFoundError as error:
        if case.package is None:
            raise
        return Taken(case, bench, reason=f"not installed ({error.name}): pip install {pins[case.package]}")
    except Exception as error:
        if case.package is None:
            raise
        return Taken(case, bench, reason=f"does not run: {type(error).__name__}: {str(error).splitlines()[0][:200]}")
    return Taken(case, bench, call)


def _error(bench: Bench, curvature: Callable[[], float]) -> str:
    if bench.answer is None:
        return "–"
    if isinstance(bench.answer, dict):
        exact = exact_spectra(bench)
        errors = [abs(found / exact[name] - 1) for name, found in bench.answer.items() if name in exact]
        return f"{max(errors, default=math.nan):.1e} ({len(errors)} matrices)"
    return f"{abs(bench.answer / curvature() - 1):.1e}"


benchmark = Benchmark(
    "peers",
    "Redline beside other tools",
    run,
    {
        "repeats": Setting(5, 1, "repetitions of each"),
        "batch": Setting(128, 32, "sequences of 64 bytes"),
        "warmup": Setting(100, 5, "steps of training before"),
        "iterations": Setting(100, 40, "of Lanczos, for the Hessian's eigenvalue that others are compared with"),
    },
    "a quarter of an hour with all peers installed",
)

if __name__ == "__main__":
    benchmark.main()
