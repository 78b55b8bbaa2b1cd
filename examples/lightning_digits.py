"""Redline in Lightning: a small transformer on handwritten digits, watched by one callback.

python examples/lightning_digits.py              # 300 steps, a few seconds
python examples/lightning_digits.py --steps 20   # a quick look
"""

import argparse
import logging

import lightning as L
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import redline
from redline.integrations.demo.data import digits
from redline.integrations.demo.models import DigitsTransformer
from redline.integrations.lightning import RedlineCallback


class Digits(L.LightningModule):
    """The network and its training step; nothing here knows of Redline."""

    def __init__(self, learning_rate: float) -> None:
        super().__init__()
        self.net, self.learning_rate = DigitsTransformer(), learning_rate

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        return F.cross_entropy(self.net(inputs), labels)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=3e-3, help="try 0.1 to see the redline crossed (%(default)s)")
    options = parser.parse_args()

    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    L.seed_everything(0, verbose=False)
    train_x, train_y, test_x, test_y = digits()
    model = Digits(options.lr)
    watch = RedlineCallback(sinks=[redline.ConsoleReport(every=100)])  # <- Redline
    trainer = L.Trainer(
        max_steps=options.steps,
        accelerator="cpu",
        callbacks=[watch],  # <- Redline
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(TensorDataset(train_x, train_y), batch_size=128, shuffle=True))

    with torch.no_grad():
        accuracy = (model.net(test_x).argmax(-1) == test_y).float().mean()
    print(f"Test accuracy {accuracy:.1%}; the longest step had r = {watch.session.report().step_sizes.highest:.3g}.")


if __name__ == "__main__":
    main()
