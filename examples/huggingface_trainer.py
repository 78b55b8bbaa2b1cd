"""Redline in Hugging Face's Trainer: a small GPT-2 on the bytes of Python's standard library, watched by one callback.

python examples/huggingface_trainer.py              # 150 steps, some 20 seconds
python examples/huggingface_trainer.py --steps 10   # a quick look

The model is made from a configuration; nothing is downloaded.
"""

import argparse
import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

import redline
from redline.integrations.demo.data import library_bytes
from redline.integrations.huggingface import RedlineTrainerCallback


class Windows(torch.utils.data.Dataset):
    """The text, cut into windows of ``length`` bytes; the model shifts the labels itself."""

    def __init__(self, text, length):
        self.rows = text[: len(text) // length * length].view(-1, length).long()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--lr", type=float, default=1e-3, help="try 0.1 to see the redline crossed (%(default)s)")
    options = parser.parse_args()

    set_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=256, n_positions=64, n_embd=96, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    )
    watch = RedlineTrainerCallback(sinks=[redline.ConsoleReport(every=50)])  # <- Redline
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(
                folder,
                max_steps=options.steps,
                per_device_train_batch_size=32,
                learning_rate=options.lr,
                logging_steps=max(options.steps // 3, 1),
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=Windows(library_bytes(), length=64),
            callbacks=[watch],  # <- Redline
        )
        trainer.train()

    logged = [entry["redline_normalized_step_size"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"The trainer's own log has r = {', '.join(f'{r:.3g}' for r in logged)}.")


if __name__ == "__main__":
    main()
