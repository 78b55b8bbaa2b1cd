"""How short is the bound? The exact radius over it, along training.

    python examples/studies/conservatism.py            # three models, three optimizers, three seeds; some minutes
    python examples/studies/conservatism.py --quick    # one seed, few steps; half a minute

``rho*``, the nearest complex zero over the whole batch, against ``rho_a = pi / max Delta_a``, every few steps of
ordinary training, along the optimizer's own updates. The paper (arXiv 2603.13552) proves ``rho* >= rho_a`` and leaves
open by how much. Beside it the same for logits and tangents drawn at random.
"""

import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from spiked import SignMomentum
from study import Case, Claim, Result, Study, Table, judge, select
from torch import Tensor, nn

import redline
from redline.integrations.demo.data import byte_batch, digits, library_bytes
from redline.integrations.demo.models import ByteLM, DigitsTransformer
from redline.numerics import exact_ghost_radius, ghost_radius

MODELS: dict[str, Callable[[], nn.Module]] = {
    "MLP": lambda: nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)),
    "row transformer": DigitsTransformer,
    "byte language model": lambda: ByteLM(width=64, layers=2),
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "sign": lambda parameters: SignMomentum(parameters, lr=3e-4),
}
CLASSES = (2, 10, 100, 1_000)
"""Of the random logits: standard normal, tangents too."""


def training(model: str, optimizer: str, seed: int, steps: int, every: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    net = MODELS[model]()
    stepped = OPTIMIZERS[optimizer](net.parameters())
    batches = torch.Generator().manual_seed(seed)
    train_x, train_y, _, _ = digits()
    text = library_bytes()

    def batch() -> tuple[Tensor, Tensor]:
        if model == "byte language model":
            return byte_batch(text, 16, 32, batches)
        chosen = torch.randint(len(train_x), (64,), generator=batches)
        return train_x[chosen], train_y[chosen]

    course = []
    monitors = [redline.GhostRadius(every, exact=True, max_samples=None)]
    with redline.attach(net, stepped, monitors=monitors) as session:
        for step in range(steps):
            x, y = batch()
            loss = F.cross_entropy(net(x).flatten(0, -2), y.flatten())
            loss.backward()
            stepped.step()
            stepped.zero_grad()
            if step % every == 0:
                latest = session.latest
                r, exact = (latest.value(f"redline_{name}_step_size") for name in ("normalized", "exact"))
                course.append([step, *(float(f"{value:.5g}") for value in (r, exact, loss.item()))])
    return {"course": course}  # step, r by the bound, r by the exact radius, loss


def random_logits(classes: int, seed: int, samples: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    z, a = (torch.randn(samples, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    return {"ratios": [float(f"{ratio:.5g}") for ratio in (exact_ghost_radius(z, a) / ghost_radius(a)).tolist()]}


def run(kind: str, **settings: Any) -> dict[str, Any]:
    return training(**settings) if kind == "training" else random_logits(**settings)


def cases(quick: bool) -> list[Case]:
    seeds, steps, every, samples = (1, 40, 8, 50) if quick else (3, 300, 10, 200)
    trained = [
        {"kind": "training", "model": model, "optimizer": optimizer, "seed": seed, "steps": steps, "every": every}
        for model in reversed(MODELS)
        for optimizer in OPTIMIZERS
        for seed in range(seeds)
    ]
    drawn = [{"kind": "random", "classes": classes, "seed": 0, "samples": samples} for classes in CLASSES]
    return trained + drawn


def ratios(results: list[Result], part: str = "all") -> list[float]:
    """``rho* / rho_a`` of the steps of some runs: of all, or of their first or last third."""
    found = []
    for one in results:
        course, third = one["course"], len(one["course"]) // 3
        for _, r, exact, _ in {"all": course, "early": course[:third], "late": course[-third:]}[part]:
            if exact > 0:
                found.append(r / exact)
    return found


def quantiles(values: list[float]) -> str:
    ordered = sorted(values)
    low, high = (ordered[math.floor(q * (len(ordered) - 1))] for q in (0.05, 0.95))
    return f"{statistics.median(ordered):.2f} ({low:.2f} to {high:.2f})"


def table(results: list[Result]) -> Table:
    rows = []
    for model in MODELS:
        for optimizer in OPTIMIZERS:
            found = select(select(results, kind="training"), model=model, optimizer=optimizer)
            steps = [(r, exact) for one in found for _, r, exact, _ in one["course"]]
            over = sum(r >= 1 for r, _ in steps)
            truly = sum(exact >= 1 for _, exact in steps)
            rows.append(
                [
                    f"{model}, {optimizer}",
                    *(quantiles(ratios(found, part)) for part in ("early", "late", "all")),
                    f"{over} / {truly} of {len(steps)}",
                ]
            )
    for one in select(results, kind="random"):
        rows.append([f"random, {one['classes']:,} classes", "", "", quantiles(one["ratios"]), ""])
    return Table(
        "rho* / rho_a, the exact radius over the bound: median (5 % to 95 %)",
        ["", "first third", "last third", "all", "steps with r >= 1, by the bound / exact"],
        rows,
    )


def plot(results: list[Result], figure: Any) -> None:
    panels = figure.subplots(1, len(MODELS), sharey=True)
    for panel, model in zip(panels, MODELS, strict=True):
        for optimizer, colour in zip(OPTIMIZERS, ("tab:blue", "tab:orange", "tab:green"), strict=True):
            found = select(select(results, kind="training"), model=model, optimizer=optimizer)
            for place, one in enumerate(found):
                points = [(step, r / exact) for step, r, exact, _ in one["course"] if exact > 0]
                panel.plot(*zip(*points, strict=True), color=colour, alpha=0.6, label=optimizer if not place else None)
        panel.axhline(1, color="black", linestyle=":", linewidth=1)
        panel.set(title=model, xlabel="step", yscale="log")
        panel.minorticks_off()
        panel.set_yticks([1, 2, 4, 8], ["1", "2", "4", "8"])
    panels[0].set_ylabel(r"$\rho^* / \rho_a$")
    panels[0].legend(fontsize=8)


def claims(results: list[Result]) -> list[Claim]:
    trained, drawn = select(results, kind="training"), select(results, kind="random")
    every = ratios(trained) + [ratio for one in drawn for ratio in one["ratios"]]
    least = min(every)
    typical = {
        f"{model}, {optimizer}": statistics.median(ratios(select(trained, model=model, optimizer=optimizer)))
        for model in MODELS
        for optimizer in OPTIMIZERS
    }
    inside = sum(2 <= one <= 4 for one in typical.values())
    lowest, highest = (pick(typical, key=lambda name: typical[name]) for pick in (min, max))
    steps = [(r, exact) for one in trained for _, r, exact, _ in one["course"]]
    over, truly = sum(r >= 1 for r, _ in steps), sum(exact >= 1 for _, exact in steps)
    return [
        Claim(
            "The bound never exceeds the radius.",
            "rho* >= rho_a (theorem 4.6)",
            f"least ratio {least:.4f} of {len(every)}",
            judge(least >= 1 - 1e-4),  # tangents are float32
        ),
        Claim(
            "The radius is 2 to 4 times the bound.",
            "open there; measured before on random logits",
            f"medians in training from {typical[lowest]:.2f} ({lowest}) to {typical[highest]:.2f} ({highest}), "
            f"{inside} of {len(typical)} within 2 to 4",
            judge(inside == len(typical), inside),
        ),
        Claim(
            "Most steps that the bound puts over the redline are not beyond the radius.",
            "open there",
            f"of {len(steps)} measured steps {over} have r >= 1 by the bound, {truly} by the exact radius",
            judge(truly < 0.5 * over, truly < over),
        ),
    ]


study = Study(
    name="conservatism",
    title="How short the bound is: the exact radius over it, along training.",
    source="The calibration that arXiv 2603.13552 leaves open.",
    cases=cases,
    run=run,
    table=table,
    plot=plot,
    claims=claims,
    size=(11.0, 3.6),
)

if __name__ == "__main__":
    study.main()
