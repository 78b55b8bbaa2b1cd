"""What the exact radius of a whole batch costs: the least over 32 x 128 positions of 8,192 classes, in forward passes.

    python benchmarks/exact_radius.py --write          # 5 repetitions at two moments of training; two minutes
    python benchmarks/exact_radius.py --repeats 1      # a quick look

A small LLaMA over pairs of bytes is trained a little; at its first step and after some, the logit tangent along
AdamW's update is taken, and the search is timed against the model's own forward pass on the same batch.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redline.integrations.demo.data import library_bytes
from redline.integrations.demo.machine import describe
from redline.integrations.demo.models import LlamaLM
from redline.numerics import LogitTangent, ghost_radius, least_ghost_radius, logit_tangent

RESULTS = Path(__file__).parent / "results"
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


def seconds(action: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    action()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def compare(
    model: nn.Module, inputs: Tensor, search: Callable[[], object], repeats: int, device: str
) -> list[tuple[float, float]]:
    """Seconds of a forward pass and of a search, in turn."""
    with torch.no_grad():
        return [(seconds(lambda: model(inputs), device), seconds(search, device)) for _ in range(repeats)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--moments", type=int, nargs="+", default=[0, 30], help="steps of training (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--write", action="store_true", help="write the results file")
    options = parser.parse_args()
    size = sum(parameter.numel() for parameter in PairLM().parameters())
    lines = [
        "# Cost of the exact radius",
        "",
        f"{describe()}.",
        "",
        f"LLaMA of {size:,} parameters, {BATCH} x {CONTEXT} positions, {CLASSES:,} classes, {options.device}; forward "
        f"pass without gradients. {options.repeats} repetitions, a forward pass and a search in turn, nothing trimmed.",
        f"Command: `python benchmarks/exact_radius.py --repeats {options.repeats} --write`.",
        "",
        "| step | search | in forward passes: median | min – max | forward pass | rho* / rho_a | searched |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    for step, (model, inputs, taken) in tangents(options.device, options.moments).items():
        least = least_ghost_radius(taken.logits, taken.tangent)
        bound = ghost_radius(taken.tangent).min()
        cleared = 0.9 * least.upper.item()
        for name, within in {"the least of all": math.inf, "none within 0.9 of it": cleared}.items():
            search = partial(least_ghost_radius, taken.logits, taken.tangent, within=within)
            times = compare(model, inputs, search, options.repeats, options.device)
            ratios = [search_time / forward for forward, search_time in times]
            forward = statistics.median(forward for forward, _ in times)
            searched = int((~search().radii.isnan()).sum())
            lines.append(
                f"| {step} | {name} | {statistics.median(ratios):.2f} | {min(ratios):.2f} – {max(ratios):.2f} | "
                f"{forward * 1e3:.0f} ms | {least.upper.item() / bound:.2f} | {searched} of {BATCH * CONTEXT:,} |"
            )
            print(lines[-1], flush=True)
    if options.write:
        (RESULTS / f"exact_radius_{options.device}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
