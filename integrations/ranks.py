"""Which process speaks, and from where."""

import os

import torch

from redline.errors import ConfigurationError


def is_rank_zero() -> bool:
    """Whether this process is the one that prints and serves."""
    return not _distributed() or torch.distributed.get_rank() == 0


def local_rank() -> int:
    """This process's place among the run's processes on its machine, from 0.

    Raises:
        ConfigurationError: there are several processes, and none of the launchers known said which this is.
    """
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    if _distributed() and torch.distributed.get_world_size() > 1:
        raise ConfigurationError(
            "got several processes and no LOCAL_RANK; expected it from the launcher, as torchrun and Lightning set it. "
            "Set LOCAL_RANK to each process's place on its machine, from 0."
        )
    return 0


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
