"""Names of parameters and modules, whatever the model was wrapped in."""

from __future__ import annotations

# The segments that torch.compile, checkpoint_wrapper and FullyShardedDataParallel put into names.
_OF_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


def plain_name(name: str) -> str:
    """A qualified name as it is in the model that is neither compiled, checkpointed nor sharded."""
    return ".".join(part for part in name.split(".") if part not in _OF_WRAPPERS)
