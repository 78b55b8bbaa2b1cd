"""What each controller costs on every step, against nothing, on the byte-level model; the clamp by method and samples.

    python benchmarks/controllers.py --write                      # 5 repetitions of 40 interleaved pairs
    python benchmarks/controllers.py --quick                      # a look
    python benchmarks/controllers.py --only UpdateClamp           # some of the cases

Published for one step of 12.6 ms (arXiv 2603.13552): +66 % by finite difference, +129 % by a Jacobian-vector product,
on the whole batch.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial

from frame import Benchmark, Page, Setting, median_and_spread
from pairs import Attach, Trainer, byte_level, measure

import redline
from redline.numerics.tangents import FINITE_DIFFERENCE

QUIET = "quiet run: "
_QUIET_TIMES = 10  # as many pairs: tangents are 20 steps apart there


def clamp(samples: int | None, *, difference: bool = False, **settings) -> Attach:
    """Attach a clamp alone; ``difference``: as if finite differences had been found to be what works."""

    def attach(trainer: Trainer) -> redline.Session:
        controllers = [redline.StepClamp(max_samples=samples, **settings)]
        session = redline.attach(trainer.model, trainer.optimizer, monitors=[], controllers=controllers)
        if difference:
            state = session.state_dict()
            session.load_state_dict({**state, "probe": {**state["probe"], "method": FINITE_DIFFERENCE}})
        return session

    return attach


def quietly(attach: Attach) -> Attach:
    """At a tenth of the rate, as at the end of a schedule: what a step costs does not depend on it, but r does."""

    def at_a_low_rate(trainer: Trainer) -> redline.Session:
        for group in trainer.optimizer.param_groups:
            group["lr"] /= 10
        return attach(trainer)

    return at_a_low_rate


def controllers(*made: Callable[[], redline.Controller]) -> Attach:
    return lambda trainer: redline.attach(
        trainer.model, trainer.optimizer, monitors=[], controllers=[one() for one in made]
    )


CASES: dict[str, Attach] = {
    "StepClamp (the default), from the start": clamp(32),
    "StepClamp, every step measured: forward mode, 32 samples": clamp(32, stale_after=1),
    "StepClamp, every step measured: finite difference, 32 samples": clamp(32, difference=True, stale_after=1),
    "StepClamp, every step measured: forward mode, whole batch": clamp(None, stale_after=1),
    "StepClamp, every step measured: finite difference, whole batch": clamp(None, difference=True, stale_after=1),
    "StepClamp, every step measured: exact radius, 32 samples": clamp(32, radius="exact", stale_after=1),
    "StepClamp, exact radius, 32 samples, every step searched": clamp(32, radius="exact", max_r=0.01),
    "StepClamp, exact radius, whole batch, every step searched": clamp(None, radius="exact", max_r=0.01),
    "StepClamp(max_r=0.2), near the redline": clamp(32, max_r=0.2),
    QUIET + "StepClamp (the default)": quietly(clamp(32)),
    QUIET + "StepClamp(max_r=0.2)": quietly(clamp(32, max_r=0.2)),
    "NonFiniteGuard": controllers(redline.NonFiniteGuard),
    "SpikeGuard": controllers(redline.SpikeGuard),
    "these three, at their defaults": controllers(redline.NonFiniteGuard, redline.SpikeGuard, redline.StepClamp),
    "RadiusLR, 32 samples (the default)": controllers(redline.RadiusLR),
    "UpdateClamp (the default), no matrix near its limit": controllers(redline.UpdateClamp),
    "UpdateClamp, every matrix over its limit": controllers(partial(redline.UpdateClamp, 1e-3)),
    'UpdateClamp(20, "fan"), which norms alone do not settle': controllers(partial(redline.UpdateClamp, 20, "fan")),
    "WeightDecayControl (the default)": controllers(redline.WeightDecayControl),
}


class Tangents:
    """Attaches as it is told to, and keeps the r of every tangent that is taken from then on."""

    def __init__(self, attach: Attach) -> None:
        self._attach, self.r = attach, []

    def __call__(self, trainer: Trainer) -> redline.Session:
        session = self._attach(trainer)
        take = session._probe.measure

        def counted(*args, **kwargs):
            taken = take(*args, **kwargs)
            if taken is not None:
                self.r.append(taken.normalized_step_size.detach())  # not waited for here: it would be timed
            return taken

        session._probe.measure = counted
        return session


def run(page: Page, options: argparse.Namespace) -> None:
    workload = byte_level(options.batch)
    page.text(
        f"ByteLM ({workload.parameters:,} parameters), batch {options.batch} x 64 bytes, AdamW, {options.device}; "
        f"{options.repeats} repetitions of {options.steps} interleaved pairs of steps, of a quiet run {_QUIET_TIMES} "
        "times as many, nothing trimmed. "
        f"Controllers are attached after 3 steps; in a quiet run after {options.warmup}, "
        "at a tenth of the rate from there on.",
        "Tangents and r are those of the controlled run: how many of its steps took one, and the median of what they "
        "told. Published, on the whole batch of another model: +129 % by a Jacobian-vector product, +66 % by a finite "
        "difference.",
    )
    page.table("controllers", "time over plain: median", "min – max", "plain step", "tangents", "median r")
    for name, attach in CASES.items():
        if options.only not in name:
            continue
        tangents, sums = Tangents(attach), []
        quiet = name.startswith(QUIET)
        pairs = options.steps * (_QUIET_TIMES if quiet else 1)
        for seed in range(options.repeats):
            seconds = measure(
                tangents,
                workload,
                seed,
                pairs=pairs,
                device=options.device,
                warmup=options.warmup if quiet else 3,
            )
            sums.append(seconds.sum(0).tolist())
        median, around = median_and_spread([controlled / plain - 1 for plain, controlled in sums], "+.1%")
        step = statistics.median(plain for plain, _ in sums) / pairs
        r = [float(one) for one in tangents.r]
        taken = f"{len(r)} in {options.repeats * pairs} steps"
        page.row(name, median, around, f"{step * 1e3:.1f} ms", taken, f"{statistics.median(r):.2f}" if r else "–")


benchmark = Benchmark(
    "controllers",
    "Cost of the controllers",
    run,
    {
        "repeats": Setting(5, 1, "repetitions"),
        "steps": Setting(40, 4, "pairs of steps in each"),
        "batch": Setting(128, 32, "sequences of 64 bytes"),
        "warmup": Setting(300, 30, "steps before a quiet run is measured"),
    },
    "half an hour",
)

if __name__ == "__main__":
    benchmark.main()
