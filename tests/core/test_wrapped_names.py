"""Names of parameters and buffers: those of the bare model, whatever it is wrapped in and whenever that happens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from technique_runs import Blocks, batch, sgd
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim import Optimizer

import redline
from redline.integrations.doctor.coverage import cover
from redline.numerics.names import plain_name
from redline.scaling import classify


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("layers.0._orig_mod.up.weight", "layers.0.up.weight"),
        ("_fsdp_wrapped_module.layers.0._checkpoint_wrapped_module._orig_mod.up.weight", "layers.0.up.weight"),
        ("_orig_mod", ""),
        ("my_orig_mod.weight", "my_orig_mod.weight"),
        ("", ""),
    ],
)
def test_a_plain_name(name: str, plain: str) -> None:
    assert plain_name(name) == plain


def blocks_wrapped(model: Blocks) -> Blocks:
    """One compiled, one checkpointed."""
    model.layers[0] = torch.compile(model.layers[0], backend="eager")
    model.layers[1] = checkpoint_wrapper(model.layers[1])
    return model


def test_names_are_the_same_wherever_they_are_asked_for() -> None:
    """Of width transfer and of the doctor as well, and of what a checkpoint carries from one run to the other."""
    plain, compiled = Blocks(), blocks_wrapped(Blocks())
    assert classify(compiled, 8) == classify(plain, 8)
    assert classify(compiled, 8, vector_like="layers.0.up.weight")["layers.0.up.weight"].kind == "vector-like"
    assert cover(compiled) == cover(plain)


class BackToTheStart(redline.Controller):
    """Keeps the run ahead of its first step, and goes back there ahead of its third."""

    def before_update(self, step: redline.Step) -> redline.Keep | redline.RollBack | None:
        return {0: redline.Keep(), 2: redline.RollBack("as told.")}.get(step.index)


def one_step(model: nn.Module, optimizer: Optimizer, seed: int) -> None:
    F.cross_entropy(model(batch(seed)[0]), batch(seed)[1]).backward()
    optimizer.step()
    optimizer.zero_grad()


def with_a_buffer() -> Blocks:
    model = Blocks()
    for block in model.layers:
        block.up.register_buffer("ahead", torch.zeros(1))
    return model


def values(model: nn.Module) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in model.state_dict().values()]


def test_a_run_that_is_compiled_midway_goes_back_to_where_it_was_not() -> None:
    model = with_a_buffer()
    start, optimizer = values(model), sgd(model)
    with redline.attach(model, optimizer, monitors=[], controllers=[BackToTheStart()]):
        one_step(model, optimizer, 0)
        blocks_wrapped(model).layers[1].up.ahead += 1
        one_step(model, optimizer, 1)
        one_step(model, optimizer, 2)
    assert all(torch.equal(*pair) for pair in zip(values(model), start, strict=True))


def test_a_compiled_run_goes_back_to_the_snapshot_of_the_eager_one_that_it_resumes() -> None:
    model = with_a_buffer()
    start, optimizer = values(model), sgd(model)
    with redline.attach(model, optimizer, monitors=[], controllers=[BackToTheStart()]) as session:
        one_step(model, optimizer, 0)
        one_step(model, optimizer, 1)
        state = session.state_dict()
    resumed = blocks_wrapped(with_a_buffer())
    optimizer = sgd(resumed)
    with redline.attach(resumed, optimizer, monitors=[], controllers=[BackToTheStart()]) as session:
        session.load_state_dict(state)
        one_step(resumed, optimizer, 2)
    assert all(torch.equal(*pair) for pair in zip(values(resumed), start, strict=True))
