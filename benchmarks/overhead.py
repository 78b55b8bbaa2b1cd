"""What monitoring costs: the default monitors at their default schedules against nothing, on the byte-level model.

    python benchmarks/overhead.py                     # 5 repetitions of 200 interleaved pairs of steps, some 6 minutes
    python benchmarks/overhead.py --repeats 1 --steps 50 --batch 32    # a quick look

Two models of the same seed train on the same batches, one plain and one monitored, a step each in turn (the order turns
over from pair to pair). A repetition's ratio is the sum of all monitored steps over the sum of all plain ones, from the
first step on: nothing is trimmed. Results go to benchmarks/results/.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from pairs import Trainer, measure

import redline
from redline.integrations.demo.data import byte_batch, library_bytes
from redline.integrations.demo.machine import describe
from redline.integrations.demo.models import ByteLM

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=128, help="sequences of 64 bytes (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--write", action="store_true", help="write the results file")
    parser.add_argument("--peak", choices=("plain", "monitored"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(peak_memory(options, monitored=options.peak == "monitored"))
        return

    stacks: dict[str, Callable[[], list[redline.Monitor]]] = {
        "all four (the default)": redline.default_monitors,
        "WeightSpectrum, every 50": lambda: [redline.WeightSpectrum()],
        "UpdateSpectrum, every 50": lambda: [redline.UpdateSpectrum()],
        "GhostRadius, every 10": lambda: [redline.GhostRadius()],
        "StepHealth, every step": lambda: [redline.StepHealth()],
    }
    lines = [
        "# Overhead of monitoring",
        "",
        f"{describe()}.",
        "",
        f"ByteLM ({sum(p.numel() for p in ByteLM().parameters()):,} parameters), batch {options.batch} x 64 bytes, "
        f"AdamW, {options.device}; repetitions of {options.steps} interleaved pairs of steps, nothing trimmed.",
        f"Command: `python benchmarks/overhead.py --batch {options.batch} --write`.",
        "",
        "| monitors | repetitions | time over plain: median | min – max | plain step |",
        "|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    for name, monitors in stacks.items():
        repeats = options.repeats if monitors is redline.default_monitors else 1
        pairs = [
            measure(
                lambda trainer, monitors=monitors: redline.attach(
                    trainer.model, trainer.optimizer, monitors=monitors()
                ),
                seed,
                steps=options.steps,
                batch=options.batch,
                device=options.device,
            )
            for seed in range(repeats)
        ]
        ratios = [watched / plain for plain, watched in pairs]
        step = statistics.median(plain for plain, _ in pairs) / options.steps
        spread = f"{min(ratios):.4f} – {max(ratios):.4f}"
        lines.append(f"| {name} | {repeats} | {statistics.median(ratios):.4f} | {spread} | {step * 1e3:.1f} ms |")
        print(lines[-1], flush=True)
    plain, watched = (peak_of_process(options, kind) for kind in ("plain", "monitored"))
    lines += [
        "",
        f"Peak memory of a whole process, 20 steps: {watched / 2**20:.0f} MiB monitored, {plain / 2**20:.0f} MiB plain "
        f"(ratio {watched / plain:.3f}). Between steps no copy of a parameter is kept (tests/core/test_session.py).",
    ]
    print("\n".join(lines[-2:]))
    if options.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"overhead_{options.device}.md").write_text("\n".join(lines) + "\n")


def peak_memory(options: argparse.Namespace, *, monitored: bool) -> int:
    """Peak bytes of this process after 20 steps."""
    import resource

    trainer, text, windows = Trainer(options.device, 0), library_bytes(), torch.Generator().manual_seed(0)
    if monitored:
        trainer.session = redline.attach(trainer.model, trainer.optimizer)
    for _ in range(20):
        trainer.step(*byte_batch(text, options.batch, 64, windows))
    if options.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_of_process(options: argparse.Namespace, kind: str) -> int:
    command = [sys.executable, __file__, "--peak", kind, "--batch", str(options.batch), "--device", options.device]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()
