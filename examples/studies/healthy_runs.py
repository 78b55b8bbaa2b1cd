"""What protection costs a run that needs none: the clamp by the bound and by the exact radius, without any spike.

The models of the spike grid, full batch, 200 steps, with Adam, AdamW and an optimizer that steps by signs. A clamp
should leave such runs alone: judged is the median over the seeds against that of plain training, in standard deviations
of plain training over its seeds. The paper (arXiv 2603.13552) has no such runs; it leaves the exact radius open.
"""

import statistics
from typing import Any

from spiked import ARMS, CLAMPS, MODELS, OPTIMIZERS, train
from study import Case, Claim, Result, Study, Table, judge, select

ACCURACY = "accuracy_train_mode"  # on the test batch's own statistics: BatchNorm's averages lag after so few steps
ASKED = ("Adam", "AdamW", "sign")  # at the rates people would take; three times that is looked at besides


def cases(quick: bool) -> list[Case]:
    seeds, steps = (3, 60) if quick else (10, 200)
    return [
        {"model": model, "optimizer": optimizer, "arm": arm, "seed": seed, "steps": steps}
        for model in (("Transformer", "MLP+LN") if quick else MODELS)
        for optimizer in (("Adam", "sign") if quick else OPTIMIZERS)
        for arm in ("plain", *CLAMPS)
        for seed in range(seeds)
        if model != "CNN+BN"  # the slowest by far, and with BatchNorm the whole batch is measured
        or (optimizer in ASKED and arm != "sampled" and (arm != "bound" or optimizer == "Adam"))
    ]


def behind(results: list[Result], of: str, arm: str, **where: Any) -> float:
    """How much worse the median ends than plain training's, in standard deviations of plain training."""
    ours, plain = ([one[of] for one in select(results, arm=which, **where)] for which in (arm, "plain"))
    gap = statistics.median(plain) - statistics.median(ours)
    return (gap if of == ACCURACY else -gap) / statistics.stdev(plain)


def settings(results: list[Result]) -> list[dict[str, str]]:
    return [
        {"model": model, "optimizer": optimizer}
        for model in MODELS
        for optimizer in OPTIMIZERS
        if select(results, model=model, optimizer=optimizer)
    ]


def table(results: list[Result]) -> Table:
    rows = []
    for where in settings(results):
        row = [where["model"], where["optimizer"]]
        for arm in ("plain", *CLAMPS):
            found = select(results, arm=arm, **where)
            if not found:
                row.append("")
                continue
            accuracy, loss = (statistics.median(one[of] for one in found) for of in (ACCURACY, "loss"))
            cell = f"{accuracy:.1%} ({loss:.2g})"
            if arm != "plain":
                worse = ", ".join(f"{behind(results, of, arm, **where):+.1f}" for of in (ACCURACY, "loss"))
                cell += f"; worse by {worse} sd; {statistics.median(one['shortened'] for one in found):g} shortened"
            row.append(cell)
        rows.append(row)
    steps, seeds = results[0]["steps"], len({one["seed"] for one in results})
    return Table(
        f"Final test accuracy (training loss) after {steps} steps without a spike, medians of {seeds} seeds; how much "
        "worse than with nothing, and how many steps the clamp shortened",
        ["model", "optimizer", *(ARMS[arm] for arm in ("plain", *CLAMPS))],
        rows,
    )


def plot(results: list[Result], figure: Any) -> None:
    panels = figure.subplots(1, 2, sharey=True)
    where = settings(results)
    for panel, of in zip(panels, (ACCURACY, "loss"), strict=True):
        for offset, (arm, colour) in enumerate(zip(CLAMPS, ("tab:red", "tab:blue", "tab:green"), strict=True)):
            worse = [behind(results, of, arm, **one) if select(results, arm=arm, **one) else 0 for one in where]
            panel.barh(
                [place + 0.27 * offset for place in range(len(where))], worse, 0.27, color=colour, label=ARMS[arm]
            )
        panel.axvline(1, color="black", linestyle=":", linewidth=1)
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set(xlabel=f"{of.split('_')[0]}, standard deviations worse than with nothing")
        panel.set(yticks=range(len(where)), yticklabels=[f"{one['model']}, {one['optimizer']}" for one in where])
        panel.invert_yaxis() if panel is panels[0] else None
    panels[1].legend(fontsize=7, loc="lower left")


def claims(results: list[Result]) -> list[Claim]:
    asked = [one for one in settings(results) if one["optimizer"] in ASKED]
    seeds = len({one["seed"] for one in results})

    def worse(arm: str) -> dict[str, float]:
        return {
            f"{one['model']}, {one['optimizer']}, {of.split('_')[0]}": behind(results, of, arm, **one)
            for one in asked
            if select(results, arm=arm, **one)
            for of in (ACCURACY, "loss")
        }

    def words(found: dict[str, float]) -> str:
        behind_one, ahead, most = (
            sum(d > 1 for d in found.values()),
            sum(d < -1 for d in found.values()),
            max(found.values()),
        )
        where = max(found, key=lambda name: found[name])
        return (
            f"of {len(found)} medians over {seeds} seeds {behind_one} are worse by more than one standard deviation, "
            f"{ahead} better by more; the worst is {most:+.1f} ({where})"
        )

    exact, sampled, bound = (worse(arm) for arm in ("exact", "sampled", "bound"))
    spared = sum(d <= 1 for found in (exact, sampled) for d in found.values())
    return [
        Claim(
            "By the exact radius a healthy run ends as without a clamp (at most one standard deviation worse).",
            "left open",
            f"{words(exact)}. On 32 samples, the default: {words(sampled)}",
            judge(spared == len(exact) + len(sampled), spared),
        ),
        Claim(
            "By the bound it does not: protection costs accuracy or loss.",
            "about a point of accuracy, measured again",
            words(bound),
            judge(max(bound.values()) > 1),
        ),
    ]


study = Study(
    name="healthy_runs",
    title="What protection costs a run that needs none.",
    source="Besides arXiv 2603.13552, which leaves the exact radius open.",
    cases=cases,
    run=train,
    table=table,
    plot=plot,
    claims=claims,
    size=(10.5, 4.6),
)

if __name__ == "__main__":
    study.main()
