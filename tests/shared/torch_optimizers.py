"""torch's optimizers over a model, alone or two of them, at the rates of the tests."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer


def sgd(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-2)]


def adam(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.Adam(model.parameters(), 1e-2)]


def adamw(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.AdamW(model.parameters(), 1e-2)]


def adamw_foreach(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.AdamW(model.parameters(), 1e-2, foreach=True)]


def adamw_fused(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.AdamW(model.parameters(), 1e-2, fused=True)]


def muon_and_adamw(model: nn.Module) -> list[Optimizer]:
    """Matrices belong to Muon, all else to AdamW."""
    parameters = list(model.parameters())
    return [
        torch.optim.Muon([parameter for parameter in parameters if parameter.dim() == 2], 0.02),
        torch.optim.AdamW([parameter for parameter in parameters if parameter.dim() != 2], 1e-2),
    ]
