"""Replaying a model of which each rank holds a part as the plain module it was made of, one unit whole at a time.

A unit is a module that ``fully_shard`` was applied to, or, in a model that has none, an element of a container of
modules; the model itself is one. A parameter belongs to the innermost unit around all modules that hold it::

    model(x)                      the model's own parameters are gathered
        block(x)                  the block's are
            (the block's forward)
                                  they are let go, whether it returned or raised

so that no more is whole at a time than the model's own and the units on the way. Torch's own hooks, which do as much in
training, are set aside meanwhile: forward-mode AD does not get through them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_map

from redline.numerics.agreement import Agree, go_on
from redline.numerics.sharded import device_type, fsdp_modules, is_sharded, local_part

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Made = Callable[[Tensor, Tensor | None], Tensor]
"""What stands in for a parameter, made of its whole value and of the whole direction in it, if it has one."""

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


@dataclass(frozen=True)
class _Member:
    """A parameter of a unit: its value, the direction in it, and the modules that hold it, each by its own name."""

    point: Tensor
    direction: Tensor | None
    places: tuple[tuple[nn.Module, str], ...]


class GatheredModel:
    """Calls a model whose parameters lie over several ranks, at other parameters than its own."""

    def __init__(
        self, model: nn.Module, point: Mapping[str, Tensor], direction: Mapping[str, Tensor], agree: Agree
    ) -> None:
        """``point`` and ``direction``: by the first name of each parameter; ``agree``: see ``agreement``."""
        self._model, self._agree = model, agree
        self._members: dict[nn.Module, list[_Member]] = {}
        for unit, name, places in _places(model, {name for name, tensor in point.items() if is_sharded(tensor)}):
            self._members.setdefault(unit, []).append(_Member(point[name], direction.get(name), tuple(places)))

    def call(self, made: Made, buffers: Mapping[str, Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The output on this rank's inputs, with what ``made`` makes in place of the parameters."""
        state, inputs, named = tree_map(_whole_leaf, (dict(buffers), tuple(args), dict(kwargs)))
        with _torchs_hooks_aside(self._model), _Gathering(self._members, made, self._agree):
            return functional_call(self._model, state, inputs, named)


class _Gathering:
    """While it is open, each unit is gathered when it is called."""

    def __init__(self, members: Mapping[nn.Module, Sequence[_Member]], made: Made, agree: Agree) -> None:
        self._members, self._made, self._agree = members, made, agree
        self._calls = dict.fromkeys(members, 0)  # of each unit, those under way
        self._own: dict[nn.Module, list[tuple[nn.Module, str, nn.Parameter | None]]] = {}

    def __enter__(self) -> None:
        # Torch's hooks on all modules at once, so that none of the model's own is touched.
        self._handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for unit in list(self._own):
            self._let_go(unit)

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        if module not in self._members:
            return
        if not self._calls[module]:
            self._gather(module)
        self._calls[module] += 1

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._calls.get(module):  # 0 if it could not be gathered
            self._calls[module] -= 1
            if not self._calls[module]:
                self._let_go(module)

    def _gather(self, unit: nn.Module) -> None:
        members = self._members[unit]
        both = [[one.point] if one.direction is None else [one.point, one.direction] for one in members]
        whole = iter(all_whole([tensor for one in both for tensor in one], self._agree))
        own = self._own.setdefault(unit, [])
        for member, tensors in zip(members, both, strict=True):
            stand_in = self._made(next(whole), next(whole) if len(tensors) == 2 else None)
            for module, name in member.places:
                own.append((module, name, module._parameters[name]))
                module._parameters[name] = cast(nn.Parameter, stand_in)

    def _let_go(self, unit: nn.Module) -> None:
        for module, name, parameter in self._own.pop(unit, []):
            module._parameters[name] = parameter


def _places(model: nn.Module, sharded: set[str]) -> Iterator[tuple[nn.Module, str, list[tuple[nn.Module, str]]]]:
    """Of each parameter its unit, its first name and the modules that hold it; what is not sharded is the model's."""
    modules = dict(model.named_modules(remove_duplicate=False))
    units: set[nn.Module] = {*(fsdp_modules(model) or _elements(model)), model}
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for first, *others in names.values():
        ways = [_units_around(name, modules, units) for name in (first, *others)] if first in sharded else [[model]]
        common = [way[0] for way in takewhile(lambda step: len(set(step)) == 1, zip(*ways, strict=False))]
        places = dict.fromkeys((modules[name.rpartition(".")[0]], name.rpartition(".")[2]) for name in (first, *others))
        yield common[-1], first, list(places)


def _units_around(name: str, modules: Mapping[str, nn.Module], units: set[nn.Module]) -> list[nn.Module]:
    """Those around a parameter, from the model inwards."""
    parts = name.split(".")[:-1]
    around = [modules[".".join(parts[:depth])] for depth in range(len(parts) + 1)]
    return [module for module in around if module in units]


def _elements(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost elements of containers: blocks, mostly."""
    for child in module.children():
        if isinstance(module, _CONTAINERS) and not isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield child
        else:
            yield from _elements(child)


@contextmanager
def _torchs_hooks_aside(model: nn.Module) -> Iterator[None]:
    """Without the forward hooks of torch's own distributed machinery; the user's stay, in their order."""
    kept = []
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            aside = [key for key, hook in hooks.items() if _is_of_torch(hook)]
            if aside:
                kept.append((hooks, dict(hooks), set(aside)))
            for key in aside:
                del hooks[key]
    try:
        yield
    finally:
        for hooks, before, set_aside in kept:
            now = dict(hooks)  # without those that took themselves off
            hooks.clear()  # the same dictionary: the hooks' handles know it
            hooks.update({key: hook for key, hook in before.items() if key in set_aside or key in now})
            hooks.update(now)


def _is_of_torch(hook: Any) -> bool:
    while isinstance(hook, partial):
        hook = hook.func
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.")


# Gathering ------------------------------------------------------------------------------------------------------------


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank; one that is no DTensor as it is."""
    return cast("DTensor", tensor).full_tensor() if is_sharded(tensor) else tensor


def _whole_leaf(value: Any) -> Any:
    return whole(value) if isinstance(value, Tensor) else value


def all_whole(tensors: Sequence[Tensor], agree: Agree) -> list[Tensor]:
    """All of each tensor, on every rank, with one message for all that are split alike.

    Args:
        tensors: on every rank the parts of the same ones.
        agree: asked when what the messages need is here, ahead of the first.
    """
    found: dict[int, Tensor] = {}
    messages: dict[Any, _Message] = {}
    rest: list[int] = []
    for place, tensor in enumerate(tensors):
        dims = _split_dims(tensor) if is_sharded(tensor) else []
        if not dims:
            found[place] = _sendable(tensor)
        elif len(dims) == 1 and type(cast(Any, tensor).placements[dims[0]]).__name__ == "Shard":
            sharded = cast("DTensor", tensor)
            group = sharded.device_mesh.get_group(dims[0])
            message = messages.setdefault((group, tensor.dtype), _Message(group))
            message.add(place, sharded, dims[0])
        else:
            rest.append(place)
    if messages or rest:
        for message in messages.values():
            message.prepare()
        go_on(agree)
    for message in messages.values():
        found.update(message.exchange())
    found.update({place: _on_mesh(tensors[place]).full_tensor() for place in rest})
    return [found[place] for place in range(len(tensors))]


def _split_dims(tensor: Tensor) -> list[int]:
    """The dimensions of its mesh over which a DTensor is split, not copied."""
    given: Any = tensor
    sizes = zip(given.placements, given.device_mesh.shape, strict=True)
    return [dim for dim, (placement, size) in enumerate(sizes) if size > 1 and not placement.is_replicate()]


def _on_mesh(tensor: Tensor) -> DTensor:
    """The same with its parts where they can be sent from."""
    from torch.distributed.tensor import DTensor

    given: Any = tensor
    mesh, placements = given.device_mesh, given.placements
    return DTensor.from_local(
        _sendable(tensor), mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def _sendable(tensor: Tensor) -> Tensor:
    """Its part where the others can be reached from: FSDP may keep it on the host."""
    part, kind = local_part(tensor), device_type(tensor)
    return part if part.device.type == kind else part.to(kind)


def _all_gather() -> Callable[..., Any]:
    """By its name in this version of torch."""
    found: Callable[..., Any] = getattr(torch.distributed, "all_gather_single", None) or (
        torch.distributed.all_gather_into_tensor
    )
    return found


class _Message:
    """One all-gather of the parts of several tensors, each split along one of its dimensions into equal chunks.

    Of the last chunks there may be less, or nothing; they are sent filled up.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self._parts: list[Tensor] = []
        self._tensors: list[tuple[int, Tensor, int]] = []  # place, tensor, the dimension that is split

    def add(self, place: int, tensor: DTensor, mesh_dim: int) -> None:
        """Another tensor to be sent."""
        dim = cast(Any, tensor.placements[mesh_dim]).dim
        part = _sendable(tensor).movedim(dim, 0)
        chunk = math.ceil(tensor.shape[dim] / tensor.device_mesh.size(mesh_dim))
        if len(part) < chunk:
            part = torch.cat([part, part.new_zeros(chunk - len(part), *part.shape[1:])])
        self._parts.append(part)
        self._tensors.append((place, tensor, dim))

    def prepare(self) -> None:
        """Take all memory that sending needs."""
        self._sent = torch.cat([part.reshape(-1) for part in self._parts])
        self._received = self._sent.new_empty(self.group.size() * len(self._sent))

    def exchange(self) -> Iterable[tuple[int, Tensor]]:
        """Send it; by place, each tensor in one piece."""
        _all_gather()(self._received, self._sent, group=self.group)
        by_rank = self._received.view(self.group.size(), -1)
        sizes = [part.numel() for part in self._parts]
        for (place, tensor, dim), part, chunks in zip(
            self._tensors, self._parts, by_rank.split(sizes, dim=1), strict=True
        ):
            rows = chunks.reshape(-1, *part.shape[1:])[: tensor.shape[dim]]
            yield place, rows.movedim(0, dim).contiguous()
