"""The probe of a step's tangent, on several ranks of a sharded model."""

from __future__ import annotations

from typing import Any

import torch
from rank_tangents import ALONG, OWN, POINT, distance, moving, parameters, reference, tripping
from sharded_models import fed, laid
from torch import Tensor, nn

from redline.capture import ForwardCapture
from redline.notes import Notes
from redline.ranks import Ranks
from redline.sharding import Layout
from redline.step_tangent import StepTangent
from redline.tangent_probe import TangentProbe


class Probed:
    """A model in training, and the probe of its steps."""

    def __init__(self, rank: int, how: str, model: nn.Module | None = None) -> None:
        self.rank, self.how, self.model = rank, how, laid(how, OWN) if model is None else model
        self.notes = Notes()
        self.capture = ForwardCapture(self.model, None, lambda: None)
        self.probe = TangentProbe(self.capture, None, 0, self.notes, _nothing, layout=Layout(Ranks.of_run()))
        self.live = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.before, self.update = (moving(parameters(laid(how, seed))) for seed in (POINT, ALONG))

    def step(self, max_samples: int | None = None, **options: Any) -> StepTangent | None:
        """Forward, backward, and the tangent of a step."""
        self.capture.armed = True
        self.model(fed(self.how, self.rank)).square().mean().backward()
        self.sharded = {name for name, p in self.model.named_parameters() if hasattr(p, "placements")}
        with torch.no_grad():
            return self.probe.measure(self.live, self.before, self.update, max_samples, 0, **options)


def _nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()


def measured(rank: int, how: str) -> dict[str, Any]:
    """Two steps: the first is held against a difference, the second is taken on a part of the batch."""
    probed = Probed(rank, how)
    first, plain = probed.step(), reference(how, rank)
    part = probed.step(2)
    assert first is not None
    assert part is not None
    return {
        "tangent": distance(first.tangent, plain.tangent),
        "of a part": distance(part.tangent, plain.tangent[part.index]),
        "method": first.method,
        "state": probed.probe.state_dict(),
        "notes": list(probed.notes),
    }


def held_whole(rank: int) -> float:
    """With the parameters whole in their places as the step ends, as FSDP leaves them when it is told to."""
    model: Any = laid("by block", OWN)
    model.set_reshard_after_backward(False)
    probed = Probed(rank, "by block", model)
    found = probed.step()
    assert not any(name.startswith("blocks.") for name in probed.sharded)
    assert found is not None
    return distance(found.tangent, reference("by block", rank).tangent)


class Summing(torch.nn.Module):
    """Tensor parallelism by hand around the readout: what it computes is none of the plain module's business."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Twice the logits, where ranks hold shards."""
        shards = hasattr(next(self.inner.parameters()), "placements")
        return self.inner(x) * (2 if shards else 1)


def wrong_when_whole(rank: int) -> tuple[str, float, list[str]]:
    """A model that computes something else on its shards than when called whole."""
    model = Summing(laid("tensor parallel", OWN))
    probed = Probed.__new__(Probed)
    probed.rank, probed.how, probed.model, probed.notes = rank, "tensor parallel", model, Notes()
    probed.capture = ForwardCapture(model, None, lambda: None)
    probed.probe = TangentProbe(probed.capture, None, 0, probed.notes, _nothing, layout=Layout(Ranks.of_run()))
    probed.live = dict(model.named_parameters())
    twins = (parameters(laid("tensor parallel", seed)) for seed in (POINT, ALONG))
    probed.before, probed.update = ({f"inner.{name}": p for name, p in twin.items()} for twin in twins)
    found = probed.step()
    assert found is not None
    return found.method, distance(found.tangent, 2 * reference("tensor parallel", rank).tangent), list(probed.notes)


def out_of_memory(rank: int) -> tuple[bool, list[str], float]:
    """Rank 1 alone runs out of memory in a replay; the next step is measured as ever."""
    probed = Probed(rank, "by block")
    probed.capture.armed = True
    probed.model(fed("by block", rank)).square().mean().backward()
    model: Any = probed.model
    with tripping(model.blocks[1].mlp, torch.OutOfMemoryError("no more")) if rank == 1 else _nothing(), torch.no_grad():
        found = probed.probe.measure(probed.live, probed.before, probed.update, 2, 0)
    again = probed.step()
    assert again is not None
    return found is None, list(probed.notes), distance(again.tangent, reference("by block", rank).tangent)


def only_one_disagrees(rank: int) -> tuple[float, float]:
    """A disagreement as each rank sees it by itself, and as all see it."""
    from redline.numerics.tangents import LogitTangent
    from redline.tangent_probe import disagreement

    z = torch.ones(3, 4)
    slow = LogitTangent(z, z, None, "finite_difference")
    fast = LogitTangent(z, z * (1 + rank), None, "forward_mode")
    return disagreement(fast, slow), disagreement(fast, slow, Ranks.of_run())
