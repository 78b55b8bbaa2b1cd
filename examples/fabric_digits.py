"""Redline in Lightning Fabric: a loop of one's own on handwritten digits, saved and gone on with half-way.

python examples/fabric_digits.py              # 300 steps, a few seconds
python examples/fabric_digits.py --steps 20   # a quick look
"""

import argparse
import logging
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch.utils.data import DataLoader, TensorDataset

import redline
from redline.integrations.demo.data import digits
from redline.integrations.demo.models import DigitsTransformer
from redline.integrations.fabric import attach


def train(checkpoint: Path, steps: int, lr: float) -> None:
    """``steps`` more steps, from the checkpoint if there is one."""
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.seed_everything(0, verbose=False)
    train_x, train_y, test_x, test_y = digits()
    model = DigitsTransformer()
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=lr))
    loader = fabric.setup_dataloaders(DataLoader(TensorDataset(train_x, train_y), batch_size=128, shuffle=True))

    session = attach(fabric, model, optimizer, sinks=[redline.ConsoleReport(every=100)])  # <- Redline
    state = {"model": model, "optimizer": optimizer, "redline": session}  # <- Redline
    if checkpoint.exists():
        fabric.load(checkpoint, state)
    left = steps
    while left > 0:
        for inputs, labels in loader:
            loss = F.cross_entropy(model(inputs), labels)
            session.observe(loss=loss)  # <- Redline, optional: a loop's loss is not visible otherwise
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            left -= 1
            if left == 0:
                break
    fabric.save(checkpoint, state)
    session.close()  # <- Redline

    with torch.no_grad():
        accuracy = (model(test_x).argmax(-1) == test_y).float().mean()
    taken = session.latest.value("redline_steps_total")
    print(f"Test accuracy {accuracy:.1%} after {taken:.0f} steps.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=3e-3, help="try 0.1 to see the redline crossed (%(default)s)")
    options = parser.parse_args()

    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        for steps in (options.steps // 2, options.steps - options.steps // 2):
            train(Path(folder) / "run.ckpt", steps, options.lr)


if __name__ == "__main__":
    main()
