"""What each controller costs on every step, against nothing, on the byte-level model; the clamp by method and samples.

    python benchmarks/controllers.py --write                      # 5 repetitions of 40 interleaved pairs, 20 minutes
    python benchmarks/controllers.py --repeats 1 --steps 10       # a quick look
    python benchmarks/controllers.py --only UpdateClamp           # some of the cases

Published for one step of 12.6 ms (arXiv 2603.13552): +66 % by finite difference, +129 % by a Jacobian-vector product,
on the whole batch.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from pairs import Trainer, measure

import redline
from redline.integrations.demo.machine import describe
from redline.integrations.demo.models import ByteLM
from redline.numerics.tangents import FINITE_DIFFERENCE

RESULTS = Path(__file__).parent / "results"


def clamp(samples: int | None, *, difference: bool = False, **settings) -> Callable[[Trainer], redline.Session]:
    """Attach a clamp alone; ``difference``: as if finite differences had been found to be what works."""

    def attach(trainer: Trainer) -> redline.Session:
        controllers = [redline.StepClamp(max_samples=samples, **settings)]
        session = redline.attach(trainer.model, trainer.optimizer, monitors=[], controllers=controllers)
        if difference:
            state = session.state_dict()
            session.load_state_dict({**state, "probe": {**state["probe"], "method": FINITE_DIFFERENCE}})
        return session

    return attach


def controllers(*made: Callable[[], redline.Controller]) -> Callable[[Trainer], redline.Session]:
    return lambda trainer: redline.attach(
        trainer.model, trainer.optimizer, monitors=[], controllers=[one() for one in made]
    )


CASES: dict[str, Callable[[Trainer], redline.Session]] = {
    "StepClamp, forward mode, 32 samples (the default)": clamp(32),
    "StepClamp, finite difference, 32 samples": clamp(32, difference=True),
    "StepClamp, forward mode, whole batch": clamp(None),
    "StepClamp, finite difference, whole batch": clamp(None, difference=True),
    "StepClamp, exact radius, 32 samples": clamp(32, radius="exact"),
    "StepClamp, exact radius, 32 samples, every step searched": clamp(32, radius="exact", max_r=0.01),
    "StepClamp, exact radius, whole batch, every step searched": clamp(None, radius="exact", max_r=0.01),
    "NonFiniteGuard": controllers(redline.NonFiniteGuard),
    "SpikeGuard": controllers(redline.SpikeGuard),
    "these three, at their defaults": controllers(redline.NonFiniteGuard, redline.SpikeGuard, redline.StepClamp),
    "RadiusLR, 32 samples (the default)": controllers(redline.RadiusLR),
    "UpdateClamp (the default), no matrix near its limit": controllers(redline.UpdateClamp),
    "UpdateClamp, every matrix over its limit": controllers(partial(redline.UpdateClamp, 1e-3)),
    'UpdateClamp(20, "fan"), which norms alone do not settle': controllers(partial(redline.UpdateClamp, 20, "fan")),
    "WeightDecayControl (the default)": controllers(redline.WeightDecayControl),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=128, help="sequences of 64 bytes (%(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--write", action="store_true", help="write the results file")
    options = parser.parse_args()

    lines = [
        "# Cost of the controllers",
        "",
        f"{describe()}.",
        "",
        f"ByteLM ({sum(p.numel() for p in ByteLM().parameters()):,} parameters), batch {options.batch} x 64 bytes, "
        f"AdamW, {options.device}, on every step; {options.repeats} repetitions of {options.steps} interleaved "
        "pairs of steps, nothing trimmed.",
        f"Command: `python benchmarks/controllers.py --repeats {options.repeats} --steps {options.steps} --write`. "
        "Published, on the whole batch of another model: +129 % by a Jacobian-vector product, +66 % by a finite "
        "difference.",
        "",
        "| controllers | time over plain: median | min – max | plain step |",
        "|---|---|---|---|",
    ]
    print("\n".join(lines))
    for name, attach in CASES.items():
        if options.only not in name:
            continue
        pairs = [
            measure(attach, seed, steps=options.steps, batch=options.batch, device=options.device)
            for seed in range(options.repeats)
        ]
        more = [controlled / plain - 1 for plain, controlled in pairs]
        step = statistics.median(plain for plain, _ in pairs) / options.steps
        spread = f"{min(more):+.1%} – {max(more):+.1%}"
        lines.append(f"| {name} | {statistics.median(more):+.1%} | {spread} | {step * 1e3:.1f} ms |")
        print(lines[-1], flush=True)
    if options.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"controllers_{options.device}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
