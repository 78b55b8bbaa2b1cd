"""Tune narrow, train wide: does what a sweep finds at the smallest width hold at the largest?

    python examples/width_transfer.py                  # all of it; about three hours on one core
    python examples/width_transfer.py --quick          # a few steps of everything, half a minute

A small LLaMA learns the bytes of Python's standard library at four widths, with AdamW, linear warm-up and decay. Rate
and weight decay are swept at every width, in units of the smallest: ``redline.scaling.transfer`` carries them over.
Then the best of the smallest width is held against the best of the sweep at the largest, and the top singular values of
both runs against one another. After arXiv 2510.15262.
"""

import argparse
import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path

import rich
import torch
import torch.nn.functional as F
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import redline
from redline.integrations.demo.data import byte_batch, library_bytes
from redline.integrations.demo.models import LlamaLM
from redline.scaling import classify, compare_spectra, transfer

WIDTHS = (32, 64, 128, 256)
RATES = (0.0075, 0.015, 0.03, 0.06)
DECAYS = (0.125, 0.25, 0.5, 1.0)
CONTEXT = 64


def train(width: int, lr: float, weight_decay: float, seed: int, options, *, scaled: bool = True) -> dict:
    """One run: its loss on held-out text, and the top singular values it ended with."""
    torch.manual_seed(seed)
    text = library_bytes()
    learned, held_out = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    model = LlamaLM(width, context=CONTEXT)
    base = WIDTHS[0] if scaled else width  # a rule that scales nothing, for comparison
    groups = transfer(model, base_width=base, width=width, lr=lr, weight_decay=weight_decay, show=False)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    warm_up = max(options.steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (options.steps - step) / (options.steps - warm_up))
    )
    windows = torch.Generator().manual_seed(1_000 + seed)
    last = [redline.WeightSpectrum(lambda step: step == options.steps - 1)]
    with redline.attach(model, optimizer, monitors=last) as session:
        for _ in range(options.steps):
            inputs, targets = byte_batch(learned, options.batch, CONTEXT, windows)
            loss_of(model, inputs, targets).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    with torch.no_grad():
        loss = loss_of(model, *byte_batch(held_out, options.held_out, CONTEXT, torch.Generator().manual_seed(1)))
    return {"loss": loss.item(), "spectra": session.latest.layers("redline_weight_spectral_norm")}


def loss_of(model: torch.nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def sweep(options, progress: Progress) -> dict[int, dict[tuple[float, float], list[dict]]]:
    """Runs of every width at every point, one a seed; what an earlier call has done is read, not repeated."""
    done = json.loads(options.runs.read_text()) if options.runs.exists() else {}
    cases = [
        (width, lr, decay, seed)
        for width in options.widths
        for lr in options.rates
        for decay in options.decays
        for seed in range(options.seeds)
    ]
    task = progress.add_task("Training", total=sum(width for width, *_ in cases))
    for width, lr, decay, seed in cases:
        key = f"steps {options.steps}, batch {options.batch}, width {width}, lr {lr:g}, wd {decay:g}, seed {seed}"
        if key not in done:
            done[key] = train(width, lr, decay, seed, options)
            options.runs.write_text(json.dumps(done))
        progress.advance(task, width)
    return {
        width: {
            (lr, decay): [
                done[
                    f"steps {options.steps}, batch {options.batch}, width {width}, lr {lr:g}, wd {decay:g}, seed {seed}"
                ]
                for seed in range(options.seeds)
            ]
            for lr in options.rates
            for decay in options.decays
        }
        for width in options.widths
    }


def mean_loss(runs: Iterable[dict]) -> float:
    return statistics.fmean(run["loss"] for run in runs)


def best(points: dict[tuple[float, float], list[dict]]) -> tuple[float, float]:
    """The point of the lowest mean loss; one that diverged is none."""
    return min(points, key=lambda point: mean_loss(points[point]) if math.isfinite(mean_loss(points[point])) else 1e9)


def show(found: dict[int, dict[tuple[float, float], list[dict]]], options) -> Table:
    carried = best(found[options.widths[0]])
    table = Table(title=f"Held-out loss after {options.steps} steps, mean of {options.seeds} seeds")
    for heading in (
        "width",
        "best of the sweep (lr, wd)",
        "its loss",
        "carried over from the smallest",
        "above the best",
    ):
        table.add_column(heading, justify="right")
    for width, points in found.items():
        top = best(points)
        lowest, transferred = mean_loss(points[top]), mean_loss(points[carried])
        table.add_row(
            str(width),
            f"{top[0]:g}, {top[1]:g}",
            f"{lowest:.4f}",
            f"{carried[0]:g}, {carried[1]:g}: {transferred:.4f}",
            f"{transferred / lowest - 1:+.2%}",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--widths", nargs="+", type=int, default=list(WIDTHS), help="smallest first (%(default)s)")
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES), help="at the smallest (%(default)s)")
    parser.add_argument("--decays", nargs="+", type=float, default=list(DECAYS), help="at the smallest (%(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="how many (%(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="of each run (%(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="windows of 64 bytes (%(default)s)")
    parser.add_argument("--held-out", type=int, default=256, help="windows to measure the loss on (%(default)s)")
    parser.add_argument("--runs", type=Path, default=Path("width_transfer.json"), help="to go on from (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="two widths, two rates, one decay, one seed, 20 steps")
    options = parser.parse_args()
    if options.quick:
        options.widths, options.rates, options.decays, options.seeds = [32, 64], [0.015, 0.03], [0.5], 1
        options.steps, options.held_out = 20, 32

    narrow, wide = options.widths[0], options.widths[-1]
    with Progress() as progress:
        found = sweep(options, progress)
    carried = best(found[narrow])
    transfer(LlamaLM(wide), base_width=WIDTHS[0], width=wide, lr=carried[0], weight_decay=carried[1])
    rich.print(show(found, options))
    unscaled = mean_loss(train(wide, *carried, seed, options, scaled=False) for seed in range(options.seeds))
    rich.print(f"The same at width {wide} with nothing scaled: {unscaled:.4f}.")
    matrices = [one.name for one in classify(LlamaLM(wide), wide).values() if one.kind == "matrix-like"]
    matrices.remove("head.weight")  # a readout grows in one dimension only
    rich.print(compare_spectra(*(found[width][carried][0]["spectra"] for width in (narrow, wide)), layers=matrices))


if __name__ == "__main__":
    main()
