"""A fingerprint of all that observing must not change: a digest of each kind of thing."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def fingerprint(model: nn.Module, optimizers: list[Optimizer], loss: Tensor) -> dict[str, str]:
    """A digest of each kind of thing that observing must not change."""
    named = dict(model.named_parameters())
    return {
        "loss": digest(loss),
        "parameters": digest(named),
        "buffers": digest(dict(model.named_buffers())),
        "gradients": digest({name: parameter.grad for name, parameter in named.items()}),
        "optimizer state": digest([optimizer.state_dict() for optimizer in optimizers]),
        "requires_grad": digest({name: parameter.requires_grad for name, parameter in named.items()}),
        "modes": digest({name: module.training for name, module in model.named_modules()}),
        "torch's stream": digest(torch.get_rng_state()),
        "numpy's stream": digest(np.random.get_state()),  # noqa: NPY002 the run's own stream
        "python's stream": digest(random.getstate()),
        "settings": digest(settings()),
    }


def settings() -> list[Any]:
    return [
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_cache_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.mkldnn.enabled,
        torch.backends.mkldnn.deterministic,
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.are_deterministic_algorithms_enabled(),
    ]


def digest(value: Any) -> str:
    sha = hashlib.sha256()

    def take(value: Any) -> None:
        if isinstance(value, Tensor):
            sha.update(repr((value.dtype, tuple(value.shape))).encode())
            sha.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, np.ndarray):
            sha.update(value.tobytes())
        elif isinstance(value, dict):
            for key, inner in value.items():
                sha.update(repr(key).encode())
                take(inner)
        elif isinstance(value, (list, tuple)):
            sha.update(str(len(value)).encode())
            for inner in value:
                take(inner)
        else:
            sha.update(repr(value).encode())

    take(value)
    return sha.hexdigest()
