"""Which process speaks."""

import torch


def is_rank_zero() -> bool:
    """Whether this process is the one that prints and serves."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_rank() == 0
