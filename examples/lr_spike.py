"""A learning rate that is suddenly far too high: what plain Adam, gradient clipping and the clamp make of it.

    python examples/lr_spike.py                                  # all of it; about fifty minutes on two cores
    python examples/lr_spike.py --quick                          # two models, one seed, one severity, half a minute
    python examples/lr_spike.py --models cnn --severities 1000   # a part

Three small models learn scikit-learn's digits, full batch, Adam at 0.015, 200 steps. At step 50 the rate is multiplied
by 10 to 10,000 for one step, or by 10,000 from there to the end. After arXiv 2603.13552, table 1 and figure 10.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import rich
import torch
import torch.nn.functional as F
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import redline
from redline.integrations.demo.data import digits
from redline.integrations.demo.models import Block

SPIKE_AT = 50
SEVERITIES = (10, 100, 1_000, 10_000)
ARMS = {"plain": "Adam", "clip": "Adam, gradients clipped to norm 1", "clamp": "Adam, StepClamp(max_r=1)"}


class Transformer(nn.Module):
    """The digit as one token: a linear map, a pre-norm block with one head, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Linear(64, 32), Block(32, 1, causal=False), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embed(x).unsqueeze(1)).squeeze(1))


class MLP(nn.Sequential):
    """Three layers of Linear, LayerNorm and GELU, of width 64, and a head."""

    def __init__(self) -> None:
        layers = [layer for _ in range(3) for layer in (nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU())]
        super().__init__(*layers, nn.Linear(64, 10))


class CNN(nn.Sequential):
    """Two layers of Conv1d(3), BatchNorm, ReLU, of 32 channels, on the pixels as one sequence; average pool, head."""

    def __init__(self) -> None:
        layers = [
            layer
            for channels in (1, 32)
            for layer in (nn.Conv1d(channels, 32, 3, padding=1), nn.BatchNorm1d(32), nn.ReLU())
        ]
        super().__init__(nn.Unflatten(1, (1, 64)), *layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 10))


MODELS: dict[str, Callable[[], nn.Module]] = {"transformer": Transformer, "mlp": MLP, "cnn": CNN}


class Outcome(NamedTuple):
    """How a run ended: test accuracy in eval mode, and the last training loss."""

    accuracy: float
    loss: float


def train(make: Callable[[], nn.Module], seed: int, arm: str, spiked: range, severity: float, options) -> Outcome:
    """One run; ``spiked``: the steps at which the rate is multiplied by ``severity``."""
    torch.manual_seed(seed)
    model = make()
    train_x, train_y, test_x, test_y = digits()
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr)
    clamp = redline.StepClamp(max_r=1.0, reduction=options.reduction, max_samples=options.samples)
    controllers = [clamp] if arm == "clamp" else []
    with redline.attach(model, optimizer, monitors=[], controllers=controllers):
        for step in range(options.steps):
            optimizer.param_groups[0]["lr"] = options.lr * (severity if step in spiked else 1)
            loss = F.cross_entropy(model(train_x), train_y)
            loss.backward()
            if arm == "clip":
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        accuracy = (model(test_x).argmax(-1) == test_y).float().mean()
    return Outcome(accuracy.item(), loss.item())


class Case(NamedTuple):
    """Runs of one model and arm over the seeds; a severity of 1 is no spike."""

    model: str
    arm: str
    severity: int
    held: bool


def cases(options) -> Iterator[Case]:
    for model in options.models:
        for arm in ("plain", "clamp"):
            yield Case(model, arm, 1, held=False)
        for severity in options.severities:
            for arm in ARMS:
                yield Case(model, arm, severity, held=False)
        for arm in ARMS:
            yield Case(model, arm, max(options.severities), held=True)


def run(case: Case, options) -> list[Outcome]:
    spiked = range(SPIKE_AT, options.steps if case.held else SPIKE_AT + 1)
    return [train(MODELS[case.model], seed, case.arm, spiked, case.severity, options) for seed in range(options.seeds)]


def median(outcomes: list[Outcome], of: str) -> float:
    return statistics.median(getattr(outcome, of) for outcome in outcomes)


def show(found: dict[Case, list[Outcome]], options) -> Table:
    """Median final test accuracy and training loss of each case."""
    table = Table(title=f"Median of {options.seeds} seeds: final test accuracy (last training loss)")
    table.add_column("model", style="cyan")
    table.add_column("spike at step 50")
    for title in ARMS.values():
        table.add_column(title, justify="right")
    rows = dict.fromkeys((case.model, case.severity, case.held) for case in found)
    for model, severity, held in rows:
        spike = "none" if severity == 1 else f"x{severity:,}" + (", held to the end" if held else "")
        cells = []
        for arm in ARMS:
            outcomes = found.get(Case(model, arm, severity, held))
            cells.append(f"{median(outcomes, 'accuracy'):.1%} ({median(outcomes, 'loss'):.3g})" if outcomes else "")
        table.add_row(
            model, spike, *cells, end_section=(model, severity, held) == [r for r in rows if r[0] == model][-1]
        )
    return table


def plot(found: dict[Case, list[Outcome]], options) -> None:
    """Final accuracy (of the CNN, the loss) over the severity of the spike."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(options.models), figsize=(4.2 * len(options.models), 3.6), squeeze=False)
    colours = {"plain": "tab:gray", "clip": "tab:orange", "clamp": "tab:red"}
    for panel, model in zip(panels[0], options.models, strict=True):
        of = "loss" if model == "cnn" else "accuracy"
        twin = found[Case(model, "plain", 1, False)]
        panel.axhline(median(twin, of), color="black", linestyle=":", linewidth=1, label="Adam without a spike")
        for arm, title in ARMS.items():
            each = [[getattr(one, of) for one in found[Case(model, arm, s, False)]] for s in options.severities]
            panel.plot(
                options.severities, [statistics.median(one) for one in each], "o-", color=colours[arm], label=title
            )
            panel.fill_between(
                options.severities,
                [min(one) for one in each],
                [max(one) for one in each],
                color=colours[arm],
                alpha=0.15,
            )
        panel.set(xscale="log", xlabel="rate of step 50, times", title=model, ylabel=f"final {of}")
        panel.set(**({"yscale": "log"} if of == "loss" else {"ylim": (0, 1)}))
    panels[0][0].legend(fontsize=7, loc="lower left")
    figure.suptitle("One step at a rate far too high (median and range over the seeds)", fontsize=10)
    figure.tight_layout()
    figure.savefig(options.plot, dpi=120)
    rich.print(f"Plot: {options.plot}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--severities", nargs="+", type=int, default=list(SEVERITIES), help="(%(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="how many (%(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="of each run; more than 50 (%(default)s)")
    parser.add_argument("--lr", type=float, default=0.015, help="(%(default)s)")
    parser.add_argument("--samples", type=int, help="the clamp measures on; all of the batch by default")
    parser.add_argument(
        "--reduction", type=float, default=1.0, help="quantile of the samples the clamp holds (%(default)s)"
    )
    parser.add_argument("--plot", type=Path, default=Path("lr_spike.png"), help="(%(default)s)")
    parser.add_argument("--quick", action="store_true", help="two models, one seed, one severity, 80 steps")
    options = parser.parse_args()
    if options.quick:
        options.models, options.severities, options.seeds, options.steps = ["transformer", "mlp"], [1_000], 1, 80

    found = {case: run(case, options) for case in track(list(cases(options)), "Training")}
    rich.print(show(found, options))
    plot(found, options)


if __name__ == "__main__":
    main()
