"""What monitoring costs in time and memory: the default monitors at their default schedules against nothing.

    python benchmarks/overhead.py --write
    python benchmarks/overhead.py --quick

Two models of the same seed train on the same batches, one plain and one monitored, a step each in turn (the order turns
over from pair to pair). The ratio is the sum of all monitored steps over the sum of all plain ones, from the first step
on: nothing is trimmed, and the steps are whole periods of the schedules.
"""

import argparse
import contextlib
import gc
import multiprocessing
import os
import resource
import statistics
import types
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from frame import Benchmark, Page, Setting, spread
from pairs import Attach, Trainer, Workload, byte_batches, byte_level, measure
from resnet import ResNet, image_batches
from torch import Tensor

import redline
from redline.integrations.demo.models import ByteLM

PERIOD = 50  # steps from one time when all of the default monitors are due to the next


def monitors(*made: type[redline.Monitor]) -> Attach:
    return lambda trainer: redline.attach(trainer.model, trainer.optimizer, monitors=[one() for one in made])


def default(trainer: Trainer) -> redline.Session:
    return redline.attach(trainer.model, trainer.optimizer)


def clamp(trainer: Trainer) -> redline.Session:
    return redline.attach(trainer.model, trainer.optimizer, monitors=[], controllers=[redline.StepClamp()])


def full(trainer: Trainer) -> redline.Session:
    return redline.attach(
        trainer.model,
        trainer.optimizer,
        monitors=[*redline.default_monitors(), redline.LayerRadii()],
        controllers=[redline.StepClamp()],
        sinks=[redline.ConsoleReport(), redline.PrometheusExporter(port=0)],
    )


DEFAULT, FULL = "default monitors", "all monitors, StepClamp, console and Prometheus"
ALONE: dict[str, Attach] = {
    "WeightSpectrum, every 50": monitors(redline.WeightSpectrum),
    "UpdateSpectrum, every 50": monitors(redline.UpdateSpectrum),
    "GhostRadius, every 50": monitors(redline.GhostRadius),
    "LayerRadii, every 50": monitors(redline.LayerRadii),
    "StepHealth, every step": monitors(redline.StepHealth),
}


def interval(seconds: Tensor, draws: int = 2_000) -> tuple[float, float]:
    """Bootstrap 95 % interval of the ratio of sums; ``seconds``: ``(repetitions, pairs, 2)``.

    Pairs are drawn anew among those at which the same monitors are due: steps cost by what is due at them, and whole
    periods, the blocks that would keep this as well, are too few to draw from. Of ``n`` alike ``n - 1`` are drawn and
    stand for all, without which an interval over the few at which all are due would be too narrow (Rao & Wu, 1988).
    """
    pairs, due = seconds.flatten(0, 1), (torch.arange(seconds.shape[1]) % PERIOD == 0).repeat(len(seconds))
    generator, sums = torch.Generator().manual_seed(0), torch.zeros(draws, 2, dtype=pairs.dtype)
    for alike in (pairs[due], pairs[~due]):
        n = len(alike)
        if n < 2:
            sums += alike.sum(0)
            continue
        for draw in range(draws):
            drawn = torch.randint(n, (n - 1,), generator=generator)
            sums[draw] += alike[drawn].sum(0) * n / (n - 1)
    low, high = (sums[:, 1] / sums[:, 0]).quantile(torch.tensor([0.025, 0.975], dtype=pairs.dtype)).tolist()
    return low, high


def reachable(roots: list[object], stop: set[int]) -> Iterator[object]:
    """Every object reached from the roots, through no type, module, frame, globals or one of ``stop``."""
    seen, left = set(stop), list(roots)
    while left:
        one = left.pop()
        if id(one) in seen or isinstance(one, type | types.ModuleType | types.FrameType | types.CodeType):
            continue
        seen.add(id(one))
        yield one
        if isinstance(one, types.FunctionType):
            left += [one.__closure__, one.__defaults__, one.__kwdefaults__]
        else:
            left += gc.get_referents(one)


def kept_bytes(trainer: Trainer) -> int:
    """Bytes of tensors and arrays that a session holds, those of the model and the optimizer not counted."""
    model, optimizer = trainer.model, trainer.optimizer
    theirs = [*model.parameters(), *model.buffers()]
    theirs += [one.grad for one in model.parameters() if one.grad is not None]
    theirs += [one for state in optimizer.state.values() for one in state.values() if isinstance(one, Tensor)]
    sizes: dict[int, int] = {}
    stop = {id(one) for one in [trainer, optimizer, *model.modules(), *theirs]}
    for one in reachable([trainer.session], stop):
        if isinstance(one, Tensor):
            sizes[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        elif isinstance(one, np.ndarray) and one.base is None:
            sizes[one.ctypes.data] = one.nbytes
    for one in theirs:
        sizes.pop(one.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


def workloads(options: argparse.Namespace) -> dict[str, tuple[Workload, int, int]]:
    """Each with its pairs and its repetitions."""
    large = Workload(partial(ByteLM, options.width, options.layers, max(options.width // 64, 1)), byte_batches(4))
    return {
        f"ByteLM, batch {options.batch} x 64": (byte_level(options.batch), options.pairs, options.repeats),
        "ResNet, batch 64 x 3 x 32 x 32": (Workload(ResNet, image_batches(64)), options.pairs, 1),
        f"ByteLM of width {options.width}, {options.layers} layers, batch 4 x 64": (large, options.large, 1),
    }


def run(page: Page, options: argparse.Namespace) -> None:
    page.text(
        f"AdamW, {options.device}; pairs of steps, plain and monitored, interleaved, nothing trimmed. The interval is "
        "a bootstrap over pairs at which the same monitors are due. Kept: bytes of tensors that the session holds "
        "between steps, at the end, over those of the parameters."
    )
    page.table(
        "model", "parameters", "attached", "pairs", "time over plain", "95 % interval", "repetitions: min – max",
        "plain step", "kept / parameters",
    )  # fmt: skip
    for index, (model, (workload, pairs, repeats)) in enumerate(workloads(options).items()):
        for name, attach in {DEFAULT: default, FULL: full, "StepClamp": clamp, **(ALONE if index == 0 else {})}.items():
            if options.only not in f"{model}: {name}":
                continue
            kept: list[int] = []
            rounds = [
                _measured(attach, workload, seed, pairs, options.device, kept)
                for seed in range(repeats if name == DEFAULT else 1)
            ]
            seconds = torch.stack(rounds)
            plain, watched = seconds.sum((0, 1)).tolist()
            low, high = interval(seconds)
            page.row(
                model,
                f"{workload.parameters:,}",
                name,
                f"{len(rounds)} x {pairs}",
                f"{watched / plain:.4f}",
                f"{low:.4f} – {high:.4f}",
                spread([float(one[:, 1].sum() / one[:, 0].sum()) for one in rounds], ".4f"),
                f"{seconds[..., 0].median() * 1e3:.1f} ms",
                f"{statistics.median(kept) / 4 / workload.parameters:.3f}",
            )
    if not options.only:
        plain, watched = (peak_of_process(options, kind) for kind in (False, True))
        page.text(
            "",
            f"Peak memory of a whole process, ByteLM, 20 steps: {watched / 2**20:.1f} MiB with the default monitors, "
            f"{plain / 2**20:.1f} MiB plain (ratio {watched / plain:.3f}).",
        )


def _measured(attach: Attach, workload: Workload, seed: int, pairs: int, device: str, kept: list[int]) -> Tensor:
    def before_close(trainer: Trainer) -> None:
        kept.append(kept_bytes(trainer))

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        return measure(attach, workload, seed, pairs=pairs, device=device, before_close=before_close)


def peak_memory(batch: int, device: str, monitored: bool) -> int:
    """Peak bytes of this process after 20 steps."""
    workload, windows = byte_level(batch), torch.Generator().manual_seed(0)
    trainer = Trainer(workload.model, device)
    if monitored:
        trainer.session = default(trainer)
    for _ in range(20):
        trainer.step(*workload.batches(windows))
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts what the process was before it became this program
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_of_process(options: argparse.Namespace, monitored: bool) -> int:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak_memory, options.batch, options.device, monitored).result()


benchmark = Benchmark(
    "overhead",
    "Overhead of monitoring",
    run,
    {
        "repeats": Setting(5, 1, "repetitions of the default monitors on ByteLM"),
        "pairs": Setting(200, 10, "pairs of steps in each"),
        "large": Setting(100, 2, "pairs of steps of the large model"),
        "batch": Setting(128, 32, "sequences of 64 bytes, for the small ByteLM"),
        "width": Setting(768, 768, "of the large model"),
        "layers": Setting(12, 2, "of the large model"),
    },
    "an hour",
)

if __name__ == "__main__":
    benchmark.main()
