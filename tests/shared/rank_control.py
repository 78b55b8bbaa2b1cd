"""Controllers on several ranks: spikes, failures of one rank alone, and what becomes of checkpoints."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rank_training import batches, model, optimizer_of, train, whole, wrapped
from torch import Tensor

import redline
from redline import GhostRadius, NonFiniteGuard, SpikeGuard, StepClamp, StepHealth, UpdateClamp, WeightDecayControl
from redline.own_time import OwnTime


def controllers() -> list[Any]:
    """One of each that may act on one run."""
    return [
        SpikeGuard(every=2),
        NonFiniteGuard(),
        UpdateClamp(0.2),
        WeightDecayControl(every=2, horizon=4),
        StepClamp(0.5, max_samples=None),
    ]


def spiked(rank: int, how: str, kind: str) -> dict[str, Any]:
    """A run with rates 300 times too high at some steps; what became of it, as numbers that can be compared."""
    every: dict[str, list[Any]] = {
        "clamp": [StepClamp(0.5, max_samples=None)],
        "sparing": [StepClamp(0.5, max_samples=2)],
        "exact": [StepClamp(0.5, radius="exact", max_samples=None)],
        "quantile": [StepClamp(0.5, reduction=0.9, max_samples=None)],
        "all": controllers(),
    }
    session, net = train(
        how,
        8,
        monitors=[GhostRadius(1, max_samples=None), StepHealth()],
        controllers=every[kind],
        spike=lambda step: 300.0 if step in (2, 5) else 1.0,
    )
    return {
        "weights": whole(net),
        "interventions": [(one.controller, one.step, one.action, dict(one.saw)) for one in session.interventions],
        "r": session.latest.value("redline_normalized_step_size"),
        "notes": session.notes,
    }


def one_rank_fails(rank: int, how: str, failure: str) -> dict[str, Any]:
    """Rank 1 alone has a loss that is not finite, is slow, or has fewer samples, or none that can be measured."""

    def loss_of(at: int, step: int, loss: Tensor) -> Tensor:
        if at != 1 or step != 3:
            return loss
        if failure == "nonfinite":
            return loss * float("nan")
        if failure == "slow":
            time.sleep(2.0)
        return loss

    def part(at: int, batch: Tensor) -> Tensor:
        return batch[: len(batch) - 1] if failure == "shorter" and at == 1 else batch

    calls = 0

    def logits(output: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if failure == "unmeasured" and rank == 1 and calls > 4:
            raise RuntimeError("no logits on this rank")
        return output

    session, net = train(
        how,
        6,
        monitors=[GhostRadius(2, max_samples=None), StepHealth()],
        controllers=[NonFiniteGuard(), StepClamp(0.5, max_samples=2, stale_after=1)],
        spike=lambda step: 300.0 if step == 4 else 1.0,
        loss_of=loss_of,
        part=part,
        logits=logits,
    )
    return {
        "weights": whole(net),
        "interventions": [(one.controller, one.step, one.action) for one in session.interventions],
        "loss": session.latest.value("redline_loss"),
        "samples": session.latest.value("redline_batch_samples"),
        "notes": session.notes,
    }


def budgeted(rank: int) -> list[int]:
    """The steps at which a costly monitor measured, by a clock set by hand; observing costs rank 1 alone."""
    measured: list[int] = []
    now = 0.0

    class Costly(redline.Monitor):
        def measure(self, step: Any, readings: Any) -> None:
            nonlocal now
            measured.append(step.index)
            now += 0.97 if rank == 1 else 0.0

    def loss_of(at: int, step: int, loss: Tensor) -> Tensor:
        nonlocal now
        now += 0.1
        return loss

    with patch("redline.session.OwnTime", lambda device: OwnTime(device, lambda: now)):
        train("ddp", 60, monitors=[Costly(1), StepHealth()], loss_of=loss_of, overhead_budget=0.5)
    return measured


def attached(rank: int, which: str) -> str:
    """What attaching says where ranks do not do the same."""
    net = model()
    if which == "parameters" and rank == 1:
        net.extra = torch.nn.Linear(2, 2)
    monitors: list[Any] = [StepHealth()] if which == "monitors" and rank == 1 else [GhostRadius()]
    if which == "settings":
        monitors = [GhostRadius(every=1 + rank)]
    budget = 0.1 if which == "budget" and rank == 1 else None
    import redline.ranks

    redline.ranks._ARRIVAL = 1.0
    if which == "alone" and rank == 1:
        dist.barrier()
        return ""
    try:
        optimizer = optimizer_of(net)
        with redline.attach(net, optimizer, monitors=monitors, overhead_budget=budget) as session:
            if which == "steps":
                if rank == 1:
                    session.load_state_dict({**session.state_dict(), "index": 7})
                net(torch.zeros(2, 6, dtype=torch.int64)).sum().backward()
                optimizer.step()
    except redline.ConfigurationError as error:
        return str(error)
    finally:
        if which == "alone":
            dist.barrier()
    return "attached"


def resumed(rank: int, how: str, folder: str, steps: int, more: int) -> dict[str, Any]:
    """Train; with a checkpoint there, go on from it; leave one behind, written by rank 0 as plain loops do."""
    file, size = Path(folder) / "checkpoint.pt", dist.get_world_size()
    net = model()
    kept = torch.load(file, weights_only=False) if file.exists() else None
    if kept is not None:
        net.load_state_dict(kept["weights"])
    net = wrapped(net, how)
    optimizer = optimizer_of(net)
    session = redline.attach(net, optimizer, monitors=[GhostRadius(1), StepHealth()], controllers=controllers())
    if kept is not None:
        session.load_state_dict(kept["session"])
    data = list(batches(steps + more, rank, size))
    for tokens, targets in data[steps:] if kept is not None else data[:steps]:
        loss = F.cross_entropy(net(tokens).flatten(0, 1), targets.flatten())
        session.observe(loss=loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = whole(net)
    if rank == 0:
        torch.save({"weights": weights, "session": session.state_dict()}, file)
    state = session.state_dict()
    session.close()
    return {
        "weights": weights,
        "steps": session.latest.value("redline_steps_total"),
        "controllers": {name: _told(one) for name, one in state["control"]["controllers"].items()},
        "notes": session.notes,
    }


def _told(state: dict[str, Any]) -> dict[str, Any]:
    """What decides: all but warm starts, which are each rank's own."""
    return {key: value for key, value in state.items() if key not in ("limits", "spectra")}


def observed_at(rank: int, steps: list[int]) -> dict[str, Any]:
    """A run whose loss is observed at some steps only; its guard, its clamp and its readings."""
    net = model()
    optimizer = optimizer_of(net)
    controllers: list[Any] = [SpikeGuard(), StepClamp(0.5, max_samples=None)]
    wrapping = "ddp" if dist.is_initialized() else "alone"
    net = wrapped(net, wrapping)
    losses = []
    with redline.attach(net, optimizer, monitors=[StepHealth()], controllers=controllers) as session:
        size = dist.get_world_size() if dist.is_initialized() else 1
        for step, (tokens, targets) in enumerate(batches(12, rank, size)):
            loss = F.cross_entropy(net(tokens).flatten(0, 1), targets.flatten())
            if step in steps:
                session.observe(loss=loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found = session.latest.values.get(redline.Series("redline_loss"))
            losses.append(found)
        return {
            "losses": losses,
            "nonfinite": session.latest.value("redline_nonfinite_total", source="loss"),
            "interventions": [(one.controller, one.step, one.action) for one in session.interventions],
        }
