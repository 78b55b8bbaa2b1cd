"""A small residual network on images, for the benchmarks."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """conv-BN-ReLU-conv-BN added to what came in; ``stride`` and a change of width go through a 1x1 convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.skip(x))


class ResNet(nn.Sequential):
    """Three stages of residual blocks: ``(batch, 3, 32, 32)`` to ``(batch, 10)`` logits."""

    def __init__(self, width: int = 16, blocks: int = 2) -> None:
        widths = [width] * blocks + [2 * width] * blocks + [4 * width] * blocks
        before = [width, *widths[:-1]]
        super().__init__(
            nn.Conv2d(3, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            *(ResidualBlock(a, b, 1 if a == b else 2) for a, b in zip(before, widths, strict=True)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4 * width, 10),
        )


def image_batches(batch: int) -> Callable[[torch.Generator], tuple[Tensor, Tensor]]:
    """Random images and labels."""
    return lambda generator: (
        torch.randn(batch, 3, 32, 32, generator=generator),
        torch.randint(10, (batch,), generator=generator),
    )
