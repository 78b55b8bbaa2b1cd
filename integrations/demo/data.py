"""Real data that is on every machine: scikit-learn's digits, and the sources of Python's standard library."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Handwritten digits: training inputs and labels, test inputs and labels.

    Inputs are ``(samples, 64)`` float32 in [0, 1] (pixels / 16), labels ``(samples,)`` int64 of 10 classes. The first
    20 % of the 1,797 samples are the test set.
    """
    bunch = load_digits()
    inputs = torch.tensor(bunch.data, dtype=torch.float32) / 16
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    split = len(inputs) // 5
    return inputs[split:], labels[split:], inputs[:split], labels[:split]


def library_bytes(most: int = 4_000_000) -> Tensor:
    """The first ``most`` bytes of the standard library's ``.py`` files, in alphabetical order: ``(bytes,)``, uint8."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = bytearray()
    for path in sorted(folder.glob("*.py")):
        text += path.read_bytes()
        if len(text) >= most:
            break
    return torch.frombuffer(text[:most], dtype=torch.uint8).clone()


def byte_batch(text: Tensor, batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random windows of the text and the bytes that follow: two ``(batch, length)`` int64 tensors."""
    starts = torch.randint(len(text) - length - 1, (batch, 1), generator=generator)
    windows = text[starts + torch.arange(length + 1)].long()
    return windows[:, :-1], windows[:, 1:]
