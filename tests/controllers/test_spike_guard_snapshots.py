"""SpikeGuard: the snapshot that it keeps, in memory and in checkpoints."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bits import frozen
from rich.console import Console
from spike_guard_runs import (
    EVERY_OPTIMIZER,
    Net,
    Run,
    adamw_foreach,
    adamw_with_a_rate_in_a_tensor,
    assert_same,
    falling,
    sgd,
)
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils._pytree import tree_leaves
from torch_optimizers import adamw_fused, muon_and_adamw

import redline

# In memory ----------------------------------------------------------------------------------------


def test_a_snapshot_is_renewed_while_the_loss_is_good() -> None:
    guarded = Run(controllers=[redline.SpikeGuard(every=7, patience=20)])
    kept = []
    for index in range(40):
        guarded.step(spoil=["batch"] if 20 <= index < 24 else [])
        kept.append(guarded.session.report().snapshots[0].step)
    assert guarded.did == [(index, "withhold") for index in range(20, 24)]
    # That of step 21 is put off until the loss is good again.
    assert kept == [0] * 7 + [7] * 7 + [14] * 10 + [24] * 7 + [31] * 7 + [38] * 2


def printed(report: redline.StabilityReport) -> str:
    console = Console(file=io.StringIO(), width=200, color_system=None)
    console.print(report)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def tensor_bytes(state: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(state) if isinstance(leaf, Tensor))


PARAMETERS, MATRICES = (6 * 16 + 16) + 2 * 16 + (16 * 3 + 3), 6 * 16 + 16 * 3


BUFFERS = 4 * 2 * 16 + 8  # running mean and variance, and a count in 64 bits


@pytest.mark.parametrize(
    ("optimizers", "held"),
    [
        (sgd, 4 * PARAMETERS),
        (adamw_foreach, 3 * 4 * PARAMETERS + 6 * 4),  # two moments, their maximum, a count for each of 6 parameters
        (adamw_fused, 2 * 4 * PARAMETERS + 6 * 4),
        (adamw_with_a_rate_in_a_tensor, 2 * 4 * PARAMETERS + 6 * 4 + 4),
        (muon_and_adamw, 4 * MATRICES + 2 * 4 * (PARAMETERS - MATRICES) + 4 * 4),
    ],
)
@pytest.mark.parametrize(("memory", "in_checkpoints"), [("device", True), ("host", False)])
def test_the_report_says_what_is_held_in_memory(
    optimizers: Callable[[nn.Module], list[Optimizer]], held: int, memory: Any, in_checkpoints: bool
) -> None:
    guarded = Run(optimizers, controllers=[redline.SpikeGuard(every=10, memory=memory, in_checkpoints=in_checkpoints)])
    assert guarded.session.report().snapshots == ()
    assert "a copy of the run" not in printed(guarded.session.report())
    guarded.steps(15)
    (kept,) = guarded.session.report().snapshots
    size = 4 * PARAMETERS + BUFFERS + held
    assert (kept.controller, kept.step, kept.memory, kept.in_checkpoints) == (
        "SpikeGuard",
        10,
        memory,
        in_checkpoints,
    )
    assert kept.bytes == size
    assert guarded.session.report().to_dict()["snapshots"] == (vars(kept),)
    line = next(line for line in printed(guarded.session.report()).splitlines() if "copy of the run" in line)
    assert line.strip("│ ").startswith("kept ")
    assert f"SpikeGuard: a copy of the run at step 10, {size / 2**20:.3g} MiB in {memory} memory; " in line
    assert ("checkpoints carry it" if in_checkpoints else "checkpoints leave it out") in line
    guarded.session.close()
    assert guarded.session.report().snapshots == (kept,)


def test_the_report_counts_what_came_with_the_schedulers() -> None:
    average = AveragedModel(Net())
    average.step = lambda: None  # type: ignore[assignment]
    guarded = Run(sgd, lambda _: [average], [redline.SpikeGuard()])
    guarded.steps(1)
    (kept,) = guarded.session.report().snapshots
    assert kept.bytes == 4 * PARAMETERS + BUFFERS + tensor_bytes(
        average.state_dict()
    )  # before the first update there are no moments


@EVERY_OPTIMIZER
def test_kept_in_host_memory_it_comes_back_alike(optimizers: Callable[[nn.Module], list[Optimizer]]) -> None:
    device, host = (
        Run(optimizers, falling, [redline.SpikeGuard(memory=memory)])  # type: ignore[arg-type]
        for memory in ("device", "host")
    )
    for run in (device, host):
        run.steps(30)
        run.step(spoil=["parameters"])
        run.steps(10)
    assert host.did == device.did == [(30, "withhold"), (31, "rollback")]
    assert_same(host.after[31], host.before[20])
    assert_same(host.after, device.after)


# In checkpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize("in_checkpoints", [True, False])
def test_session_state_carries_the_snapshot_where_asked(in_checkpoints: bool) -> None:
    guarded = Run(sgd, falling, [redline.SpikeGuard(in_checkpoints=in_checkpoints)])
    guarded.steps(30)
    state = guarded.session.state_dict()
    assert tensor_bytes(state) == (guarded.session.report().snapshots[0].bytes if in_checkpoints else 0)


def resumed(guarded: Run, guard: redline.SpikeGuard) -> Run:
    """Another run that goes on where this one is, through a file."""
    file = io.BytesIO()
    torch.save({"run": guarded.state(), "session": guarded.session.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    run = Run(sgd, falling, [guard])
    run.load(saved["run"])
    run.session.load_state_dict(saved["session"])
    run.losses, run.before, run.after = (list(one) for one in (guarded.losses, guarded.before, guarded.after))
    return run


def test_left_out_of_checkpoints_a_resumed_run_takes_a_new_one_at_once() -> None:
    guarded = Run(sgd, falling, [redline.SpikeGuard(in_checkpoints=False)])
    guarded.steps(30)
    run = resumed(guarded, redline.SpikeGuard(in_checkpoints=False))
    assert run.session.report().snapshots == ()
    run.steps(1)
    assert [kept.step for kept in run.session.report().snapshots] == [30]
    run.steps(2)
    run.step(spoil=["parameters"])
    run.step()
    assert run.did == [(33, "withhold"), (34, "rollback")]
    assert_same(run.after[34], run.before[30])


def test_left_out_of_checkpoints_a_run_resumed_amid_jumps_waits_for_a_good_loss() -> None:
    guarded = Run(sgd, falling, [redline.SpikeGuard(in_checkpoints=False)])
    guarded.steps(30)
    guarded.step(spoil=["batch"])
    run = resumed(guarded, redline.SpikeGuard(in_checkpoints=False))
    run.step(spoil=["batch"])
    assert run.session.report().snapshots == ()
    run.step()
    assert run.did == [(30, "withhold"), (31, "withhold")]
    assert [kept.step for kept in run.session.report().snapshots] == [32]


@pytest.mark.parametrize("then", [True, False])
def test_a_run_may_be_resumed_with_another_choice_of_in_checkpoints(then: bool) -> None:
    guarded = Run(sgd, falling, [redline.SpikeGuard(in_checkpoints=then)])
    guarded.steps(30)
    run = resumed(guarded, redline.SpikeGuard(in_checkpoints=not then))
    run.steps(1)
    run.step(spoil=["parameters"])
    run.step()
    assert run.did == [(31, "withhold"), (32, "rollback")]
    (kept,) = run.session.report().snapshots
    assert_same(run.after[32], run.before[kept.step])


def test_a_state_taken_is_not_changed_by_the_run_that_goes_on() -> None:
    guarded = Run(sgd, falling, [redline.SpikeGuard(patience=0)])
    guarded.steps(30)
    state = guarded.session.state_dict()
    then = frozen(state)
    guarded.step(spoil=["parameters"])
    guarded.steps(30)
    assert [action for _, action in guarded.did] == ["rollback"]
    assert frozen(state) == then


def test_a_run_is_not_changed_by_another_that_loaded_its_state() -> None:
    guarded = Run(sgd, falling, [redline.SpikeGuard(patience=0)])
    guarded.steps(30)
    other = Run(sgd, falling, [redline.SpikeGuard(patience=0)])
    other.load(guarded.state())
    other.session.load_state_dict(guarded.session.state_dict())
    other.losses = list(guarded.losses)
    other.step(spoil=["parameters"])
    other.steps(9)
    assert [action for _, action in other.did] == ["rollback"]
    guarded.step(spoil=["parameters"])
    assert_same(guarded.after[30], guarded.before[20])
