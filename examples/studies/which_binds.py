"""Which radius binds: the output's, attention's or the feed-forward's (arXiv 2603.13552, table 2).

    python examples/studies/which_binds.py            # two optimizers, early and late, five seeds; some minutes
    python examples/studies/which_binds.py --quick    # one seed, six steps each; a few seconds

A tiny transformer reads scikit-learn's digits, the 8 rows of each as tokens behind a class token. Each step goes along
what the optimizer proposes, and its length is the smallest of three radii: of the output's softmax, of attention's,
and of the feed-forward's ReLU (the 1 % quantile of |h| / |dh| over its inputs h); of each kind that of the layer where
it is shortest. Which of the three was the smallest is counted over 100 steps from the start, early, and over 105 steps
of a model that 400 plain steps of Adam have trained, late.

What the paper leaves open is chosen here: ReLU, since |h| is the distance from its kink; the gradient and Adam;
batches of 256; what early and late are. The last column says how often the output would bind if the feed-forward's
radius were its 10 % quantile: along the same steps, whose length goes by 1 %.
"""

import statistics
from typing import Any

import torch
import torch.nn.functional as F
from study import Case, Claim, Result, Study, Table, Verdict, judge, select
from torch import Tensor, nn

from redline.integrations.demo.data import digits
from redline.integrations.demo.models import Block, DigitsTransformer
from redline.numerics import logit_tangent, normalized_step_size
from redline.numerics.tangents import MATH_ATTENTION

RADII = ("output", "attention", "feed-forward")
OPTIMIZERS = {"gradient": torch.optim.SGD, "Adam": torch.optim.Adam}
ANY_RATE = 1e-3  # the radius gives the length
STEPS = {"early": 100, "late": 105}
TRAINING = 400
BATCH = 256
MOSTLY, NEARLY_ALWAYS = 0.5, 0.9
"""Shares of the steps: what was published is nearly always, or never."""


class ReLUBlock(Block):
    """The demo's block with ReLU in place of GELU, which has no singularity."""

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, time, width)`` to the same."""
        batch, time, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, time, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, time, width))
        return x + self.down(F.relu(self.up(self.norm_feedforward(x))))


def transformer(width: int = 32, layers: int = 2, heads: int = 4) -> nn.Module:
    model = DigitsTransformer(width, layers, heads)
    model.blocks = nn.ModuleList(ReLUBlock(width, heads, causal=False) for _ in range(layers))
    return model


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()


def shortest_radius_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor
) -> tuple[float, list[float]]:
    """A step along what the optimizer proposes, of the length of the shortest radius.

    Returns:
        The loss before it, and the length of the proposed step over each of ``RADII`` and over a feed-forward radius by
        the 10 % quantile.
    """
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    loss = plain_step(model, optimizer, x, y)
    update = {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}
    tangent = logit_tangent(model, (x,), None, update, method=MATH_ATTENTION, parameters=before, layers=True)
    assert tangent.layers is not None
    of_layers = (tangent.layers.attention, tangent.layers.activation(0.01), tangent.layers.activation(0.1))
    sizes = [normalized_step_size(tangent.tangent).item(), *(max(one.values()).item() for one in of_layers)]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name] + update[name] / max(sizes[:3]))
    return loss, sizes


def run(optimizer: str, phase: str, seed: int, steps: int, training: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    train_x, train_y, test_x, test_y = digits()
    model, order = transformer(), torch.Generator().manual_seed(seed)
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(training if phase == "late" else 0):
        batch = torch.randint(len(train_x), (64,), generator=order)
        plain_step(model, adam, train_x[batch], train_y[batch])
    stepped = OPTIMIZERS[optimizer](model.parameters(), lr=ANY_RATE)
    losses, sizes = [], []
    for _ in range(steps):
        batch = torch.randint(len(train_x), (BATCH,), generator=order)
        loss, lengths = shortest_radius_step(model, stepped, train_x[batch], train_y[batch])
        losses.append(float(f"{loss:.4g}"))
        sizes.append([float(f"{length / max(lengths[:3]):.4g}") for length in lengths])  # of the step as it was made
    with torch.no_grad():
        accuracy = (model(test_x).argmax(-1) == test_y).float().mean().item()
    return {"sizes": sizes, "losses": losses, "accuracy": accuracy}


def cases(quick: bool) -> list[Case]:
    seeds, most, training = (1, 6, 40) if quick else (5, 1000, TRAINING)
    return [
        {"optimizer": name, "phase": phase, "seed": seed, "steps": min(steps, most), "training": training}
        for name in OPTIMIZERS
        for phase, steps in STEPS.items()
        for seed in range(seeds)
    ]


def share(results: list[Result], radius: str, wide: bool = False) -> float:
    """Of the steps of all these runs, at how many it bound; ``wide``: with the feed-forward's 10 % quantile."""
    bound = []
    for one in results:
        for output, attention, narrow, other in one["sizes"]:
            sizes = (output, attention, other if wide else narrow)
            bound.append(RADII[sizes.index(max(sizes))])
    return bound.count(radius) / len(bound)


def output_against_feed_forward(results: list[Result]) -> float:
    """Median over steps and runs of the output's step size over the feed-forward's."""
    return statistics.median(sizes[0] / sizes[2] for one in results for sizes in one["sizes"])


def table(results: list[Result]) -> Table:
    rows = []
    for name in OPTIMIZERS:
        for phase in STEPS:
            runs = select(results, optimizer=name, phase=phase)
            rows.append(
                (
                    f"{name}, {phase}",
                    f"{runs[0]['steps']} x {len(runs)}",
                    *(f"{share(runs, radius):.1%}" for radius in RADII),
                    f"{output_against_feed_forward(runs):.2f}",
                    f"{statistics.mean(one['losses'][-1] for one in runs):.3g}",
                    f"{statistics.mean(one['accuracy'] for one in runs):.1%}",
                    f"{share(runs, 'output', wide=True):.1%}",
                )
            )
    columns = ("", "steps", *RADII, "output/ff", "loss", "acc.", "output, 10 %")
    return Table("Share of steps at which each radius was the shortest", columns, rows)


def plot(results: list[Result], figure: Any) -> None:
    axes = figure.subplots(1, 4, sharey=True)
    for ax, (name, phase) in zip(axes, [(name, phase) for name in OPTIMIZERS for phase in STEPS], strict=True):
        runs = select(results, optimizer=name, phase=phase)
        steps = list(zip(*(one["sizes"] for one in runs), strict=True))
        for place, radius in enumerate(RADII):
            middle = [statistics.median(sizes[place] for sizes in step) for step in steps]
            ax.plot(middle, label=radius, linewidth=1)
        ax.set(title=f"{name}, {phase}", xlabel="step", yscale="log")
    axes[0].set_ylabel("step over radius, median; 1 binds")
    axes[0].legend()


def claims(results: list[Result]) -> list[Claim]:
    return [
        binds("Early the feed-forward binds.", "94 of 100 steps (table 2)", results, "early", "feed-forward"),
        binds("Late the output binds.", "97 of 105 steps (table 2)", results, "late", "output"),
        grows(results),
        never(results),
    ]


def binds(claim: str, published: str, results: list[Result], phase: str, radius: str) -> Claim:
    """Holds where it binds nearly always with each optimizer, in part where it binds mostly with any."""
    shares = {name: share(select(results, optimizer=name, phase=phase), radius) for name in OPTIMIZERS}
    verdict: Verdict = "does not hold here"
    if min(shares.values()) >= NEARLY_ALWAYS:
        verdict = "holds"
    elif max(shares.values()) >= MOSTLY:
        verdict = "holds in part"
    found = " and ".join(f"{value:.1%} ({name})" for name, value in shares.items())
    runs = select(results, phase=phase)
    other = f"were the feed-forward's radius its 10 % quantile, {share(runs, radius, wide=True):.1%}"
    return Claim(claim, published, f"{found} of the steps, {over(results)}; {other}", verdict)


def grows(results: list[Result]) -> Claim:
    """Holds where the step comes at least twice as near the output's radius with each optimizer, in part with any."""
    ratios = {
        name: [output_against_feed_forward(select(results, optimizer=name, phase=phase)) for phase in STEPS]
        for name in OPTIMIZERS
    }
    grown = [late >= 2 * early for early, late in ratios.values()]
    verdict: Verdict = judge(all(grown), any(grown))
    found = " and ".join(f"{early:.2f} to {late:.2f} ({name})" for name, (early, late) in ratios.items())
    return Claim(
        "From early to late the output's radius comes down against the feed-forward's.",
        "the feed-forward binds early, the output late (table 2)",
        f"step over the output's radius, where 1 is the feed-forward's, in the median: {found}, {over(results)}",
        verdict,
    )


def never(results: list[Result]) -> Claim:
    """Holds where it binds at no step of any run, in part where at a tenth at most of those of any optimizer."""
    shares = {name: share(select(results, optimizer=name), "attention") for name in OPTIMIZERS}
    verdict: Verdict = "does not hold here"
    if max(shares.values()) == 0:
        verdict = "holds"
    elif max(shares.values()) <= 1 - NEARLY_ALWAYS:
        verdict = "holds in part"
    found = " and ".join(f"{value:.1%} ({name})" for name, value in shares.items())
    return Claim(
        "Attention never binds.", "0 of 205 steps (table 2)", f"{found} of the steps, {over(results)}", verdict
    )


def over(results: list[Result]) -> str:
    runs = len({one["seed"] for one in results})
    return f"{runs} run{'s' if runs > 1 else ''} of each"


study = Study(
    name="which_binds",
    title="Which radius binds: the output's, attention's or the feed-forward's.",
    source="arXiv 2603.13552, table 2",
    cases=cases,
    run=run,
    table=table,
    plot=plot,
    claims=claims,
    size=(12.0, 4.0),
)

if __name__ == "__main__":
    study.main()
