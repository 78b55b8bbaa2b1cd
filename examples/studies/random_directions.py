"""Steps along the gradient and along random directions, at three phases of training: where does each break?

    python examples/studies/random_directions.py            # two models, five seeds, 20 random directions; minutes
    python examples/studies/random_directions.py --quick    # the MLP, one seed, 5 random directions; a few seconds

Models learn scikit-learn's digits, full batch, Adam. After 5, 30 and 150 steps comes one step ``p = tau * v``: along
the negative gradient, and along Gaussian directions of norm 1 over all parameters, each with ``tau`` such that its own
``r = tau * max_x Delta_a(x; v) / pi`` takes the values of a grid. Two things are measured on the training set: the
loss, after over before, and the fraction of predictions that flip. After arXiv 2603.13552, figure 8.

A direction is said to fail here where the loss has more than doubled, a threshold of this study's own. Flips are
counted apart: early in training most samples lie near a decision boundary, and a step flips them while the loss hardly
moves.
"""

import math
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES, train
from one_step import descent, first, log_grid, logits_after, radius, unit
from study import Case, Claim, Result, Study, Table, judge, select

from redline.integrations.demo.data import digits

GRID = log_grid(-2, 2, 6)
PHASES = {"early": 5, "middle": 30, "late": 150}  # steps of Adam before the step that is measured
KINDS = ("gradient", "random")
LIMITS = {"loss_ratio": 2.0, "flipped": 0.05}  # a direction turns at the smallest r that exceeds these
TITLES = {"loss_ratio": "training loss, after / before", "flipped": "training predictions flipped"}


def cases(quick: bool) -> list[Case]:
    models, seeds, directions = (["MLP"], 1, 5) if quick else (["MLP", "one-token transformer"], 5, 20)
    return [
        {"architecture": name, "phase": phase, "seed": seed, "directions": directions}
        for name in models
        for phase in PHASES
        for seed in range(seeds)
    ]


def run(architecture: str, phase: str, seed: int, directions: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = ARCHITECTURES[architecture]()
    x, y, _, _ = digits()
    train(model, x, y, PHASES[phase])
    gradient = descent(model, x, y)
    before = logits_after(model, x, gradient, 0.0)
    loss = F.cross_entropy(before, y)

    def along(direction: dict[str, torch.Tensor]) -> dict[str, list[float]]:
        rho = radius(model, x, direction)
        stepped = [logits_after(model, x, direction, r * rho) for r in GRID]
        return {
            "loss_ratio": [(F.cross_entropy(z, y) / loss).item() for z in stepped],
            "flipped": [(z.argmax(-1) != before.argmax(-1)).float().mean().item() for z in stepped],
        }

    random = [
        along(unit({name: torch.randn_like(p) for name, p in model.named_parameters()})) for _ in range(directions)
    ]
    return {"loss": loss.item(), "gradient": _summary([along(gradient)]), "random": _summary(random)}


def _summary(paths: list[dict[str, list[float]]]) -> dict[str, Any]:
    """Median and extremes over the directions at each r, and where each direction turned."""
    found = {}
    for of, limit in LIMITS.items():
        at = list(zip(*(path[of] for path in paths), strict=True))
        found[of] = {
            "median": [float(f"{statistics.median(one):.4g}") for one in at],
            "largest": [float(f"{max(one):.4g}") for one in at],
            "turns": [first(GRID, path[of], lambda value, limit=limit: value > limit) for path in paths],
        }
    return found


def turns(results: list[Result], kind: str, of: str) -> list[float]:
    """Where each direction of these runs turned; infinite where it did not."""
    return [float("inf") if r is None else r for one in results for r in one[kind][of]["turns"]]


def groups(results: list[Result]) -> dict[tuple[str, str], list[Result]]:
    """Runs of one model and phase, all seeds."""
    keys = dict.fromkeys((one["architecture"], one["phase"]) for one in results)
    return {key: select(results, architecture=key[0], phase=key[1]) for key in keys}


def table(results: list[Result]) -> Table:
    columns = [
        "model, phase",
        "loss before",
        *(f"{kind}: {what}" for what in ("loss x2", "5 % flip") for kind in KINDS),
    ]
    rows = []
    for (name, phase), runs in groups(results).items():
        at = [f"{statistics.median(turns(runs, kind, of)):.2g}" for of in LIMITS for kind in KINDS]
        rows.append([f"{name}, {phase}", f"{statistics.median(one['loss'] for one in runs):.2g}", *at])
    return Table("The r at which a step doubles the loss, or flips 5 % of the predictions: medians", columns, rows)


def claims(results: list[Result]) -> list[Claim]:
    every = {of: [r for kind in KINDS for r in turns(results, kind, of)] for of in LIMITS}
    failed, directions = sum(r < 1 for r in every["loss_ratio"]), len(every["loss_ratio"])
    below = GRID.index(1.0)
    worst = max(max(one[kind]["loss_ratio"]["largest"][:below]) for one in results for kind in KINDS)
    few = failed < 0.05 * directions
    return [
        near(results, "loss_ratio", "The loss ratio turns (passes 2)"),
        near(results, "flipped", "The fraction of flipped predictions turns (passes 5 %)"),
        Claim(
            "No direction fails (doubles the loss) at r < 1.",
            "none of the gradient and 20 random directions at three phases (figure 8)",
            f"{failed} of {directions} directions in {len(results)} runs do, largest loss ratio {worst:.2f}; but 5 % "
            f"of the predictions flip at r < 1 along {sum(r < 1 for r in every['flipped'])} of them",
            "does not hold here" if not few else "holds in part" if failed else "holds",
        ),
    ]


def near(results: list[Result], of: str, what: str) -> Claim:
    """Of the medians of each model, phase and kind: all within half a decade of r = 1, or half of them."""
    medians = {kind: [statistics.median(turns(runs, kind, of)) for runs in groups(results).values()] for kind in KINDS}
    at = [r for each in medians.values() for r in each]
    inside = sum(abs(math.log10(r)) < 0.51 for r in at)  # the grid's own point at half a decade counts
    ranges = ", ".join(f"{kind} {min(each):.2g} to {max(each):.2g}" for kind, each in medians.items())
    return Claim(
        f"{what} near r = 1, within half a decade, at every phase, along the gradient and random directions.",
        "both near r = 1 (figure 8)",
        f"{inside} of {len(at)} medians lie there; {ranges}, over models and phases; {len(results)} runs",
        judge(inside == len(at), inside >= len(at) / 2),
    )


def plot(results: list[Result], figure: Any) -> None:
    shown = [one for one in results if one["architecture"] == "MLP"]  # the other model's figures are in the table
    panels = figure.subplots(2, len(PHASES), sharex=True, sharey="row")
    for row, of in zip(panels, LIMITS, strict=True):
        for panel, phase in zip(row, PHASES, strict=True):
            for kind, colour in zip(KINDS, ("tab:red", "tab:blue"), strict=True):
                runs = [one[kind][of] for one in select(shown, phase=phase)]
                middle = [statistics.median(at) for at in zip(*(one["median"] for one in runs), strict=True)]
                panel.plot(GRID, middle, color=colour, label=f"{kind}, median")
                largest = [max(at) for at in zip(*(one["largest"] for one in runs), strict=True)]
                panel.plot(GRID, largest, ":", color=colour, linewidth=1, label=f"{kind}, largest")
            panel.axvline(1, color="black", linestyle="--", linewidth=1)
            panel.axhline(LIMITS[of], color="gray", linewidth=0.6)
            panel.set(xscale="log", yscale="log" if of == "loss_ratio" else "linear")
        row[0].set_ylabel(TITLES[of], fontsize=9)
    for panel, (phase, steps) in zip(panels[0], PHASES.items(), strict=True):
        panel.set_title(f"{phase}: after {steps} steps", fontsize=10)
    for panel in panels[1]:
        panel.set_xlabel("normalized step size r")
    panels[0][0].legend(fontsize=8, loc="upper left")
    figure.suptitle("One step along the gradient and along random directions, MLP", fontsize=10)


study = Study(
    name="random_directions",
    title="Steps along the gradient and random directions, at three phases of training.",
    source="arXiv 2603.13552, figure 8.",
    cases=cases,
    run=run,
    table=table,
    plot=plot,
    claims=claims,
    size=(10.0, 5.6),
)

if __name__ == "__main__":
    study.main()
