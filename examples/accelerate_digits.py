"""Redline in a loop that accelerate drives: handwritten digits, two micro-batches a step, each step held in by a clamp.

python examples/accelerate_digits.py              # 150 steps, a few seconds
python examples/accelerate_digits.py --steps 20   # a quick look
"""

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, TensorDataset

import redline
from redline.integrations.accelerate import attach
from redline.integrations.demo.data import digits
from redline.integrations.demo.models import DigitsTransformer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--lr", type=float, default=3e-3, help="try 0.1 to see the redline crossed (%(default)s)")
    options = parser.parse_args()

    set_seed(0)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    train_x, train_y, test_x, test_y = digits()
    loader = DataLoader(TensorDataset(train_x, train_y), batch_size=64, shuffle=True)
    model = DigitsTransformer()
    model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=options.lr), loader)

    sinks, controllers = [redline.ConsoleReport(every=50)], [redline.StepClamp()]
    with attach(accelerator, model, optimizer, sinks=sinks, controllers=controllers) as session:  # <- Redline
        accelerator.register_for_checkpointing(session)  # <- Redline: accelerator.save_state() has it too
        while session.latest.value("redline_steps_total") < options.steps:
            for inputs, labels in loader:
                with accelerator.accumulate(model):
                    loss = F.cross_entropy(model(inputs), labels)
                    session.observe(loss=loss)  # <- Redline, optional: a loop's loss is not visible otherwise
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()

    with torch.no_grad():
        accuracy = (model(test_x).argmax(-1) == test_y).float().mean()
    print(f"Test accuracy {accuracy:.1%}; the clamp shortened {len(session.interventions)} steps.")


if __name__ == "__main__":
    main()
