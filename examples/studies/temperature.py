"""Softmax temperature moves the step at which the loss breaks; does the normalized step size follow it?

    python examples/studies/temperature.py            # five models, five seeds; a few minutes
    python examples/studies/temperature.py --quick    # two models, one seed; some ten seconds

At each temperature T the loss is the cross-entropy of ``logits / T``; one step is taken along its negative gradient.
The *onset* is the smallest ``tau``, on a grid of 20 a decade, at which the step has doubled the training loss, or has
cost 5 points of test accuracy. Over T its log10 has a standard deviation, the spread; so has
``r_T = tau * max_x Delta_a(x) / (pi T)``, ``Delta_a`` the spread of the logits' tangent before they are divided by T.
After arXiv 2603.13552, figure 9.

What the paper calls onset, and at which T its models learn, is not in the text this study had. Both were tried:

- learned once at T = 1, then probed at each T ("once"): the loss's onset spreads by 0.77 in ``tau`` and 0.20 in
  ``r_T``, medians of five models. T itself spreads by 0.51; the gradient turns with it (cold, only the worst samples
  count).
- learned anew at each T ("each"): 0.20 and 0.16, since training makes up for most of T.

The first comes nearest to the published spreads, and the claims are about it. They are two, since accuracy's onset does
not follow ``r_T``: dividing the logits by T changes no prediction.

All in train mode, BatchNorm's statistics those of the batch (see phase_transition.py), and from the trained model on in
float64: at T = 1/4 losses are as small as float32's rounding.
"""

import math
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES, train
from one_step import accuracy, descent, log_grid, logits_after, radius
from study import Case, Claim, Result, Study, Table, Verdict, judge, select
from torch import nn

from redline.integrations.demo.data import digits

TEMPERATURES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
GRID = log_grid(-3, 4, 20)  # of tau
LEARNED = ("once", "each")
ONSETS = ("loss", "accuracy")
MODELS = ("linear", "MLP", "residual MLP", "CNN+BN", "one-token transformer")


def cases(quick: bool) -> list[Case]:
    models, seeds = (("MLP", "residual MLP"), 1) if quick else (MODELS, 5)
    return [
        {"architecture": name, "learned": learned, "seed": seed}
        for name in models
        for learned in LEARNED
        for seed in range(seeds)
    ]


def run(architecture: str, learned: str, seed: int) -> dict[str, Any]:
    each = []
    for temperature in TEMPERATURES:
        torch.manual_seed(seed)
        model = ARCHITECTURES[architecture]()
        train_x, train_y, _, _ = digits()
        train(model, train_x, train_y, steps=100, temperature=temperature if learned == "each" else 1.0)
        each.append(probe(model.double(), temperature))
    return {name: [one[name] for one in each] for name in each[0]}


def probe(model: nn.Module, temperature: float) -> dict[str, float | None]:
    """The radius, ``tau`` at which ``r_T = 1``, and the onsets in ``tau``; None where there is none on the grid."""
    train_x, train_y, test_x, test_y = digits()
    train_x, test_x = train_x.double(), test_x.double()
    direction = descent(model, train_x, train_y, temperature)

    def loss(tau: float) -> float:
        return F.cross_entropy(logits_after(model, train_x, direction, tau) / temperature, train_y).item()

    def right(tau: float) -> float:
        return accuracy(logits_after(model, test_x, direction, tau), test_y)

    loss_before, right_before = loss(0.0), right(0.0)
    return {
        "radius": temperature * radius(model, train_x, direction),
        "loss": next((tau for tau in GRID if loss(tau) > 2 * loss_before), None),
        "accuracy": next((tau for tau in GRID if right(tau) < right_before - 0.05), None),
    }


def spreads(one: Result, onset: str) -> tuple[float, float] | None:
    """Of a run's onsets over T: the standard deviation of log10 tau, and of log10 r_T; None if one is missing."""
    if None in one[onset]:
        return None
    in_r = [tau / radius for tau, radius in zip(one[onset], one["radius"], strict=True)]
    return statistics.pstdev(map(math.log10, one[onset])), statistics.pstdev(map(math.log10, in_r))


def median_spreads(results: list[Result], architecture: str, learned: str, onset: str) -> tuple[float, float] | None:
    """Medians over the seeds that have an onset at every T."""
    runs = [spreads(one, onset) for one in select(results, architecture=architecture, learned=learned)]
    found = [one for one in runs if one is not None]
    return (statistics.median(tau for tau, _ in found), statistics.median(r for _, r in found)) if found else None


def models(results: list[Result]) -> list[str]:
    return list(dict.fromkeys(one["architecture"] for one in results))


def table(results: list[Result]) -> Table:
    columns = ["model", *(f"{onset}, learned {learned}" for onset in ONSETS for learned in LEARNED)]
    rows = [
        [name, *(said(median_spreads(results, name, learned, onset)) for onset in ONSETS for learned in LEARNED)]
        for name in models(results)
    ]
    seeds = len({one["seed"] for one in results})
    return Table(f"Spread over T of the onset, log10: in tau -> in r_T (median, seeds: {seeds})", columns, rows)


def said(spread: tuple[float, float] | None) -> str:
    return "no onset at some T" if spread is None else f"{spread[0]:.2f} -> {spread[1]:.2f}"


def claims(results: list[Result]) -> list[Claim]:
    return [
        claim(results, "loss", "doubles the training loss"),
        claim(results, "accuracy", "costs 5 points of accuracy"),
    ]


def claim(results: list[Result], onset: str, what: str) -> Claim:
    """Holds if r_T spreads less than half as far as tau in every model; in part if less far in the median model."""
    found = {name: median_spreads(results, name, "once", onset) for name in models(results)}
    there = [spread for spread in found.values() if spread is not None]
    tau, r = (statistics.median(one[k] for one in there) if there else math.nan for k in (0, 1))
    halved = sum(in_r < in_tau / 2 for in_tau, in_r in there)
    verdict: Verdict = judge(halved == len(found), r < tau)
    runs = len(select(results, learned="once"))
    each = [median_spreads(results, name, "each", onset) for name in found]
    other = [spread for spread in each if spread is not None]
    medians = [f"{statistics.median(one[k] for one in other):.3f}" for k in (0, 1)] if other else ["none", "none"]
    return Claim(
        f"The step that {what} spreads over T less than half as far in r_T as in tau.",
        "0.992 in tau, 0.164 in r_T, standard deviations of log10 (figure 9); of which onset is not known here",
        f"{tau:.3f} and {r:.3f}, median of {len(found)} models, less than half in {halved}; {runs} runs of six T, "
        f"learned at T = 1 (learned at each T: {medians[0]} and {medians[1]})",
        verdict,
    )


def plot(results: list[Result], figure: Any) -> None:
    panels = figure.subplots(1, 2, sharey=True)
    for name, marker in zip(models(results), "osD^v", strict=False):
        runs = select(results, architecture=name, learned="once")
        onsets = [one["loss"] for one in runs]
        in_r = [[tau / rho for tau, rho in zip(one["loss"], one["radius"], strict=True)] for one in runs]
        for panel, each in zip(panels, (onsets, in_r), strict=True):
            middle = [statistics.median(at) for at in zip(*each, strict=True)]
            panel.plot(middle, TEMPERATURES, f"{marker}-", label=name, markersize=5)
    panels[0].set(xscale="log", xlabel="step length tau at which the loss doubles", ylabel="temperature T")
    panels[1].set(xscale="log", xlabel="normalized step size r_T at which the loss doubles")
    low, high = panels[0].get_xlim()
    panels[1].set_xlim((low / high) ** 0.5, (high / low) ** 0.5)  # as many decades as beside it, about r = 1
    panels[1].axvline(1, color="black", linestyle="--", linewidth=1)
    panels[0].set_yscale("log")
    panels[0].set_yticks(TEMPERATURES, [f"{temperature:g}" for temperature in TEMPERATURES])
    panels[0].minorticks_off()
    panels[1].legend(fontsize=8, loc="upper left")
    figure.suptitle("Where one step breaks the loss at temperature T (median of the seeds)", fontsize=10)


study = Study(
    name="temperature",
    title="The step that breaks the loss, over softmax temperature.",
    source="arXiv 2603.13552, figure 9.",
    cases=cases,
    run=run,
    table=table,
    plot=plot,
    claims=claims,
)

if __name__ == "__main__":
    study.main()
