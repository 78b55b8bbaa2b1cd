"""A rate that becomes a thousand times too high and stays so: at three rates, with the clamp and without.

    python examples/studies/held_spike.py            # ten seeds, a minute
    python examples/studies/held_spike.py --quick    # two seeds, some seconds

An MLP 64-128-10 with ReLU learns scikit-learn's digits in batches of 64 with Adam, 200 steps; from step 50 on the rate
is a thousand times what it was. After arXiv 2603.13552, figure 6.
"""

import statistics
from typing import Any

import torch
import torch.nn.functional as F
from study import Case, Claim, Result, Study, Table, judge, select
from torch import nn

import redline
from redline.integrations.demo.data import digits

RATES = (1e-4, 1e-3, 1e-2)
ARMS = {"plain": "Adam", "bound": "clamped by the bound", "exact": "clamped by the exact radius"}
STEPS, SPIKE_AT, SEVERITY = 200, 50, 1_000
CHANCE = 0.1


def run(rate: float, arm: str, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    train_x, train_y, test_x, test_y = digits()
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    batches = torch.Generator().manual_seed(seed)
    controllers = [] if arm == "plain" else [redline.StepClamp(radius=arm, max_samples=None)]
    course = []
    with redline.attach(model, optimizer, monitors=[], controllers=controllers):
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = rate * (SEVERITY if step >= SPIKE_AT else 1)
            batch = torch.randint(len(train_x), (64,), generator=batches)
            F.cross_entropy(model(train_x[batch]), train_y[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % 5 == 4:
                with torch.no_grad():
                    course.append(round((model(test_x).argmax(-1) == test_y).double().mean().item(), 4))
    return {"course": course}  # test accuracy after every fifth step


def cases(quick: bool) -> list[Case]:
    return [
        {"rate": rate, "arm": arm, "seed": seed} for rate in RATES for arm in ARMS for seed in range(2 if quick else 10)
    ]


def accuracies(results: list[Result], after: int, **where: Any) -> list[float]:
    return [one["course"][after // 5 - 1] for one in select(results, **where)]


def median(results: list[Result], after: int, **where: Any) -> float:
    return statistics.median(accuracies(results, after, **where))


def table(results: list[Result]) -> Table:
    rows = []
    for rate in RATES:
        before = median(results, SPIKE_AT, rate=rate, arm="plain")
        cells = []
        for arm in ARMS:
            ends = accuracies(results, STEPS, rate=rate, arm=arm)
            cells.append(f"{statistics.median(ends):.1%} ({min(ends):.1%} to {max(ends):.1%})")
        rows.append([f"{rate:g}", f"{before:.1%}", *cells])
    seeds = len({one["seed"] for one in results})
    return Table(
        f"Test accuracy, medians of {seeds} seeds (range)",
        ["rate", f"after step {SPIKE_AT}", *(f"at the end, {title}" for title in ARMS.values())],
        rows,
    )


def plot(results: list[Result], figure: Any) -> None:
    panels = figure.subplots(1, len(RATES), sharey=True)
    for panel, rate in zip(panels, RATES, strict=True):
        for (arm, title), colour in zip(ARMS.items(), ("tab:gray", "tab:red", "tab:blue"), strict=True):
            steps = range(5, STEPS + 1, 5)
            courses = list(zip(*(one["course"] for one in select(results, rate=rate, arm=arm)), strict=True))
            panel.plot(steps, [statistics.median(one) for one in courses], color=colour, label=title)
            panel.fill_between(steps, [min(c) for c in courses], [max(c) for c in courses], color=colour, alpha=0.15)
        panel.axvline(SPIKE_AT, color="black", linestyle=":", linewidth=1)
        panel.set(title=f"Adam, lr {rate:g}, x{SEVERITY:,} from step {SPIKE_AT} on", xlabel="step", ylim=(0, 1))
    panels[0].set_ylabel("test accuracy")
    panels[0].legend(fontsize=8, loc="lower right")


def claims(results: list[Result]) -> list[Claim]:
    plain = [median(results, STEPS, rate=rate, arm="plain") for rate in RATES]
    before = [median(results, SPIKE_AT, rate=rate, arm="plain") for rate in RATES]
    # In turn: better than before the spike, within 15 points of half, within 10 points of chance.
    seen = [plain[0] > before[0], abs(plain[1] - 0.5) < 0.15, plain[2] < CHANCE + 0.1]
    ends = {arm: [median(results, STEPS, rate=rate, arm=arm) for rate in RATES] for arm in ("bound", "exact")}
    survived = [end >= max(start - 0.05, 0.8) for arm in ends for end, start in zip(ends[arm], before, strict=True)]
    seeds = len({one["seed"] for one in results})

    def words(values: list[float]) -> str:
        return ", ".join(f"{value:.1%}" for value in values)

    return [
        Claim(
            "Plain Adam recovers at the lowest rate, stays near half at the middle one, and is at chance at the third.",
            "recovers, near 50 %, chance (figure 6)",
            f"{words(plain)}, where it had {words(before)} before the spike (medians of {seeds} seeds)",
            judge(all(seen), any(seen)),
        ),
        Claim(
            "With the clamp the run survives at all three (80 % at least, and no more than 5 points below its start).",
            "survives all three (figure 6)",
            f"by the bound {words(ends['bound'])}; by the exact radius {words(ends['exact'])}",
            judge(all(survived), any(survived)),
        ),
    ]


study = Study(
    name="held_spike",
    title="A rate a thousand times too high, for good.",
    source="arXiv 2603.13552, figure 6.",
    cases=cases,
    run=run,
    table=table,
    plot=plot,
    claims=claims,
    size=(11.0, 3.6),
)

if __name__ == "__main__":
    study.main()
