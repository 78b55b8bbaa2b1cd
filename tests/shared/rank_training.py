"""The same training on one rank and on several: what the tests of ``tests/ranks`` compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import redline
from redline import GhostRadius, LayerRadii, StepHealth, UpdateSpectrum, WeightSpectrum

VOCABULARY, TIME, WIDTH, BATCH = 61, 6, 144, 8


class Block(nn.Module):
    """Pre-norm attention and feed-forward, with sides that no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 171), nn.Linear(171, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (one.unflatten(-1, (4, -1)).transpose(1, 2) for one in self.qkv(self.norm(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.silu(self.up(self.norm_mlp(x))))


class TinyLM(nn.Module):
    """Embeddings, blocks, a stack of two matrices and a readout: one of each kind of parameter that is measured."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Parameter(torch.randn(1, TIME, WIDTH) * 0.02)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.experts = nn.Parameter(torch.randn(2, WIDTH, WIDTH) * 0.05)
        self.norm = nn.LayerNorm(WIDTH)
        self.readout = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position
        for block in self.blocks:
            x = block(x)
        x = x + torch.stack([x @ matrix for matrix in self.experts.unbind()]).mean(0)
        return self.readout(self.norm(x))


def model(seed: int = 0) -> TinyLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TinyLM()


def batches(steps: int, rank: int = 0, size: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's part of each global batch."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        drawn = torch.randint(VOCABULARY, (BATCH, TIME + 1), generator=generator)
        mine = drawn.chunk(size)[rank]
        yield mine[:, :-1], mine[:, 1:]


def wrapped(net: nn.Module, how: str) -> nn.Module:
    """The model as it is trained: "alone", "ddp", "fsdp" by blocks, "hsdp" on a mesh of two rows, or "tp" in parts."""
    if how == "ddp":
        return DistributedDataParallel(net)
    if how in ("fsdp", "hsdp"):
        size = dist.get_world_size()
        shape, names = ((size,), ("shard",)) if how == "fsdp" else ((2, size // 2), ("copy", "shard"))
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for block in net.blocks:  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh)
        fully_shard(net, mesh=mesh)
    if how == "tp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in net.blocks:  # type: ignore[union-attr]
            parallelize_module(
                block,
                mesh,
                {
                    "out": ColwiseParallel(output_layouts=Replicate()),
                    "qkv": RowwiseParallel(input_layouts=Replicate()),
                },
            )
    return net


def whole(net: nn.Module) -> dict[str, Tensor]:
    """All parameters, gathered."""
    named = {name.removeprefix("module."): parameter.detach() for name, parameter in net.named_parameters()}
    return {name: one.full_tensor() if hasattr(one, "full_tensor") else one.clone() for name, one in named.items()}


def every_monitor(every: int = 1) -> list[redline.Monitor]:
    return [
        WeightSpectrum(every, tolerance=1e-6),
        UpdateSpectrum(every, tolerance=1e-6),
        GhostRadius(every, exact=True, max_samples=None),
        LayerRadii(every, max_samples=None),
        StepHealth(every),
    ]


def optimizer_of(net: nn.Module, rate: float = 0.01) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), rate, weight_decay=0.1)


def train(
    how: str,
    steps: int = 1,
    *,
    monitors: Sequence[redline.Monitor] = (),
    controllers: Sequence[Any] = (),
    spike: Callable[[int], float] = lambda step: 1.0,
    loss_of: Callable[[int, int, Tensor], Tensor] = lambda rank, step, loss: loss,
    part: Callable[[int, Tensor], Tensor] = lambda rank, batch: batch,
    **more: Any,
) -> tuple[redline.Session, nn.Module]:
    """Train for some steps with Redline attached, and close it.

    Args:
        how: see ``wrapped``.
        steps: how many.
        monitors: of the session.
        controllers: of the session.
        spike: times the rate, by step.
        loss_of: what becomes of the loss, by rank and step.
        part: of this rank's batch that it trains on.
        more: for ``redline.attach``.
    """
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if how in ("alone", "tp"):  # where ranks share a batch
        rank, size = 0, 1
    net = wrapped(model(), how)
    optimizer = optimizer_of(net)
    rate = optimizer.param_groups[0]["lr"]
    with redline.attach(net, optimizer, monitors=monitors, controllers=controllers, **more) as session:
        for step, (tokens, targets) in enumerate(batches(steps, rank, size)):
            tokens, targets = part(rank, tokens), part(rank, targets)
            optimizer.param_groups[0]["lr"] = rate * spike(step)
            loss = F.cross_entropy(net(tokens).flatten(0, 1), targets.flatten())
            session.observe(loss=loss)
            loss_of(rank, step, loss).backward()
            optimizer.step()
            optimizer.zero_grad()
        _ = session.latest
    return session, net


def readings(rank: int, how: str, steps: int = 1) -> dict[tuple[str, ...], float]:
    """All readings of the last step, by metric and labels."""
    session, _ = train(how, steps, monitors=every_monitor())
    assert session.notes == (), session.notes
    return {(one.metric, *one.labels): value for one, value in session.latest.values.items()}
