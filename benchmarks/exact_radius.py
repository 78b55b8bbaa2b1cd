"""What the exact radius of a whole batch costs: the least over 32 x 128 positions of 8,192 classes, in forward passes.

    python benchmarks/exact_radius.py --write          # 5 repetitions at two moments of training; two minutes
    python benchmarks/exact_radius.py --quick

A small LLaMA over pairs of bytes is trained a little; at its first step and after some, the logit tangent along
AdamW's update is taken, and the search is timed against the model's own forward pass on the same batch.
"""

import argparse
import math
import statistics
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from frame import Benchmark, Page, Setting, median_and_spread, timed
from torch import Tensor, nn

from redline.integrations.demo.data import library_bytes
from redline.integrations.demo.models import LlamaLM
from redline.numerics import LogitTangent, ghost_radius, least_ghost_radius, logit_tangent

CLASSES, BATCH, CONTEXT = 8_192, 32, 128


class PairLM(LlamaLM):
    """The demo's LLaMA with 8,192 classes."""

    def __init__(self, width: int = 256, layers: int = 4) -> None:
        super().__init__(width, layers, head_width=32, context=CONTEXT)
        self.embedding, self.head = nn.Embedding(CLASSES, width), nn.Linear(width, CLASSES, bias=False)


def windows(text: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pairs of bytes, hashed to the classes, and those that follow them."""
    pairs = (text[:-1:2].long() * 257 + text[1::2].long()) * 40_503 % 65_536 % CLASSES
    starts = torch.randint(len(pairs) - CONTEXT - 1, (BATCH,), generator=generator)
    cut = torch.stack([pairs[start : start + CONTEXT + 1] for start in starts])
    return cut[:, :-1], cut[:, 1:]


def tangents(device: str, moments: list[int]) -> dict[int, tuple[nn.Module, Tensor, LogitTangent]]:
    """At each of these steps of training: the model, its inputs, and the tangent along the step."""
    torch.manual_seed(0)
    model, text, generator = PairLM().to(device), library_bytes()[:4_000_000], torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = {}
    for step in range(max(moments) + 1):
        inputs, targets = (one.to(device) for one in windows(text, generator))
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step in moments:
            update = {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}
            found[step] = model, inputs, logit_tangent(model, [inputs], {}, update, parameters=before)
    return found


def compare(
    model: nn.Module, inputs: Tensor, search: Callable[[], object], repeats: int, device: str
) -> list[tuple[float, float]]:
    """Seconds of a forward pass and of a search, in turn."""
    with torch.no_grad():
        return [(timed(lambda: model(inputs), device)[0], timed(search, device)[0]) for _ in range(repeats)]


def run(page: Page, options: argparse.Namespace) -> None:
    size = sum(parameter.numel() for parameter in PairLM().parameters())
    page.text(
        f"LLaMA of {size:,} parameters, {BATCH} x {CONTEXT} positions, {CLASSES:,} classes, {options.device}; forward "
        f"pass without gradients. {options.repeats} repetitions, a forward pass and a search in turn, nothing trimmed."
    )
    page.table("step", "search", "in forward passes: median", "min – max", "forward pass", "rho* / rho_a", "searched")
    for step, (model, inputs, taken) in tangents(options.device, options.moments).items():
        least = least_ghost_radius(taken.logits, taken.tangent)
        bound = ghost_radius(taken.tangent).min()
        for name, within in {"the least of all": math.inf, "none within 0.9 of it": 0.9 * least.upper.item()}.items():
            if options.only not in name:
                continue
            search = partial(least_ghost_radius, taken.logits, taken.tangent, within=within)
            times = compare(model, inputs, search, options.repeats, options.device)
            forward = statistics.median(forward for forward, _ in times)
            page.row(
                f"{step}",
                name,
                *median_and_spread([search_time / forward for forward, search_time in times], ".2f"),
                f"{forward * 1e3:.0f} ms",
                f"{least.upper.item() / bound:.2f}",
                f"{int((~search().radii.isnan()).sum())} of {BATCH * CONTEXT:,}",
            )


benchmark = Benchmark(
    "exact_radius",
    "Cost of the exact radius",
    run,
    {
        "repeats": Setting(5, 1, "repetitions"),
        "moments": Setting([0, 30], [0], "steps of training at which to measure"),
    },
    "two minutes",
)

if __name__ == "__main__":
    benchmark.main()
