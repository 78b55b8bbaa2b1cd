"""How the cost of monitoring grows with a model: against its parameters, by width, and against its layers.

    python benchmarks/growth.py --write
    python benchmarks/growth.py --quick

At each size: a plain step, a warm call for the top singular values of the block matrices, and what the default monitors
add to a step. Exponents are of a least-squares line through the logarithms.
"""

import argparse
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from frame import Benchmark, Page, Setting, median_and_spread, timed
from pairs import Trainer, Workload, byte_batches, measure

import redline
from redline.integrations.demo.models import ByteLM
from redline.numerics import top_singular_values


def spectral_tick(workload: Workload, device: str, repeats: int) -> list[float]:
    """Seconds of warm calls, a step of training between one and the next."""
    trainer, windows = Trainer(workload.model, device), torch.Generator().manual_seed(0)
    matrices = [one for name, one in trainer.model.named_parameters() if "blocks" in name and one.dim() == 2]
    state, seconds = None, []
    for _ in range(repeats + 1):
        trainer.step(*workload.batches(windows))
        taken, found = timed(partial(top_singular_values, matrices, state, tolerance=1e-4), device)
        state = found.state
        seconds.append(taken)
    return seconds[1:]  # the first was the cold call that makes the others warm


def exponent(sizes: list[float], times: list[float]) -> str:
    """``a`` of ``t ~ size^a``; a time that is not above 0 has none."""
    if len(sizes) < 2 or min(times) <= 0:
        return "–"
    return f"{np.polyfit(np.log(sizes), np.log(times), 1)[0]:.2f}"


def grow(page: Page, options: argparse.Namespace, sizes: list[int], model: Callable[[int], ByteLM], by: str) -> None:
    page.table(
        by, "parameters", "plain step", "warm spectra: median", "min – max", "in plain steps", "monitors add, a step",
        "time over plain",
    )  # fmt: skip
    against, plain_times, ticks, added = [], [], [], []
    for size in sizes:
        workload = Workload(partial(model, size), byte_batches(options.batch))
        seconds = measure(
            lambda trainer: redline.attach(trainer.model, trainer.optimizer),
            workload,
            0,
            pairs=options.pairs,
            device=options.device,
        )
        plain, watched = (seconds.sum(0) / len(seconds)).tolist()
        tick = spectral_tick(workload, options.device, options.repeats)
        against.append(size if by == "layers" else workload.parameters)
        plain_times.append(plain)
        ticks.append(float(np.median(tick)))
        added.append(watched - plain)
        page.row(
            str(size),
            f"{workload.parameters:,}",
            f"{plain * 1e3:.1f} ms",
            *(f"{text} ms" for text in median_and_spread([one * 1e3 for one in tick], ".1f")),
            f"{ticks[-1] / plain:.2f}",
            f"{added[-1] * 1e3:.2f} ms",
            f"{watched / plain:.4f}",
        )
    unit = "layers" if by == "layers" else "parameters"
    page.text(
        "",
        f"Exponents against {unit}: plain step {exponent(against, plain_times)}, warm spectra "
        f"{exponent(against, ticks)}, what the monitors add {exponent(against, added)}.",
    )


def run(page: Page, options: argparse.Namespace) -> None:
    page.text(
        f"ByteLM, batch {options.batch} x 64 bytes, AdamW, {options.device}; {options.pairs} interleaved pairs of "
        f"steps with the default monitors, their first, cold, measurement among them, and {options.repeats} warm calls "
        "for the top singular values of the block matrices (tolerance 1e-4), a step of training apart; nothing trimmed."
    )  # fmt: skip
    if options.only in "width":
        grow(page, options, options.widths, lambda width: ByteLM(width, 2, width // 32), "width (2 layers)")
    if options.only in "layers":
        grow(page, options, options.layers, lambda layers: ByteLM(options.width, layers), "layers")


benchmark = Benchmark(
    "growth",
    "Growth of the cost with the model",
    run,
    {
        "widths": Setting([128, 192, 256, 384, 512], [64, 128], "multiples of 32"),
        "layers": Setting([1, 2, 4, 8, 16], [1, 2], "numbers of layers"),
        "width": Setting(192, 64, "of the models of several layers; a multiple of 4"),
        "pairs": Setting(50, 2, "pairs of steps, a whole period of the schedules"),
        "repeats": Setting(5, 2, "warm calls"),
        "batch": Setting(32, 4, "sequences of 64 bytes"),
    },
    "ten minutes",
)

if __name__ == "__main__":
    benchmark.main()
