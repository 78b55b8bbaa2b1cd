"""Spectra of real DTensors: what each rank does, and the whole tensors to compare with."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

import redline.spectrum_tracker
from redline.control import Control
from redline.controller import Decay, ScaleMatrices
from redline.matrix_shards import block_of, frobenius_norms
from redline.notes import Notes
from redline.parameters import MatrixLayer, by_layer, by_parameter, matrix_layers
from redline.ranks import Ranks
from redline.sharding import Layout, local_part
from redline.spectrum_tracker import SpectrumTracker
from redline.step import Step
from redline.transaction import StepTransaction
from redline.update_limits import UpdateLimits
from redline.weight_decay import Rates

TOLERANCE = 5e-5
R, P, S = Replicate, Partial, Shard
_CONVOLUTION: Callable[[], nn.Module] = lambda: nn.Conv2d(24, 150, (3, 5), bias=False)  # noqa: E731
_TRANSPOSED: Callable[[], nn.Module] = lambda: nn.ConvTranspose2d(24, 150, (3, 5), bias=False)  # noqa: E731


class Case(NamedTuple):
    """A parameter, and how it lies: on a line of four ranks, or on a grid of two by two. None: whole on each."""

    shape: tuple[int, ...] | Callable[[], nn.Module]
    placements: tuple[Any, ...] | None
    dtype: torch.dtype = torch.float32


CASES: dict[str, Case] = {
    "whole": Case((200, 150), None),
    "whole_and_small": Case((30, 20), None),
    "whole_stack": Case((3, 40, 30), None),
    "replicated": Case((200, 140), (R(),)),
    "rows": Case((200, 150), (S(0),)),
    "rows_of_wide": Case((150, 300), (S(0),)),
    "columns": Case((200, 150), (S(1),)),
    "uneven_rows": Case((201, 150), (S(0),)),
    "fewer_rows_than_ranks": Case((3, 200), (S(0),)),
    "one_row": Case((1, 200), (S(0),)),
    "few_columns": Case((200, 3), (S(0),)),
    "terms": Case((200, 150), (P(),)),
    "mean_of_terms": Case((200, 150), (P("avg"),)),
    "rows_in_bfloat16": Case((200, 150), (S(0),), torch.bfloat16),
    "rows_in_float64": Case((200, 150), (S(0),), torch.float64),
    "blocks": Case((201, 155), (S(0), S(1))),
    "blocks_the_other_way": Case((155, 201), (S(1), S(0))),
    "rows_twice": Case((203, 150), (S(0), S(0))),
    "hybrid": Case((200, 150), (R(), S(0))),
    "hybrid_columns": Case((200, 150), (S(1), R())),
    "rows_of_terms": Case((200, 150), (P(), S(0))),
    "convolution_out": Case(_CONVOLUTION, (S(0),)),
    "convolution_in": Case(_CONVOLUTION, (S(1),)),
    "convolution_taps": Case(_CONVOLUTION, (S(2),)),
    "convolution_grid": Case(_CONVOLUTION, (S(0), S(1))),
    "convolution_out_and_taps": Case(_CONVOLUTION, (S(0), S(3))),
    "convolution_in_and_taps": Case(_CONVOLUTION, (S(1), S(2))),
    "transposed_in": Case(_TRANSPOSED, (S(0),)),
    "transposed_out": Case(_TRANSPOSED, (S(1),)),
    "transposed_grid": Case(_TRANSPOSED, (S(0), S(1))),
    "transposed_in_and_taps": Case(_TRANSPOSED, (S(3), S(0))),
    "transposed_out_and_taps": Case(_TRANSPOSED, (S(1), S(2))),
    "experts": Case((3, 150, 140), (S(0),)),
    "experts_rows": Case((3, 150, 140), (S(1),)),
    "experts_columns": Case((3, 150, 140), (S(2),)),
    "experts_and_rows": Case((3, 150, 140), (S(0), S(1))),
    "experts_and_columns": Case((3, 150, 140), (S(0), S(2))),
    "experts_blocks": Case((3, 150, 140), (S(1), S(2))),
    "experts_hybrid": Case((3, 150, 140), (R(), S(0))),
    "experts_grid": Case((2, 3, 40, 30), (S(1), S(0))),
    "positions": Case((1, 200, 150), (S(0),)),
    "positions_rows": Case((1, 200, 150), (S(1),)),
}


def module_of(name: str) -> nn.Module:
    """A module with the whole parameter ``weight``, the same in every process."""
    case = CASES[name]
    module = nn.Module() if isinstance(case.shape, tuple) else case.shape()
    shape = case.shape if isinstance(case.shape, tuple) else tuple(module.weight.shape)
    generator = torch.Generator().manual_seed(list(CASES).index(name))
    module.weight = nn.Parameter(torch.randn(shape, generator=generator).to(case.dtype))
    return module


def whole_matrices(names: Sequence[str] = tuple(CASES)) -> dict[str, Tensor]:
    """Each matrix, by its layer's name, in float64."""
    model = nn.ModuleDict({name: module_of(name) for name in names})
    weights = dict(model.named_parameters())
    return {layer.name: layer.of(weights[layer.parameter]).double() for layer in matrix_layers(model, Notes())}


def placed(names: Sequence[str] = tuple(CASES)) -> nn.ModuleDict:
    """The model with its parameters placed as the cases say."""
    size = dist.get_world_size()
    line = init_device_mesh("cpu", (size,))
    grid = init_device_mesh("cpu", (max(1, size // 2), min(2, size)))
    model = nn.ModuleDict({name: module_of(name) for name in names})
    for name, module in model.items():
        placements = CASES[name].placements
        if placements is not None:
            mesh = line if len(placements) == 1 else grid
            module.weight = nn.Parameter(_placed(module.weight.detach(), mesh, placements))
    return model


def _placed(whole: Tensor, mesh: DeviceMesh, placements: tuple[Any, ...]) -> DTensor:
    """As terms whose sum, or mean, is the tensor where it is placed so; the ranks' terms differ."""
    for dimension, placement in enumerate(placements):
        if placement.is_partial():
            size, place = mesh.size(dimension), mesh.get_local_rank(dimension)
            noise = [torch.randn(whole.shape, generator=torch.Generator().manual_seed(99 + k)) for k in range(size)]
            noise[-1] = -sum(noise[:-1], torch.zeros_like(whole))
            whole = noise[place] + (whole if placement.reduce_op == "avg" else whole / size)
    cut = [R() if placement.is_partial() else placement for placement in placements]
    part = distribute_tensor(whole, mesh, cut, src_data_rank=None).to_local()
    return DTensor.from_local(
        part, mesh, placements, run_check=False, shape=whole.shape, stride=whole.contiguous().stride()
    )


class Collectives(TorchDispatchMode):
    """What is sent: the numbers in each collective of any kind."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            flat = [one for one in torch.utils._pytree.tree_leaves(args) if isinstance(one, Tensor)]
            self.sent.append((func.__name__.split(".")[0], sum(one.numel() for one in flat)))
        return func(*args, **(kwargs or {}))


class Told(NamedTuple):
    """Of a measurement, by layer."""

    sigma: dict[str, float]
    residual: dict[str, float]
    passes: dict[str, int]
    sent: list[tuple[str, int]]


def _measured(tracker: SpectrumTracker, layers: list[MatrixLayer], parts: dict[str, Tensor], layout: Layout) -> Told:
    with Collectives() as collectives:
        found = tracker.measure(layers, parts, TOLERANCE, layout)
    names = [layer.name for layer in layers]
    return Told(
        dict(zip(names, found.sigma.tolist(), strict=True)),
        dict(zip(names, found.residual.tolist(), strict=True)),
        dict(zip(names, found.passes.tolist(), strict=True)),
        collectives.sent,
    )


def _of(model: nn.Module) -> tuple[list[MatrixLayer], dict[str, Tensor], Layout]:
    parameters = dict(model.named_parameters())
    parts = {name: local_part(parameter) for name, parameter in parameters.items()}
    return matrix_layers(model, Notes()), parts, Layout(Ranks.of_run(), parameters)


def measures(rank: int, names: Sequence[str]) -> tuple[Told, Told, list[float]]:
    """Cold, then warm of twice as much; Frobenius norms."""
    layers, parts, layout = _of(placed(names))
    tracker = SpectrumTracker(1)
    cold = _measured(tracker, layers, parts, layout)
    norms = frobenius_norms(layers, parts, layout).tolist()
    warm = _measured(tracker, layers, {name: 2 * part for name, part in parts.items()}, layout)
    return cold, warm, norms


class Block(nn.Module):
    """A feed-forward block, and what no plan mentions."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(140, 300)
        self.down = nn.Linear(300, 140)
        self.head = nn.Linear(140, 3)
        self.scale = nn.Parameter(torch.ones(140))


def block() -> Block:
    """The same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Block()


def measures_parallelized(rank: int, how: str) -> tuple[Told, dict[str, str]]:
    """A model as torch itself places it: "fsdp", "hybrid", "tp", "fsdp over tp"; and what is placed how."""
    model = block()
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("dp", "tp"))
    if how in ("tp", "fsdp over tp"):
        over = mesh["tp"] if how != "tp" else init_device_mesh("cpu", (size,))
        parallelize_module(model, over, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if how in ("fsdp", "fsdp over tp"):
        over = mesh["dp"] if how != "fsdp" else init_device_mesh("cpu", (size,))
        fully_shard(model.up, mesh=over)
        fully_shard(model, mesh=over)
    if how == "hybrid":
        fully_shard(model, mesh=mesh)
    layers, parts, layout = _of(model)
    placements = {name: str(sharding.placements) for name, sharding in layout.shardings.items()}
    return _measured(SpectrumTracker(1), layers, parts, layout), placements


def divides(rank: int) -> list[list[list[tuple[int, ...]]]]:
    """For some calls over several subsets of unsharded matrices, the shapes that each rank measured."""
    sides = [200, 190, 180, 170, 160, 150, 140, 130]
    model = nn.ParameterDict({f"m{side}": torch.randn(side, side) for side in sides})
    layers, parts, layout = _of(model)
    measured: list[tuple[int, ...]] = []
    real = redline.spectrum_tracker.top_singular_values

    def top_singular_values(matrices: Sequence[Tensor], *given: Any, **named: Any) -> Any:
        measured.extend(tuple(matrix.shape) for matrix in matrices)
        return real(matrices, *given, **named)

    redline.spectrum_tracker.top_singular_values = top_singular_values  # type: ignore[assignment]
    calls, tracker = [], SpectrumTracker(1)
    try:
        for some in (layers[:5], layers, layers[::-1], layers[3:4], []):
            measured.clear()
            tracker.measure(some, parts, 1e-3, layout)
            calls.append(list(measured))
    finally:
        redline.spectrum_tracker.top_singular_values = real
    return calls


def meets_what_is_not_finite(rank: int) -> list[tuple[list[float], list[float]]]:
    """Sigmas while one whole matrix and one row of a divided one are not finite, and right after."""
    layers, parts, layout = _of(placed(["whole", "whole_and_small", "rows", "columns", "blocks", "experts"]))
    tracker, told = SpectrumTracker(1), []
    tracker.measure(layers, parts, TOLERANCE, layout)
    broken = {name: part.clone() for name, part in parts.items()}
    broken["whole.weight"][0, 0] = math.nan
    for name in ("rows", "blocks", "experts"):
        if rank == 1:
            broken[f"{name}.weight"].view(-1)[-1:] = math.inf
    for given in (broken, parts):
        told.append(tracker.measure(layers, given, TOLERANCE, layout).sigma.tolist())
    return told


_RESUMED = ["whole", "whole_and_small", "replicated", "rows", "columns", "blocks", "experts", "convolution_out"]


def saves(rank: int) -> bytes:
    """A tracker's state after two measurements, as it is saved: a tensor itself lives no longer than its process."""
    layers, parts, layout = _of(placed(_RESUMED))
    tracker = SpectrumTracker(1)
    for _ in range(2):
        tracker.measure(layers, parts, TOLERANCE, layout)
    with Collectives() as collectives:
        state = tracker.state_dict()
    assert collectives.sent == []
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def resumes(rank: int, states: Sequence[bytes | None]) -> Told:
    """From a state a rank, None to load none."""
    layers, parts, layout = _of(placed(_RESUMED))
    tracker = SpectrumTracker(1)
    state = states[rank]
    if state is not None:
        tracker.load_state_dict(torch.load(io.BytesIO(state), weights_only=True))
    told = _measured(tracker, layers, parts, layout)
    again = _measured(tracker, layers, parts, layout)  # agreed, once and for all
    assert "allgather_" not in {kind for kind, _ in again.sent}
    return told


def cuts(rank: int) -> list[tuple[str, bool]]:
    """For each stack of matrices, whether numbers a matrix scale this rank's part as they do the whole."""
    names = [name for name in CASES if "experts" in name or "stack" in name] + ["rows", "positions"]
    model = placed(names)
    layers, parts, layout = _of(model)
    numbers = torch.linspace(0.5, 2.0, len(layers))
    factors = by_parameter(layers, numbers, lambda name: 1.0)
    back = by_layer(layers, factors, numbers)
    assert torch.equal(back, numbers)
    right: list[tuple[str, bool]] = []
    for name, parameter in model.named_parameters():
        scaled = layout.cut(name, factors[name]) * parts[name]
        sharding = layout.shardings.get(name)
        whole = scaled if sharding is None else sharding.whole(scaled).full_tensor()
        before = parameter.detach() if sharding is None else parameter.detach().full_tensor()
        same = all(
            torch.allclose(layer.of(whole), float(number) * layer.of(before))
            for layer, number in zip(layers, numbers, strict=True)
            if layer.parameter == name
        )
        right.append((name, same and scaled.shape == parts[name].shape))
    return right


_MOVED = ["whole", "rows", "columns", "blocks", "convolution_out", "experts", "experts_rows", "positions"]
SCALES = (0.01, 0.99, 3.0, 0.05, 1.5)  # of an update, in the matrix's own size


def _step(rank: int, names: Sequence[str]) -> Any:
    """A step that moves matrix ``k`` by itself times ``SCALES[k % 5]``, on a transaction over this rank's parts."""
    layers, parts, layout = _of(placed(names))
    scales = torch.tensor([SCALES[k % len(SCALES)] for k in range(len(layers))])
    by = by_parameter(layers, scales, lambda name: 0.0)
    transaction = StepTransaction()
    transaction.save({name: part.clone() for name, part in parts.items()})
    for name, parameter in transaction.parameters.items():
        parameter += layout.cut(name, by[name]) * parts[name]
    return SimpleNamespace(
        layers=layers,
        layout=layout,
        transaction=transaction,
        before=transaction.before,
        update=SimpleNamespace(tensors=transaction.update()),
        rates={name: Rates(0.5, 0.0, None) for name in parts},
    )


def limits(rank: int, relative_to: str) -> tuple[dict[str, float], list[tuple[str, int]]]:
    """The factors that hold the step to its limits, by layer, and what was sent for them."""
    step = _step(rank, _MOVED)
    step.net_update = lambda name: Step.net_update(step, name)
    with Collectives() as collectives:
        decision = UpdateLimits(1.0 if relative_to == "weight" else 8.0, relative_to).scale(step)
    assert decision is not None
    return dict(zip([one.name for one in decision.layers], decision.factors.tolist(), strict=True)), collectives.sent


def decided(rank: int) -> dict[str, bool]:
    """Whether a factor and a decay of each matrix are carried out, and seen by ``net_update``, on each part."""
    step = _step(rank, _MOVED)
    layout, layers, transaction = step.layout, step.layers, step.transaction
    control: Any = SimpleNamespace(_transaction=transaction, _refuse_unmoved=lambda *_: None)
    decays, factors = torch.linspace(0.01, 0.4, len(layers)), torch.linspace(0.2, 0.9, len(layers))
    Control._change_matrices(control, step, "test", Decay(layers, decays, None))
    step.update.tensors = transaction.update()
    net = {name: Step.net_update(step, name) for name in transaction.parameters}
    Control._change_matrices(control, step, "test", ScaleMatrices(layers, factors, ""))
    transaction.commit()
    right = {}
    for k, (layer, factor) in enumerate(zip(layers, factors.tolist(), strict=True)):
        scale, sharding = SCALES[k % len(SCALES)], layout.shardings.get(layer.parameter)
        expected = {
            "net": (net, scale),
            "after": (transaction.parameters, 1 + factor * scale - 0.5 * float(decays[k])),
        }
        for what, (tensors, times) in expected.items():
            found = block_of(layer, tensors[layer.parameter], sharding)
            before = block_of(layer, step.before[layer.parameter], sharding)
            right[f"{layer.name}: {what}"] = torch.allclose(found, times * before, rtol=1e-4, atol=1e-5)
    return right
