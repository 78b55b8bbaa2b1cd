"""The samples that lately bound: a few inputs, kept so that the next sub-sample has them in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from redline.capture import CapturedCall
from redline.errors import ConfigurationError

MAX_SAMPLES, REMEMBER = 32, 4
"""Whoever measures tangents measures on so many samples unless told otherwise, so that all share one."""


def check_sub_sample(max_samples: int | None, remember: int) -> None:
    """Raise ConfigurationError where no sub-sample of a batch can be so large."""
    if max_samples is not None and max_samples < 1:
        raise ConfigurationError(f"got max_samples={max_samples}; expected at least 1, or None for the whole batch.")
    if remember < 0:
        raise ConfigurationError(f"got remember={remember}; expected a number of samples, or 0 for none.")


class SampleMemory:
    """Inputs of the samples of largest ``r`` of a step; the next step measures them again beside its own.

    Whatever tensors of a call have the batch's size are cut into samples. A call whose tensors have other shapes, such
    as shorter sequences, is not joined; what it measures takes the place of what was kept.
    """

    def __init__(self) -> None:
        self._kept: dict[int, Tensor] = {}  # by the tensor's place among the inputs, (samples, ...)
        self._next: dict[int, Tensor] | None = None
        self._places: set[int] = set()

    def join(self, call: CapturedCall, samples: int, batch: int, batch_dim: int, most: int) -> tuple[CapturedCall, int]:
        """The call on ``samples`` of its batch, evenly spread over it, and behind them at most ``most`` that were kept.

        Returns:
            The call, and how many were joined.
        """
        leaves, tree = tree_flatten((call.args, call.kwargs))
        cut = {
            place: leaf.index_select(batch_dim, spread_over(batch, samples, leaf.device))
            for place, leaf in enumerate(leaves)
            if isinstance(leaf, Tensor) and leaf.dim() > batch_dim and leaf.shape[batch_dim] == batch
        }
        self._places, joined = set(cut), 0
        if most and self._kept.keys() == cut.keys() and all(_fits(self._kept[at], cut[at], batch_dim) for at in cut):
            for place, leaf in cut.items():
                kept = self._kept[place].narrow(batch_dim, 0, min(most, self._kept[place].shape[batch_dim]))
                cut[place] = torch.cat([leaf, kept.to(leaf.device)], dim=batch_dim)
                joined = kept.shape[batch_dim]
        args, kwargs = tree_unflatten([cut.get(place, leaf) for place, leaf in enumerate(leaves)], tree)
        return replace(call, args=args, kwargs=kwargs), joined

    def keep(self, call: CapturedCall, r: Tensor, batch_dim: int, most: int) -> None:
        """Keep, from the end of the step on, the ``most`` samples of largest ``r``, ``(samples,)``, of a call joined.

        A sample that came twice counts once. Inputs that are not where ``r`` is are not kept: nobody waits for it.
        """
        leaves, _ = tree_flatten((call.args, call.kwargs))
        if any(leaves[at].device != r.device for at in self._places):
            return
        r = r.nan_to_num(nan=-1.0)
        index = r.topk(min(2 * most, len(r))).indices
        first = {at: leaves[at].index_select(batch_dim, index) for at in self._places}
        again = torch.zeros(len(index), dtype=torch.bool, device=r.device)
        if first:
            rows = [
                leaf.movedim(batch_dim, 0).flatten(1) if leaf.dim() > 1 else leaf[:, None] for leaf in first.values()
            ]
            same = torch.stack([(row[:, None] == row).all(-1) for row in rows]).all(0)
            again = same.tril(-1).any(1)
        best = torch.where(again, -1.0, r[index]).topk(min(most, len(index))).indices
        self._next = {at: leaf.index_select(batch_dim, best) for at, leaf in first.items()}

    def end_step(self, *, keep: bool = True) -> None:
        """What this step kept is for the next, or is let go."""
        if self._next is not None and keep:
            self._kept = self._next
        self._next = None

    def state_dict(self) -> dict[str, Any]:
        """The inputs kept."""
        return {"kept": dict(self._kept)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with them."""
        self._kept, self._next = dict(state["kept"]), None


def spread_over(batch: int, samples: int, device: torch.device | str = "cpu") -> Tensor:
    """Places of the samples, ``(samples,)``, int64; made on the device, so that nobody waits for them."""
    return torch.arange(samples, device=device) * batch // samples


def _fits(kept: Tensor, leaf: Tensor, batch_dim: int) -> bool:
    shapes = [tuple(size for dim, size in enumerate(one.shape) if dim != batch_dim) for one in (kept, leaf)]
    return shapes[0] == shapes[1] and kept.dtype == leaf.dtype
