"""Training without a learning rate: RadiusLR against a sweep of fixed rates.

    python examples/radius_lr.py            # all of it; about five minutes
    python examples/radius_lr.py --quick    # one seed, two rates, two epochs; a few seconds

A convolutional net and a transformer learn scikit-learn's digits in batches of 128 for 15 epochs, with AdamW and with
SGD with momentum: at each of a sweep of fixed rates, and with the length of each step from its radius instead, whatever
the rate: as Redline does by default, and as in arXiv 2603.13552, table 3, without the two limits that Redline adds.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import rich
import torch
import torch.nn.functional as F
from rich.progress import track
from rich.table import Table
from torch import nn

import redline
from redline.integrations.demo.data import digits
from redline.integrations.demo.models import DigitsTransformer

BATCH = 128
OPTIMIZERS = {"AdamW": torch.optim.AdamW, "SGD": partial(torch.optim.SGD, momentum=0.9)}
RATES = {"AdamW": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), "SGD": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)}
BY_RADIUS: dict[str, Callable[[], redline.Controller]] = {
    "RadiusLR(1.0)": partial(redline.RadiusLR, 1.0),
    "without its limits": partial(redline.RadiusLR, 1.0, max_update_to_weight=None, max_growth=None),
}
ANY_RATE = 0.01  # what RadiusLR makes nothing of


class ConvNet(nn.Sequential):
    """Three convolutions with ReLU on the 8 x 8 pixels, and a linear head on what they make of them."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Conv2d(2 * channels, 2 * channels, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * channels, 10),
        )


MODELS: dict[str, Callable[[], nn.Module]] = {"conv net": ConvNet, "transformer": DigitsTransformer}


class Outcome(NamedTuple):
    """How a run ended."""

    accuracy: float
    test_loss: float


def train(model: str, optimizer: str, rate: float, seed: int, epochs: int, *controllers: redline.Controller) -> Outcome:
    """One run, at a rate or under a controller."""
    torch.manual_seed(seed)
    net = MODELS[model]()
    train_x, train_y, test_x, test_y = digits()
    stepped = OPTIMIZERS[optimizer](net.parameters(), lr=rate)
    order = torch.Generator().manual_seed(seed)
    with redline.attach(net, stepped, monitors=[], controllers=controllers):
        for _ in range(epochs):
            for batch in torch.randperm(len(train_x), generator=order).split(BATCH)[:-1]:
                F.cross_entropy(net(train_x[batch]), train_y[batch]).backward()
                stepped.step()
                stepped.zero_grad()
    with torch.no_grad():
        logits = net(test_x)
    accuracy = (logits.argmax(-1) == test_y).float().mean()
    return Outcome(accuracy.item(), F.cross_entropy(logits, test_y).item())


class Arm(NamedTuple):
    """Runs over the seeds: at a fixed rate, or by the radius."""

    model: str
    optimizer: str
    setting: float | str


def run(arm: Arm, options) -> list[Outcome]:
    by_radius = isinstance(arm.setting, str)
    return [
        train(
            arm.model,
            arm.optimizer,
            ANY_RATE if by_radius else arm.setting,
            seed,
            options.epochs,
            *([BY_RADIUS[arm.setting]()] if by_radius else []),
        )
        for seed in range(options.seeds)
    ]


def median(outcomes: list[Outcome], of: str) -> float:
    return statistics.median(getattr(one, of) for one in outcomes)


def show(found: dict[Arm, list[Outcome]], options) -> Table:
    table = Table(title=f"Test accuracy (test loss) after {options.epochs} epochs, medians of {options.seeds} seeds")
    for heading in ("model", "optimizer", "best fixed rate", *BY_RADIUS, "points above the best"):
        table.add_column(heading, justify="left" if heading in ("model", "optimizer") else "right")
    for model in MODELS:
        for optimizer in OPTIMIZERS:
            fixed = {rate: found[Arm(model, optimizer, rate)] for rate in options.rates[optimizer]}
            best = max(fixed, key=lambda rate: median(fixed[rate], "accuracy"))
            cells = [f"{best:g}: {cell(fixed[best])}"]
            cells += [cell(found[Arm(model, optimizer, name)]) for name in BY_RADIUS]
            ours = found[Arm(model, optimizer, next(iter(BY_RADIUS)))]
            ahead = median(ours, "accuracy") - median(fixed[best], "accuracy")
            table.add_row(model, optimizer, *cells, f"{100 * ahead:+.1f}")
    return table


def cell(outcomes: list[Outcome]) -> str:
    return f"{median(outcomes, 'accuracy'):.1%} ({median(outcomes, 'test_loss'):.3g})"


def plot(found: dict[Arm, list[Outcome]], options) -> None:
    """Accuracy over the rate, and beside it what needs none."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 2, figsize=(9, 6.4), sharey=True)
    for row, model in zip(panels, MODELS, strict=True):
        for panel, optimizer in zip(row, OPTIMIZERS, strict=True):
            rates = options.rates[optimizer]
            each = [[one.accuracy for one in found[Arm(model, optimizer, rate)]] for rate in rates]
            panel.plot(rates, [statistics.median(one) for one in each], "o-", color="tab:gray", label="fixed rate")
            panel.fill_between(rates, [min(e) for e in each], [max(e) for e in each], color="tab:gray", alpha=0.15)
            for name, colour in zip(BY_RADIUS, ("tab:red", "tab:orange"), strict=True):
                ended = [one.accuracy for one in found[Arm(model, optimizer, name)]]
                panel.axhline(statistics.median(ended), color=colour, label=name)
                panel.axhspan(min(ended), max(ended), color=colour, alpha=0.1)
            panel.set(xscale="log", ylim=(0, 1), title=f"{model}, {optimizer}", xlabel="rate", ylabel="test accuracy")
    panels[0][0].legend(fontsize=8, loc="lower center")
    figure.tight_layout()
    figure.savefig(options.plot, dpi=110)
    rich.print(f"Plot: {options.plot}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10, help="how many (%(default)s)")
    parser.add_argument("--epochs", type=int, default=15, help="(%(default)s)")
    parser.add_argument("--plot", type=Path, default=Path("radius_lr.png"), help="(%(default)s)")
    parser.add_argument("--quick", action="store_true", help="one seed, two rates, two epochs")
    options = parser.parse_args()
    options.rates = RATES
    if options.quick:
        options.seeds, options.epochs, options.rates = 1, 2, {name: rates[2:4] for name, rates in RATES.items()}

    arms = [
        Arm(model, optimizer, setting)
        for model in MODELS
        for optimizer in OPTIMIZERS
        for setting in (*options.rates[optimizer], *BY_RADIUS)
    ]
    found = {arm: run(arm, options) for arm in track(arms, "Training")}
    rich.print(show(found, options))
    plot(found, options)


if __name__ == "__main__":
    main()
