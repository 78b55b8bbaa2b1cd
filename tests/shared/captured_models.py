"""Models whose calls are captured: nested, and without a forward of their own."""

from __future__ import annotations

from torch import Tensor, nn


class Pair(nn.Module):
    """Two inputs, one by keyword; submodules nested two deep."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 3)))
        self.right = nn.Linear(2, 3)

    def forward(self, x: Tensor, *, other: Tensor | None = None) -> Tensor:
        return self.left(x) if other is None else self.left(x) + self.right(other)


class Trainer(nn.Module):
    """Has no forward: its training loop calls some of its children."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)
