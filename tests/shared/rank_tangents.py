"""Logit tangents of models that lie over several ranks, beside those of the plain models they were made of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from sharded_models import built, fed, laid
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from redline.numerics import gathered
from redline.numerics.agreement import ElsewhereError, total_of_run
from redline.numerics.layer_recorder import LayerSteps
from redline.numerics.tangents import LogitTangent, _stretch, logit_tangent

OWN, POINT, ALONG = 1, 2, 3  # seeds of the weights that a model has, at which and along which tangents are taken


def in_training(how: str, rank: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model over all ranks that has seen a batch, as one is whose step is measured."""
    model, inputs = laid(how, OWN, dtype), fed(how, rank)
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(inputs.to(dtype) if inputs.is_floating_point() else inputs).square().mean().backward()
    for name, buffer in model.named_buffers():
        buffer.copy_(kept[name])
    return model


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """By name, detached."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def moving(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what no optimizer holds."""
    return {name: tensor for name, tensor in tensors.items() if name != "codes"}


def reference(how: str, rank: int, **options: Any) -> LogitTangent:
    """Of the plain model, by forward mode in float64."""
    model, along = built(how, POINT), moving(parameters(built(how, ALONG)))
    with torch.no_grad():
        for name, own in built(how, OWN).named_parameters():
            if name == "codes":
                dict(model.named_parameters())[name].copy_(own)
    plain = logit_tangent(model, (fed(how, rank),), {}, along, **options)
    assert plain.method in ("forward_mode", "math_attention")
    return plain


def sharded(model: nn.Module, how: str, rank: int, dtype: torch.dtype = torch.float64, **options: Any) -> LogitTangent:
    """Of a model over all ranks, at other weights than its own."""
    point, along = (moving(parameters(laid(how, seed, dtype))) for seed in (POINT, ALONG))
    inputs = fed(how, rank)
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    return logit_tangent(model, (inputs,), {}, along, parameters=point, **options)


def distance(one: Tensor, other: Tensor) -> float:
    """Relative."""
    return float((one.double() - other.double()).norm() / other.double().norm())


def taken(rank: int, how: str, method: str, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Distances to the plain model's, and what the replay left behind."""
    model, plain = in_training(how, rank, dtype), reference(how, rank)
    before, state = traces(model), torch.get_rng_state()
    found = sharded(model, how, rank, dtype, method=method)
    return {
        "method": found.method,
        "logits": distance(found.logits, plain.logits),
        "tangent": distance(found.tangent, plain.tangent),
        "untouched": untouched(traces(model), before) and torch.equal(torch.get_rng_state(), state),
    }


def traces(model: nn.Module) -> list[Any]:
    """All that a replay could leave behind in a model."""
    return [
        [(name, id(p), p.detach().to_local().clone() if hasattr(p, "to_local") else p.detach().clone())
         for name, p in model.named_parameters()],
        [(name, id(b), b.clone()) for name, b in model.named_buffers()],
        [(list(m._forward_pre_hooks.items()), list(m._forward_hooks.items()), m.training) for m in model.modules()],
        [state(m) for m in model.modules() if hasattr(m, "_get_fsdp_state")],
    ]  # fmt: skip


def state(module: Any) -> list[Any]:
    """Of FSDP."""
    found = module._get_fsdp_state()
    return [found._is_root, found._training_state, found._state_ctx.iter_forward_root is None] + [
        (group._training_state, group._sharded_state, list(group._post_forward_indices))
        for group in found._fsdp_param_groups
    ]


def untouched(now: Any, before: Any) -> bool:
    """Whether two traces are the same, tensors bit for bit."""
    if isinstance(now, (list, tuple)):
        return len(now) == len(before) and all(map(untouched, now, before))
    return torch.equal(now, before) if isinstance(now, Tensor) else bool(now == before)


def trained(rank: int, how: str, method: str) -> tuple[bool, float]:
    """Whether steps of training are the same with tangents between them as without, and how far they went."""
    without, with_tangents = _steps(rank, how, None), _steps(rank, how, method)
    start = _locals(laid(how, OWN))
    return all(map(torch.equal, without, with_tangents)), max(
        float((a - b).abs().max()) if a.numel() else 0.0 for a, b in zip(without, start, strict=False)
    )


def _locals(model: nn.Module) -> list[Tensor]:
    parts = [p.detach().to_local() if hasattr(p, "to_local") else p.detach() for p in model.parameters()]
    return [part.clone() for part in (*parts, *model.buffers())]


def _steps(rank: int, how: str, method: str | None) -> list[Tensor]:
    model = laid(how, OWN)
    optimizer = torch.optim.AdamW(moving_parameters(model), lr=0.01)
    torch.manual_seed(5)
    inputs, losses = fed(how, rank), []
    for _ in range(3):
        loss = model(inputs).square().mean()
        loss.backward()
        optimizer.step()
        if method is not None:
            kept = torch.get_rng_state()
            point, along = (moving(parameters(laid(how, seed))) for seed in (POINT, ALONG))
            torch.set_rng_state(kept)
            logit_tangent(model, (inputs,), {}, along, parameters=point, method=method)
        optimizer.zero_grad()
        losses.append(loss.detach())
    return [*_locals(model), torch.stack(losses)]


def moving_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those with gradients."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def most_at_a_time(rank: int, how: str, method: str) -> tuple[int, int, dict[str, int]]:
    """Elements that are gathered at a time, at most and after the replay; and elements of each unit."""
    model = laid(how, OWN)
    live: list[tuple[StorageWeakRef, int]] = []
    counts: list[int] = []

    def counted() -> int:
        return sum(size for storage, size in live if not storage.expired())

    def all_whole(tensors: Any, agree: Any) -> list[Tensor]:
        found = gathered_whole(tensors, agree)
        for tensor in found:
            live.append((StorageWeakRef(tensor.untyped_storage()), tensor.numel()))
        counts.append(counted())
        return found

    gathered_whole, gathered.all_whole = gathered.all_whole, all_whole
    try:
        sharded(model, how, rank, method=method)
    finally:
        gathered.all_whole = gathered_whole
    units = {
        "block": sum(p.numel() for n, p in model.named_parameters() if n.startswith("blocks.0.")),
        "root": sum(p.numel() for n, p in model.named_parameters() if not n.startswith("blocks.")),
        "codes": sum(p.numel() for n, p in model.named_parameters() if n == "codes"),
    }
    return max(counts), counted(), units


class Tripped(RuntimeError):
    """What a model raises in a test."""


@contextmanager
def tripping(module: nn.Module, error: Exception) -> Iterator[None]:
    """Within it, the module raises when it is called."""

    def trip(*_: Any) -> None:
        raise error

    handle = module.register_forward_pre_hook(trip)
    try:
        yield
    finally:
        handle.remove()


def failing(rank: int, how: str, kind: str, who: int | None, method: str) -> dict[str, Any]:
    """A forward that raises on each rank, or on one alone, in the midst of the model."""
    model, plain = in_training(how, rank), reference(how, rank)
    error = {"memory": torch.OutOfMemoryError("no more"), "raise": Tripped("in the middle")}[kind]
    before, raised = traces(model), ""
    with tripping(model.blocks[1].mlp, error) if who in (None, rank) else nullcontext():
        inside = traces(model)
        try:
            sharded(model, how, rank, method=method)
        except (Tripped, torch.OutOfMemoryError, ElsewhereError) as caught:
            raised = type(caught).__name__
        kept = untouched(traces(model), inside)
    again = sharded(model, how, rank)
    return {
        "raised": raised,
        "kept": kept and untouched(traces(model), before),
        "again": distance(again.tangent, plain.tangent),
    }


def refused(rank: int) -> str:
    """What is said of a difference through a model that computes in half precision."""
    try:
        sharded(laid("in half precision", OWN), "in half precision", rank, method="sharded_difference")
    except RuntimeError as error:
        return str(error)
    return "nothing"


def layers(rank: int, how: str) -> tuple[dict[str, float], dict[str, float]]:
    """Lengths of the step for each layer, and the plain model's."""
    one = sharded(laid(how, OWN), how, rank, layers=True).layers
    other = reference(how, rank, layers=True).layers
    assert one is not None
    assert other is not None
    assert not one.failures
    return _lengths(one), _lengths(other)


def _lengths(steps: LayerSteps) -> dict[str, float]:
    return {name: float(length) for name, length in (*steps.attention.items(), *steps.activation().items())}


def with_hooks_of_the_users(rank: int) -> tuple[list[str], list[Any], list[Any]]:
    """The calls of hooks between and behind FSDP's own, and all hooks before and after; one takes itself off."""
    model, calls = laid("by block", OWN), []
    block = model.blocks[1]
    block.register_forward_pre_hook(lambda *_: calls.append("pre"))
    block.register_forward_hook(lambda *_: calls.append("post"), prepend=True)
    hooks = [block._forward_pre_hooks, block._forward_hooks]
    before = [list(one) for one in hooks]
    handle = block.register_forward_hook(lambda *_: handle.remove())
    sharded(model, "by block", rank, method="forward_mode")
    return calls, before, [list(one) for one in hooks]


def stretches(rank: int, how: str) -> tuple[float, float]:
    """How far the direction is stretched, and how far that of the plain model is."""
    own, plain = ([moving(parameters(make(how, seed))) for seed in (POINT, ALONG)] for make in (laid, built))
    return float(_stretch(own[0], own[1], total_of_run)), float(_stretch(plain[0], plain[1], None))


def messages(rank: int, method: str) -> tuple[list[int], int]:
    """Bytes that each all-gather of a tangent brings together, and bytes of all parameters."""
    model, sizes, gather = laid("by block", OWN), [], gathered._all_gather

    def counted() -> Any:
        def run(received: Tensor, sent: Tensor, **options: Any) -> None:
            sizes.append(received.nbytes)
            gather()(received, sent, **options)

        return run

    gathered._all_gather = counted
    try:
        sharded(model, "by block", rank, method=method)
    finally:
        gathered._all_gather = gather
    return sizes, sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
