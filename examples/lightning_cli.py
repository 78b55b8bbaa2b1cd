"""Redline from a configuration file: LightningCLI builds the callback, its monitors, controllers and sinks.

    pip install -c constraints.txt "jsonargparse[signatures]"
    python examples/lightning_cli.py fit --config examples/lightning_cli.yaml
    python examples/lightning_cli.py fit --config examples/lightning_cli.yaml --trainer.max_steps 20   # a quick look

Nothing here knows of Redline; all that does is in lightning_cli.yaml, beside this file.
"""

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader, TensorDataset

from redline.integrations.demo.data import digits
from redline.integrations.demo.models import DigitsTransformer


class Digits(LightningModule):
    """A small transformer on handwritten digits."""

    def __init__(self, learning_rate: float = 3e-3) -> None:
        super().__init__()
        self.net, self.learning_rate = DigitsTransformer(), learning_rate

    def train_dataloader(self):
        inputs, labels, _, _ = digits()
        return DataLoader(TensorDataset(inputs, labels), batch_size=128, shuffle=True)

    def training_step(self, batch, batch_idx):
        inputs, labels = batch
        return F.cross_entropy(self.net(inputs), labels)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


if __name__ == "__main__":
    LightningCLI(Digits, save_config_callback=None)  # saved settings would stand in the way of a second run
