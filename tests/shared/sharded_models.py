"""Models, and the ways in which they are laid over several ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

VOCABULARY, WIDTH, HEADS, TIME = 13, 8, 4, 5


class Block(nn.Module):
    """Its attention's ``out_proj`` is used without being called."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.5, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 3 * WIDTH), nn.GELU(), nn.Dropout(0.5), nn.Linear(3 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """(n, time, width) -> the same."""
        h = self.norm(x)
        x = x + self.attention(h, h, h)[0]
        return x + self.mlp(x)


class Language(nn.Module):
    """Embedding and readout are one; 13 rows go unevenly over 2 or 4 ranks, and a scalar goes nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.temperature = nn.Parameter(torch.tensor([1.3]))
        self.readout = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.readout.weight = self.embedding.weight
        self.codes = nn.Parameter(torch.randn(3, WIDTH), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(n, time) -> (n, time, vocabulary)."""
        h = F.dropout(torch.tanh(self.embedding(x) + self.codes.sum(0)), 0.3, self.training)
        for block in self.blocks:
            h = block(h)
        return self.readout(h) * self.temperature


class Pictures(nn.Module):
    """Batch statistics, and a block that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.Tanh())
        self.again = nn.Sequential(nn.Conv2d(5, 5, 3, padding=1), nn.BatchNorm2d(5), nn.Tanh())
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 1, 6, 6) -> (n, 3)."""
        h = self.again(self.again(self.first(x)))
        return self.head(h.mean((-1, -2)))


class Attention(nn.Module):
    """Written for tensor parallelism: heads are counted on what the projections return, or beforehand."""

    def __init__(self, heads: int = -1) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(n, time, width) -> the same."""
        q, k, v = (
            one(x).view(*x.shape[:2], self.heads, WIDTH // HEADS).transpose(1, 2) for one in (self.q, self.k, self.v)
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Parallel(nn.Module):
    """Two layers of attention and a readout."""

    def __init__(self, heads: int = -1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Attention(heads) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.readout = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        """(n, time) -> (n, time, vocabulary)."""
        h = self.embedding(x)
        for layer in self.layers:
            h = h + layer(h)
        return self.readout(self.norm(h))


def words(samples: int) -> Tensor:
    """(n, time), int64."""
    return torch.randint(VOCABULARY, (samples, TIME))


def pictures(samples: int) -> Tensor:
    """(n, 1, 6, 6), float64."""
    return torch.randn(samples, 1, 6, 6, dtype=torch.float64)


def _by_block(model: nn.Module, **options: object) -> None:
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, **options)  # type: ignore[arg-type]
    fully_shard(model, **options)  # type: ignore[arg-type]


def _at_once(model: nn.Module) -> None:
    fully_shard(model)


def _kept_whole(model: nn.Module) -> None:
    _by_block(model, reshard_after_forward=False)


def _copied_and_split(model: nn.Module) -> None:
    _by_block(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "parts")))


def _in_half(model: nn.Module) -> None:
    _by_block(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))


def _compiled_and_recomputed(model: nn.Module) -> None:
    for k, block in enumerate(model.blocks):  # type: ignore[arg-type]
        model.blocks[k] = checkpoint_wrapper(block)  # type: ignore[index, operator]
        model.blocks[k].compile(backend="eager")  # type: ignore[index]
    _by_block(model)


def _of_pictures(model: nn.Module) -> None:
    fully_shard([model.first, model.head])  # type: ignore[list-item]
    fully_shard(model.again)  # type: ignore[arg-type]
    fully_shard(model)


def _plan(model: nn.Module) -> dict[str, ParallelStyle]:
    plan: dict[str, ParallelStyle] = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()),
        "readout": ColwiseParallel(output_layouts=Replicate()),
    }
    for k in range(len(model.layers)):  # type: ignore[arg-type]
        plan |= {f"layers.{k}.{name}": ColwiseParallel() for name in "qkv"} | {f"layers.{k}.out": RowwiseParallel()}
    return plan


def _tensor_parallel(model: nn.Module) -> None:
    parallelize_module(model, init_device_mesh("cpu", (torch.distributed.get_world_size(),)), _plan(model))


def _both(model: nn.Module) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("parts", "heads"))
    parallelize_module(model, mesh["heads"], _plan(model))
    for layer in model.layers:  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh["parts"])
    fully_shard(model, mesh=mesh["parts"])


def _local_heads(model: nn.Module) -> None:
    for layer in model.layers:  # type: ignore[union-attr]
        layer.heads = HEADS // torch.distributed.get_world_size()
    _tensor_parallel(model)


Build = Callable[[], nn.Module]
Inputs = Callable[[int], Tensor]

LAID: dict[str, tuple[Build, Inputs, Callable[[nn.Module], None]]] = {
    "by block": (Language, words, _by_block),
    "at once": (Language, words, _at_once),
    "kept whole": (Language, words, _kept_whole),
    "copied and split": (Language, words, _copied_and_split),
    "in half precision": (Language, words, _in_half),
    "compiled and recomputed": (Language, words, _compiled_and_recomputed),
    "pictures": (Pictures, pictures, _of_pictures),
    "tensor parallel": (Parallel, words, _tensor_parallel),
    "split and tensor parallel": (Parallel, words, _both),
    "local heads": (Parallel, words, _local_heads),
}
"""What is built, what it is fed, and how it is laid over the ranks."""


def built(how: str, seed: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The plain model: the same weights on each rank."""
    torch.manual_seed(seed)
    return LAID[how][0]().to(dtype)


def laid(how: str, seed: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The same model over all ranks."""
    model = built(how, seed, dtype)
    LAID[how][2](model)
    return model


def fed(how: str, rank: int) -> Tensor:
    """A rank's own batch; ranks of one tensor-parallel group have the same."""
    group = {"tensor parallel": 0, "local heads": 0, "split and tensor parallel": rank // 2}.get(how, rank)
    torch.manual_seed(100 + group)
    return LAID[how][1](6)
