"""The samples that lately bound: a few inputs, kept so that the next sub-sample has them in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from redline.capture import CapturedCall


class SampleMemory:
    """Inputs of the samples of largest ``r`` of the last measurement; they are measured again with the next.

    Whatever tensors of a call have the batch's size are cut into samples. A call whose tensors have other shapes, such
    as shorter sequences, is not joined; what it measures takes the place of what was kept.
    """

    def __init__(self) -> None:
        self._samples: dict[int, Tensor] = {}  # by the tensor's place among the inputs, (samples kept, ...)

    def join(
        self, call: CapturedCall, index: Tensor, batch: int, batch_dim: int, most: int
    ) -> tuple[CapturedCall, int]:
        """The call on ``index``, ``(n,)``, of its samples, and behind them at most ``most`` that were kept.

        Returns:
            The call, and how many were joined.
        """
        leaves, tree = tree_flatten((call.args, call.kwargs))
        cut = {
            place: leaf.index_select(batch_dim, index.to(leaf.device))
            for place, leaf in enumerate(leaves)
            if isinstance(leaf, Tensor) and leaf.dim() > batch_dim and leaf.shape[batch_dim] == batch
        }
        joined = 0
        if (
            most
            and self._samples.keys() == cut.keys()
            and all(_fits(self._samples[place], leaf, batch_dim) for place, leaf in cut.items())
        ):
            for place, leaf in cut.items():
                kept = self._samples[place].narrow(batch_dim, 0, min(most, self._samples[place].shape[batch_dim]))
                cut[place] = torch.cat([leaf, kept.to(leaf.device)], dim=batch_dim)
                joined = kept.shape[batch_dim]
        args, kwargs = tree_unflatten([cut.get(place, leaf) for place, leaf in enumerate(leaves)], tree)
        return replace(call, args=args, kwargs=kwargs), joined

    def keep(self, call: CapturedCall, r: Tensor, batch_dim: int, most: int) -> None:
        """Keep the ``most`` samples of largest ``r``, ``(samples,)``, of a call on so many, largest first."""
        index = r.nan_to_num(nan=-1.0).topk(min(most, len(r))).indices
        leaves, _ = tree_flatten((call.args, call.kwargs))
        self._samples = {
            place: leaf.index_select(batch_dim, index.to(leaf.device))
            for place, leaf in enumerate(leaves)
            if isinstance(leaf, Tensor) and leaf.dim() > batch_dim and leaf.shape[batch_dim] == len(r)
        }

    def state_dict(self) -> dict[str, Any]:
        """The inputs kept."""
        return {"samples": dict(self._samples)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with them."""
        self._samples = dict(state["samples"])


def _fits(kept: Tensor, leaf: Tensor, batch_dim: int) -> bool:
    shapes = [tuple(size for dim, size in enumerate(one.shape) if dim != batch_dim) for one in (kept, leaf)]
    return shapes[0] == shapes[1] and kept.dtype == leaf.dtype
