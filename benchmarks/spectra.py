"""Top singular values of a decoder's block matrices in training: Redline's warm estimate beside what else there is.

    python benchmarks/spectra.py --write
    python benchmarks/spectra.py --quick

A GPT-2-small-sized decoder is trained on bytes. Every so many steps its block matrices, and their last updates, are
handed to every method in turn. The first time only makes the warm ones warm.
"""

import argparse
import copy
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from frame import Benchmark, Page, Setting, median_and_spread, timed
from pairs import Trainer, byte_batches
from torch import Tensor
from torch.nn.utils import parametrizations, parametrize

from redline.integrations.demo.models import ByteLM
from redline.numerics import top_singular_values


@dataclass
class Estimate:
    """``sigma``: one a matrix; ``passes``: products with it and its transpose, in pairs, a block of vectors as one."""

    sigma: Tensor
    passes: float | None = None


Method = Callable[[Sequence[Tensor]], Estimate]


def each(one: Callable[[Tensor], Tensor | float], passes: float | None = None) -> Method:
    """A method that takes one matrix at a time."""
    return lambda matrices: Estimate(torch.stack([torch.as_tensor(one(matrix)) for matrix in matrices]), passes)


def tall(matrix: Tensor) -> Tensor:
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.mT


def gram(matrix: Tensor) -> Tensor:
    return tall(matrix).mT @ tall(matrix)


class Warm:
    """Redline's, from the state of the last call."""

    def __init__(self) -> None:
        self.state = None

    def __call__(self, matrices: Sequence[Tensor]) -> Estimate:
        found = top_singular_values(matrices, self.state, tolerance=1e-4)
        self.state = found.state
        return Estimate(found.sigma, found.passes.double().mean().item() / 2)


def cold(matrices: Sequence[Tensor]) -> Estimate:
    found = top_singular_values(matrices, tolerance=1e-4)
    return Estimate(found.sigma, found.passes.double().mean().item() / 2)


class PowerIteration:
    """That of ``torch.nn.utils.parametrizations.spectral_norm``, from the vectors of the last call."""

    def __init__(self, iterations: int) -> None:
        self.iterations, self.kept = iterations, []

    def __call__(self, matrices: Sequence[Tensor]) -> Estimate:
        if not self.kept:
            self.kept = [self._kept(matrix) for matrix in matrices]
        found = []
        for matrix, kept in zip(matrices, self.kept, strict=True):
            kept._power_method(matrix, self.iterations)
            found.append(torch.vdot(kept._u, torch.mv(matrix, kept._v)))
        return Estimate(torch.stack(found), self.iterations + 0.5)

    def _kept(self, matrix: Tensor) -> torch.nn.Module:
        layer = torch.nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device=matrix.device)
        layer.weight.data.copy_(matrix)
        parametrizations.spectral_norm(layer)
        assert parametrize.is_parametrized(layer, "weight")
        return layer.parametrizations.weight[0]


def floor(matrices: Sequence[Tensor]) -> Estimate:
    """One product with each matrix and one with its transpose; estimates nothing."""
    for matrix in matrices:
        matrix.mT @ (matrix @ matrix.new_ones(matrix.shape[1]))
    return Estimate(torch.full((len(matrices),), math.nan), 1)


def lobpcg(matrix: Tensor) -> Tensor:
    return torch.lobpcg(gram(matrix), k=1)[0][0].clamp_min(0).sqrt()


def svds(matrix: Tensor) -> float:
    from scipy.sparse.linalg import svds

    return float(svds(matrix.cpu().numpy(), k=1, tol=1e-4, return_singular_vectors=False)[0])


FLOOR, LOWRANK, SVDVALS = "floor: one product with each and its transpose", "svd_lowrank(q=6, niter=2)", "svdvals"


WARM: dict[str, Callable[[], Method]] = {
    "Redline, warm": Warm,
    "spectral_norm's power iteration, warm, 1": partial(PowerIteration, 1),
    "spectral_norm's power iteration, warm, 10": partial(PowerIteration, 10),
}


def methods() -> dict[str, Method]:
    return {
        FLOOR: floor,
        **{name: make() for name, make in WARM.items()},
        "Redline, cold": cold,
        LOWRANK: each(lambda matrix: torch.svd_lowrank(matrix, q=6, niter=2)[1][0], 3),
        "Gram matrix, eigvalsh": each(lambda matrix: torch.linalg.eigvalsh(gram(matrix))[-1].clamp_min(0).sqrt()),
        "Gram matrix, lobpcg(k=1)": each(lobpcg),
        "scipy's svds(k=1, tol=1e-4)": each(svds),
        SVDVALS: each(lambda matrix: torch.linalg.svdvals(matrix)[0]),
    }


@dataclass
class Comparison:
    """Every method on one kind of matrices, snapshot after snapshot."""

    device: str
    only: str
    methods: dict[str, Method] = field(default_factory=methods)
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    errors: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    passes: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    memory: dict[str, int | None] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def make_warm(self, matrices: Sequence[Tensor]) -> None:
        """The warm ones by a call, the others by one on a single matrix: what they import is not their time."""
        for name, method in self.methods.items():
            try:
                method(matrices if name in WARM else matrices[:1])
            except (ImportError, RuntimeError, ValueError) as failure:
                self.skipped[name] = f"{type(failure).__name__}: {str(failure).splitlines()[0]}"

    def add(self, matrices: Sequence[Tensor], *, last: bool) -> None:
        """Time each method once; svdvals, the longest, on the last snapshot only."""
        exact = torch.stack(
            [torch.linalg.eigvalsh(gram(matrix.double()))[-1].clamp_min(0).sqrt() for matrix in matrices]
        )
        for name, method in self.methods.items():
            if (self.only not in name and name != FLOOR) or name in self.skipped or (name == SVDVALS and not last):
                continue
            as_it_was = copy.deepcopy(method) if name in WARM else method
            try:
                seconds, found = timed(lambda method=method: method(matrices), self.device)
                if last:
                    self.memory[name] = peak_of(lambda method=as_it_was: method(matrices), self.device)
            except (ImportError, RuntimeError, ValueError) as failure:
                self.skipped[name] = f"{type(failure).__name__}: {str(failure).splitlines()[0]}"
                continue
            self.seconds[name].append(seconds)
            self.errors[name] += ((found.sigma.to(exact) - exact).abs() / exact).tolist()
            if found.passes is not None:
                self.passes[name].append(found.passes)

    def table(self, page: Page) -> None:
        page.table(
            "method", "time: median", "min – max", "repetitions", "over the floor", "speed over svd_lowrank",
            "over svdvals", "largest error", "median error", "passes", "a pass over the floor", "extra memory",
        )  # fmt: skip
        median = {name: statistics.median(seconds) for name, seconds in self.seconds.items()}
        for name, seconds in self.seconds.items():
            middle, around = median_and_spread([one * 1e3 for one in seconds], ",.0f")
            passes = statistics.mean(self.passes[name]) if self.passes[name] else None
            told = torch.tensor(self.errors[name])  # a NaN among them is the largest
            over = [f"{median[one] / median[name]:.2f}" if one in median else "–" for one in (LOWRANK, SVDVALS)]
            page.row(
                name,
                f"{middle} ms",
                around,
                str(len(seconds)),
                f"{median[name] / median[FLOOR]:.2f}",
                *over,
                *(["–", "–"] if name == FLOOR else [f"{told.max():.1e}", f"{told.median():.1e}"]),
                "–" if passes is None else f"{passes:.1f}",
                "–" if passes is None else f"{median[name] / passes / median[FLOOR]:.2f}",
                "not told" if name.startswith("scipy") else f"{self.memory.get(name, math.nan) / 2**20:.1f} MiB",
            )
        for name, why in self.skipped.items():
            page.row(name, f"skipped: {why}", *[""] * 10)


def peak_of(action: Callable[[], object], device: str) -> int:
    """The most bytes torch had allocated at once during an action, beyond those before it."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = action()
        torch.cuda.synchronize()
        del kept
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = action()
    del kept
    held = most = 0
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def measure(page: Page, options: argparse.Namespace) -> None:
    trainer = Trainer(lambda: ByteLM(options.width, options.layers, max(options.width // 64, 1)), options.device)
    matrices = [
        parameter for name, parameter in trainer.model.named_parameters() if "block" in name and parameter.dim() == 2
    ]
    batches, windows = byte_batches(4), torch.Generator().manual_seed(0)
    page.text(
        f"The {len(matrices)} block matrices ({sum(one.numel() for one in matrices):,} numbers) of a decoder of width "
        f"{options.width}, {options.layers} layers, in training (AdamW, 1e-3, batches of 4 x 64 bytes), float32, "
        f"{options.device}; {options.repeats} snapshots {options.apart} steps apart, one earlier for the warm ones to "
        "be warm; on each every method in turn, svdvals on the last one alone; nothing trimmed.",
        "Errors are relative, against eigenvalues of the Gram matrix in float64, over all matrices and snapshots. A "
        "pass is a product with a matrix and one with its transpose, by a vector or a block of vectors. Redline and "
        "svds stop at a tolerance of 1e-4. Extra memory is the most that torch allocates in a call, with its result.",
    )  # fmt: skip
    compared = {kind: Comparison(options.device, options.only) for kind in ("Weights", "Updates")}
    for snapshot in range(options.repeats + 1):
        for left in range(options.apart - 1, -1, -1):
            before = [matrix.detach().clone() for matrix in matrices] if left == 0 else []
            trainer.step(*batches(windows))
        weights = [matrix.detach() for matrix in matrices]
        kinds = {"Weights": weights, "Updates": [after - one for after, one in zip(weights, before, strict=True)]}
        for kind, comparison in compared.items():
            if snapshot == 0:
                comparison.make_warm(kinds[kind])
            else:
                comparison.add(kinds[kind], last=snapshot == options.repeats)
        print(f"snapshot {snapshot} of {options.repeats}", flush=True)
    for kind, comparison in compared.items():
        page.text("", f"## {kind}")
        comparison.table(page)


benchmark = Benchmark(
    "spectra",
    "Cost and error of top singular values",
    measure,
    {
        "repeats": Setting(5, 2, "snapshots measured"),
        "apart": Setting(50, 10, "steps from one to the next"),
        "layers": Setting(12, 2, "of the decoder"),
        "width": Setting(768, 768, "of the decoder"),
    },
    "half an hour",
)

if __name__ == "__main__":
    benchmark.main()
