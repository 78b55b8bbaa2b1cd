"""Steady spectra: where AdamW's top singular values settle, and whether the transfer rule makes them match in width.

    python examples/studies/steady_spectra.py                  # all of it; half an hour on one core, at most
    python examples/studies/steady_spectra.py --quick          # three widths, one seed, shorter runs

A small LLaMA learns the bytes of Python's standard library at constant rates. Symbols: ``d`` the width, ``lr`` and
``wd`` the learning rate and weight decay of the hidden matrices and the readout. The rule gives an lr and a wd for each
width; here every width is trained with those of every other too, the ``anchor``. Where the anchor is the width, that is
the rule; where it is the same for all widths, nothing is scaled. Embeddings and gains train alike throughout.

Weights forget what they were within some ``1 / (lr wd)`` steps, so every run is several such times long, and what is
compared is the mean of ``sigma_1`` over its last quarter. After arXiv 2510.15262, whose models are wider and runs
longer. AdamW's betas are as published; model, data, batch and rates are this study's own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from study import Case, Claim, Result, Study, Table, judge, select

import redline
from redline.integrations.demo.data import byte_batch, library_bytes
from redline.integrations.demo.models import LlamaLM
from redline.scaling import compare_spectra, transfer

KINDS = ("query", "key", "value", "out", "gate", "up", "down")  # the hidden matrices of a block
BASE, LR, WD = 32, 0.03, 0.5  # the best point of docs/width_transfer.md
BATCH, CONTEXT = 16, 32
MEASURED = 16  # times in a run, evenly: four in each quarter
FACTORS = {"lr alone": ((0.25, 1.0), (4.0, 1.0)), "wd alone": ((1.0, 4.0), (1.0, 0.25))}  # of lr and of wd


def cases(quick: bool) -> list[Case]:
    widths, fixed, seeds, times = ((32, 64, 128), 32, 1, 3) if quick else ((32, 64, 128, 256), 64, 3, 5)
    points = [(width, anchor, 1.0, 1.0) for width in widths for anchor in widths]
    points += [(fixed, fixed, up, down) for factors in FACTORS.values() for up, down in factors]
    points.sort(key=lambda point: point[0] * point[1] ** 0.5 / (point[2] * point[3]), reverse=True)  # costly ones first
    return [
        {"width": width, "anchor": anchor, "lr_times": up, "wd_times": down, "seed": seed, "decay_times": times}
        for width, anchor, up, down in points
        for seed in range(seeds)
    ]


def train(
    width: int, anchor: int, lr_times: float, wd_times: float, seed: int, decay_times: float
) -> tuple[torch.nn.Module, dict[str, Any]]:
    """One run, and what was measured in it: of each hidden matrix sigma_1 and Frobenius norm, and the loss."""
    torch.manual_seed(seed)
    text, model = library_bytes(), LlamaLM(width, context=CONTEXT)
    base = BASE * width / anchor  # as far from the width as BASE from the anchor
    groups = transfer(model, base_width=base, width=width, lr=LR, weight_decay=WD, show=False)
    matrices = next(group for group in groups if group["name"] == "matrix-like")
    matrices["lr"] *= lr_times
    matrices["weight_decay"] *= wd_times
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    # Where lr wd is large that is too short to learn anything: then as long as at the base.
    steps = round(decay_times / min(matrices["lr"] * matrices["weight_decay"], LR * WD))
    ends = [round(steps * (k + 1) / MEASURED) - 1 for k in range(MEASURED)]
    windows = torch.Generator().manual_seed(1_000 + seed)
    sigma: dict[str, list[float]] = {}
    rank: dict[str, list[float]] = {}
    losses = []
    monitors = [redline.WeightSpectrum(lambda step: step in ends)]
    with redline.attach(model, optimizer, monitors=monitors) as session:
        for step in range(steps):
            inputs, targets = byte_batch(text, BATCH, CONTEXT, windows)
            loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if step in ends:
                for kept, metric in ((sigma, "spectral_norm"), (rank, "stable_rank")):
                    for name, value in session.latest.layers(f"redline_weight_{metric}").items():
                        if name.startswith("blocks."):
                            kept.setdefault(name.removesuffix(".weight"), []).append(value)
    parts = itertools.pairwise([0, *(end + 1 for end in ends)])
    return model, {
        "steps": steps,
        "lr": matrices["lr"],
        "wd": matrices["weight_decay"],
        "sigma": sigma,
        "frobenius": {name: [s * r**0.5 for s, r in zip(sigma[name], rank[name], strict=True)] for name in sigma},
        "loss": [fmean(losses[start:end]) for start, end in parts],
    }


def run(**case: Any) -> dict[str, Any]:
    """What is kept of a run: the settled values and how far they still moved."""
    _, measured = train(**case)
    quarter = MEASURED // 4
    return {
        **{what: measured[what] for what in ("steps", "lr", "wd")},
        "loss": [round(value, 4) for value in measured["loss"]],
        # Over time, the median of the matrices.
        "course": [round(median(values), 4) for values in zip(*measured["sigma"].values(), strict=True)],
        # The last quarter over the one before it.
        "drift": {
            name: round(fmean(values[-quarter:]) / fmean(values[-2 * quarter : -quarter]), 4)
            for name, values in measured["sigma"].items()
        },
        **{
            what: {name: round(fmean(values[-quarter:]), 5) for name, values in measured[what].items()}
            for what in ("sigma", "frobenius")
        },
    }


def ways(results: list[Result]) -> dict[str, list[Result]]:
    """The runs along each way of changing lr / wd at one width. Those in the middle are on all of them."""
    width = next(one["width"] for one in results if one["lr_times"] != 1)
    return {
        "lr alone": select(results, width=width, anchor=width, wd_times=1.0),
        "wd alone": select(results, width=width, anchor=width, lr_times=1.0),
        "both by the rule": select(results, width=width, lr_times=1.0, wd_times=1.0),
    }


def across(results: list[Result]) -> list[list[Result]]:
    """The runs at all widths: those of the rule, then for each anchor those with nothing scaled."""
    runs = select(results, lr_times=1.0, wd_times=1.0)
    anchors = sorted({one["anchor"] for one in runs})
    return [
        [one for one in runs if one["anchor"] == one["width"]],
        *(select(runs, anchor=anchor) for anchor in anchors),
    ]


def typical(runs: list[Result], end: str, what: str = "sigma") -> float:
    """Geometric mean over the runs, and over the matrices whose names end so."""
    return math.exp(fmean(math.log(v) for one in runs for name, v in one[what].items() if name.endswith(end)))


def curve(runs: list[Result], x: Callable[[Result], float], end: str = "", what: str = "sigma") -> dict[float, float]:
    """What is typical at each ``x``, the smallest first."""
    return {at: typical([one for one in runs if x(one) == at], end, what) for at in sorted(set(map(x, runs)))}


def exponents(runs: list[Result], x: Callable[[Result], float], what: str = "sigma") -> list[float]:
    """Of each kind of matrix: the slope of the logarithm of what is typical in that of ``x``."""
    curves = [curve(runs, x, kind, what) for kind in KINDS]
    return [float(np.polyfit(np.log(list(one)), np.log(list(one.values())), 1)[0]) for one in curves]


def ratios(runs: list[Result]) -> dict[int, list[float]]:
    """At each wider width: sigma_1 of each matrix over that at the narrowest, both typical of the seeds."""
    widths, names = sorted({one["width"] for one in runs}), runs[0]["sigma"]
    narrow, *wider = ({name: typical(select(runs, width=width), name) for name in names} for width in widths)
    found = [{one.layer: one.ratio for one in compare_spectra(narrow, spectra).layers} for spectra in wider]
    return {width: [some[name] for name in names] for width, some in zip(widths[1:], found, strict=True)}


def lr_over_wd(one: Result) -> float:
    return one["lr"] / one["wd"]


def width_of(one: Result) -> float:
    return one["width"]


def table(results: list[Result]) -> Table:
    by_rule, *unscaled = across(results)
    columns = {f"lr/wd: {way}": exponents(runs, lr_over_wd) for way, runs in ways(results).items()}
    columns |= {f"d: rates of {runs[0]['anchor']}": exponents(runs, width_of) for runs in unscaled}
    for rule, runs in (("rule", by_rule), ("unscaled", unscaled[0])):
        curves = [curve(runs, width_of, kind) for kind in KINDS]
        columns[f"{max(curves[0])} over {BASE}: {rule}"] = [one[max(one)] / one[BASE] for one in curves]
    rows = [[kind, *(f"{values[k]:.2f}" for values in columns.values())] for k, kind in enumerate(KINDS)]
    return Table("sigma_1: exponents in lr/wd and in d, and ratios across widths", ["matrix", *columns], rows)


def claims(results: list[Result]) -> list[Claim]:
    """Bounds of 0.1 on exponents, of 10 % on medians of ratios and of 25 % on each one are this study's own."""
    return [claim(results) for claim in (settled, in_rates, in_width, matched, lower_loss)]


def settled(results: list[Result]) -> Claim:
    drifts = [median(one["drift"].values()) for one in results]
    return Claim(
        "Under AdamW singular values reach a steady state.",
        "quickly, no figure (abstract)",
        f"sigma_1 in the last quarter of a run over that in the quarter before, median of its "
        f"{len(results[0]['drift'])} matrices: {spread(drifts)}, median {median(drifts):.3f}, {len(results)} runs",
        judge(max(abs(drift - 1) for drift in drifts) <= 0.1, abs(median(drifts) - 1) <= 0.1),
    )


def in_rates(results: list[Result]) -> Claim:
    fitted = {way: exponents(runs, lr_over_wd) for way, runs in ways(results).items()}
    frobenius = [median(exponents(runs, lr_over_wd, "frobenius")) for runs in ways(results).values()]
    close = [abs(median(some) - 0.5) <= 0.1 for some in fitted.values()]
    runs = ways(results)["lr alone"]
    return Claim(
        "At one width top singular values settle in proportion to sqrt(lr / wd).",
        "exponent 0.5, of all singular values (abstract)",
        f"sigma_1, median of {len(KINDS)} kinds of matrices (and range), by "
        + ", ".join(f"{way} {median(some):.2f} ({spread(some)})" for way, some in fitted.items())
        + f"; Frobenius norm {', '.join(f'{exponent:.2f}' for exponent in frobenius)}; d = {runs[0]['width']}, "
        f"{len(runs)} runs or more each",
        judge(all(close), any(close)),
    )


def in_width(results: list[Result]) -> Claim:
    _, *unscaled = across(results)
    fitted = {runs[0]["anchor"]: exponents(runs, width_of) for runs in unscaled}
    bulk = [median(exponents(runs, width_of, "frobenius")) - 0.5 for runs in unscaled]  # a norm over some d values
    close = [abs(median(some) - 0.75) <= 0.1 for some in fitted.values()]
    return Claim(
        "At one lr and wd the top singular value grows as d^0.75.",
        "exponent about 0.75 (abstract)",
        f"median of {len(KINDS)} kinds of matrices (and range), at the lr and wd of d = "
        + ", ".join(f"{anchor} {median(some):.2f} ({spread(some)})" for anchor, some in fitted.items())
        + f"; root mean square of all singular values {spread(bulk)}; {len(unscaled[0])} runs each",
        judge(all(close), any(close)),
    )


def matched(results: list[Result]) -> Claim:
    runs, unscaled, *_ = across(results)
    by_rule, plain = ratios(runs), ratios(unscaled)
    widest = max(by_rule)
    close = all(abs(median(some) - 1) <= 0.1 and min(some) >= 0.8 and max(some) <= 1.25 for some in by_rule.values())
    return Claim(
        "With lr ~ 1/d and wd ~ sqrt(d) top singular values match across widths.",
        "match (abstract)",
        f"over those at d = {BASE}, median of {len(by_rule[widest])} matrices (and range) "
        + ", ".join(f"{median(some):.2f} ({spread(some)}) at {width}" for width, some in by_rule.items())
        + f"; with nothing scaled {median(plain[widest]):.2f} ({spread(plain[widest])}) at {widest}; {len(runs)} "
        "runs by the rule",
        judge(close, abs(math.log(median(by_rule[widest]))) <= abs(math.log(median(plain[widest]))) / 2),
    )


def lower_loss(results: list[Result]) -> Claim:
    widest = max(one["width"] for one in results)
    ruled, unscaled, *_ = (select(runs, width=widest) for runs in across(results))
    # The ruled runs are the longer ones: their loss after no more steps than the others'.
    early = [one["loss"][MEASURED * unscaled[0]["steps"] // one["steps"] - 1] for one in ruled]
    late = [one["loss"][-1] for one in unscaled]
    worse = [one - other for one, other in zip(early, late, strict=True)]
    return Claim(
        "By the rule the widest model's loss is no higher than with nothing scaled.",
        "lr and wd transfer (abstract)",
        f"{fmean(early):.3f} against {fmean(late):.3f} at d = {widest} after as many steps, no higher in "
        f"{sum(one <= 0 for one in worse)} of {len(worse)} seeds",
        judge(max(worse) <= 0, fmean(worse) <= 0),
    )


def spread(values: list[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}"


def plot(results: list[Result], figure: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    time, rates, width, match = figure.subplots(2, 2).flat
    for one in results:
        part = np.arange(1, MEASURED + 1) / MEASURED
        time.plot(part, np.array(one["course"]) / one["course"][-1], "C0", alpha=0.3, lw=0.8)
    time.axvspan(0.75, 1, color="0.92", label="compared")
    time.set(title="All runs, median of their matrices", ylabel="sigma_1 over that at the end")
    time.set_xlabel(f"part of the run, which is {results[0]['decay_times']} / (lr wd) steps long or more")

    for k, (way, runs) in enumerate(ways(results).items()):
        fit(rates, curve(runs, lr_over_wd), f"C{k}", way, median(exponents(runs, lr_over_wd)), published=0.5)
    rates.set(
        title=f"Exponents in lr / wd at d = {runs[0]['width']}",
        xlabel="lr / wd",
        ylabel="sigma_1, mean of the matrices",
    )
    for k, runs in enumerate(across(results)[1:]):
        label = f"lr = {runs[0]['lr']:.2g}, wd = {runs[0]['wd']:.2g}"
        fit(width, curve(runs, width_of), f"C{k}", label, median(exponents(runs, width_of)), published=0.75)
    width.set(title="Exponents in d at one lr and wd", xlabel="width d", ylabel="sigma_1, mean of the matrices")

    by_rule, unscaled, *_ = across(results)
    for runs, color, label in ((unscaled, "C1", "nothing scaled"), (by_rule, "C0", "lr ~ 1/d, wd ~ sqrt(d)")):
        found = ratios(runs)
        for some in zip(*found.values(), strict=True):
            match.plot([BASE, *found], [1, *some], "o-", color=color, alpha=0.4, lw=0.8, ms=3)
        match.plot([BASE, *found], [1, *map(median, found.values())], color=color, lw=2.5, label=f"{label}, median")
    match.axhline(1, color="black", ls="--", lw=1, label="published: match")
    match.set(title="Each matrix across widths", xlabel="width d", ylabel="sigma_1 over that at the narrowest")
    for axes in (rates, width, match):
        axes.set(xscale="log", yscale="log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(ScalarFormatter())
            axis.set_minor_formatter(NullFormatter())
    for axes in (width, match):
        axes.set_xticks([BASE, *found])
    for axes in figure.axes:
        axes.legend(fontsize=8)


def fit(axes: Any, points: dict[float, float], color: str, label: str, exponent: float, published: float) -> None:
    """The points, and through their middle a line of the fitted exponent and a dashed one of the published."""
    at, values = np.array(list(points)), np.array(list(points.values()))
    middle = [math.exp(fmean(np.log(some))) for some in (at, values)]
    axes.loglog(at, values, "o", color=color, ms=4)
    axes.loglog(at, middle[1] * (at / middle[0]) ** exponent, color=color, label=f"{label}: {exponent:.2f}", lw=1.2)
    first = not any(line.get_linestyle() == "--" for line in axes.lines)
    named = f"published: {published}" if first else None
    axes.loglog(at, middle[1] * (at / middle[0]) ** published, color=color, ls="--", lw=1, alpha=0.7, label=named)


study = Study(
    name="steady_spectra",
    title="Steady spectra: AdamW's top singular values against lr, wd and width.",
    source="arXiv 2510.15262.",
    cases=cases,
    run=run,
    table=table,
    plot=plot,
    claims=claims,
    size=(10.0, 8.0),
)

if __name__ == "__main__":
    study.main()
