"""Write the plan for 7 B parameters on 64 devices into docs/scale.md: ``python docs/render_scale.py``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from scale_plan import Message, every_step, frobenius_norms, seconds, spectra, tangent, update_norms

PAGE = Path(__file__).with_name("scale.md")
BEGIN, END = "<!-- written by render_scale.py: begin -->\n", "<!-- written by render_scale.py: end -->\n"

WIDTH, HIDDEN, LAYERS, VOCABULARY, RANKS = 4096, 11008, 32, 32000, 64
BANDWIDTH, LATENCY = 50e9, 20e-6  # bytes a second of one device between machines (400 Gb/s); seconds a message and hop
ROUNDS = 6  # of a warm call on an accelerator

BLOCK = [(WIDTH, WIDTH)] * 4 + [(HIDDEN, WIDTH)] * 2 + [(WIDTH, HIDDEN)]
MATRICES = BLOCK * LAYERS + [(VOCABULARY, WIDTH)] * 2
VECTORS = 2 * LAYERS + 1
PARAMETERS = sum(rows * columns for rows, columns in MATRICES) + VECTORS * WIDTH
TENSORS = len(MATRICES) + VECTORS


def tick(*, sharded: bool) -> list[tuple[str, list[Message]]]:
    """What the default monitors send, by when."""
    spectrum = spectra(MATRICES, [ROUNDS] * len(MATRICES), sharded=sharded, watched=False)
    return [
        ("each step", every_step(sharded=sharded)),
        ("each 50th: `GhostRadius`", [
            *update_norms(TENSORS),
            *tangent(PARAMETERS, TENSORS, LAYERS + 1, RANKS, sharded=sharded),
        ]),
        ("each 50th: `UpdateSpectrum`", spectrum),
        ("each 50th: `WeightSpectrum`", [*spectrum, *frobenius_norms(len(MATRICES))]),
    ]  # fmt: skip


def render() -> str:
    """What stands between the marks."""
    lines = [
        f"{PARAMETERS / 1e9:.2f} billion parameters in {TENSORS} tensors, {len(MATRICES)} of them matrices; "
        f"{LAYERS + 1} units; {RANKS} devices, {BANDWIDTH / 1e9:.0f} GB/s for each between machines, "
        f"{LATENCY * 1e6:.0f} µs a message and hop.\n",
        "| when | messages, DDP | one rank sends | takes | messages, `fully_shard` | one rank sends | takes |",
        "|---|---|---|---|---|---|---|",
    ]
    for (when, whole), (_, parts) in zip(tick(sharded=False), tick(sharded=True), strict=True):
        cells = [when]
        for messages in (whole, parts):
            sent = sum(one.on_the_wire(RANKS) for one in messages)
            taken = seconds(messages, RANKS, BANDWIDTH, LATENCY)
            cells += [str(sum(one.count for one in messages)), _bytes(sent), f"{taken * 1e3:,.1f} ms"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def page() -> str:
    """The page with the plan in it."""
    before, rest = PAGE.read_text().split(BEGIN)
    return before + BEGIN + render() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page())
