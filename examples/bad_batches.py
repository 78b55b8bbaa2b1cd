"""One bad batch, or new data: what each protection makes of it, and what none of them helps with.

    python examples/bad_batches.py           # some forty seconds on two cores
    python examples/bad_batches.py --quick   # one optimizer, fewer steps

A small network learns scikit-learn's digits in batches of 64. At step 150 something happens to the data.
"""

import argparse
import functools

import rich
import torch
import torch.nn.functional as F
from rich.progress import track
from rich.table import Table
from torch import nn

import redline
from redline.integrations.demo.data import digits

AT = 150
OPTIMIZERS = {
    "SGD, momentum": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "Adam": functools.partial(torch.optim.Adam, lr=3e-3),
}
PROTECTIONS = {
    "nothing": lambda: [],
    "clipping": lambda: [],  # of the gradients to norm 1, in the loop
    "NonFiniteGuard": lambda: [redline.NonFiniteGuard()],
    "StepClamp": lambda: [redline.StepClamp()],
    "SpikeGuard": lambda: [redline.SpikeGuard()],
    "all three": lambda: [redline.NonFiniteGuard(), redline.SpikeGuard(), redline.StepClamp()],
}


def nothing(inputs, labels, step):
    return inputs, labels, 1.0


def shuffled_labels(inputs, labels, step):
    return (inputs, labels.roll(1), 1000.0) if step == AT else (inputs, labels, 1.0)


def large_inputs(inputs, labels, step):
    return (1000 * inputs, labels, 1.0) if step == AT else (inputs, labels, 1.0)


def nan_input(inputs, labels, step):
    if step == AT:
        inputs = inputs.clone()
        inputs[0, 0] = torch.nan
    return inputs, labels, 1.0


def new_data(inputs, labels, step):
    return (inputs.flip(1), (labels + 3) % 10, 1.0) if step >= AT else (inputs, labels, 1.0)


INCIDENTS = {
    "nothing happens": nothing,
    "labels shuffled, loss x1000, one batch": shuffled_labels,
    "inputs x1000, one batch": large_inputs,
    "one NaN among the inputs, one batch": nan_input,
    "other data from there on": new_data,
}


def train(make, incident, protection: str, steps: int) -> tuple[str, int]:
    """Test accuracy at step 160 and at the end, in words; and how often a controller stepped in."""
    torch.manual_seed(0)
    train_x, train_y, test_x, test_y = digits()
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = make(model.parameters())
    batches, accuracies = torch.Generator().manual_seed(0), []

    def accuracy(step: int) -> float:
        inputs, labels, _ = incident(test_x, test_y, step) if incident is new_data else (test_x, test_y, 1.0)
        with torch.no_grad():
            return (model(inputs).argmax(-1) == labels).float().mean().item()

    with redline.attach(model, optimizer, monitors=[], controllers=PROTECTIONS[protection]()) as session:
        for step in range(steps):
            chosen = torch.randint(len(train_x), (64,), generator=batches)
            inputs, labels, weight = incident(train_x[chosen], train_y[chosen], step)
            loss = weight * F.cross_entropy(model(inputs), labels)
            session.observe(loss=loss)
            loss.backward()
            if protection == "clipping":
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            try:
                optimizer.step()
            except redline.RunStoppedError:
                return f"stopped at step {step}", len(session.interventions)
            optimizer.zero_grad()
            if step in (AT + 10, steps - 1):
                accuracies.append(accuracy(step))
    return " → ".join(f"{one:.1%}" for one in accuracies), len(session.interventions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="of each run; more than 160 (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="SGD alone, 200 steps")
    options = parser.parse_args()
    if options.quick:
        options.steps = 200
    optimizers = dict(list(OPTIMIZERS.items())[: 1 if options.quick else None])

    for name, make in optimizers.items():
        table = Table(title=f"{name}: test accuracy 10 steps after it → at step {options.steps} (steps intervened)")
        table.add_column("at step 150", style="cyan", no_wrap=True)
        for protection in PROTECTIONS:
            table.add_column(protection, justify="right")
        for what, incident in track(INCIDENTS.items(), name):
            cells = [train(make, incident, protection, options.steps) for protection in PROTECTIONS]
            table.add_row(what, *(f"{words} ({count})" if count else words for words, count in cells))
        rich.print(table)


if __name__ == "__main__":
    main()
