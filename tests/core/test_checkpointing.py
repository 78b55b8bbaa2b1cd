"""Activation checkpointing: computed twice, measured once, and as if it were not there."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from technique_runs import LABELS, Block, Blocks, R, Trained, batch, every_step, reference, sgd, train
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.checkpoint import CheckpointFunction, checkpoint

import redline
from redline.capture import ForwardCapture, unwrapped
from redline.numerics.replay import replaying


def re_entrant(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(block, x, use_reentrant=True)  # type: ignore[no-any-return]


def not_re_entrant(block: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(block, x, use_reentrant=False)  # type: ignore[no-any-return]


def called_by(call: Callable[..., Tensor]) -> Callable[[], nn.Module]:
    return lambda: Blocks(call=call)


def wrapped_by(kind: CheckpointImpl) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model = Blocks()
        for place, block in enumerate(model.layers):
            model.layers[place] = checkpoint_wrapper(block, checkpoint_impl=kind)
        return model

    return make


CHECKPOINTED = {
    "re-entrant": called_by(re_entrant),
    "not re-entrant": called_by(not_re_entrant),
    "wrapped, re-entrant": wrapped_by(CheckpointImpl.REENTRANT),
    "wrapped, not re-entrant": wrapped_by(CheckpointImpl.NO_REENTRANT),
    "wrapped as a whole": lambda: checkpoint_wrapper(Blocks()),
}
every_kind = pytest.mark.parametrize("make", CHECKPOINTED.values(), ids=CHECKPOINTED)


@cache
def plain(module: str | None = None) -> Trained:
    return train(watched=True, module=module, monitors=with_layers)


def with_layers() -> list[redline.Monitor]:
    return [*every_step(), redline.LayerRadii(1)]


@every_kind
@pytest.mark.parametrize("module", [None, "layers.1"])
@pytest.mark.filterwarnings("error:None of the inputs have requires_grad:UserWarning")
def test_readings_and_run_are_those_without(make: Callable[[], nn.Module], module: str | None) -> None:
    """Also where a checkpointed block is what gives the logits: it is called again in backward."""
    watched = train(make, watched=True, module=module, monitors=with_layers)
    assert watched.equals(train(make, watched=False))
    assert watched.equals(plain(module))
    assert watched.notes == ()
    assert watched.labels == LABELS
    assert watched.differences(plain(module), within=1e-6) == []


@pytest.mark.parametrize("make", [CHECKPOINTED["wrapped, not re-entrant"], CHECKPOINTED["wrapped, re-entrant"]])
def test_layers_go_by_the_names_they_have_without(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make()
    optimizer = sgd(model)
    with redline.attach(model, optimizer, monitors=[redline.LayerRadii(1)]) as session:
        x, y = batch(0)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        assert set(session.latest.layers("redline_activation_step_size")) == {"layers.0", "layers.1"}
        assert session.notes == ()


def test_a_wrapper_comes_off() -> None:
    model = Blocks()
    assert unwrapped(checkpoint_wrapper(model)) is model
    assert unwrapped(checkpoint_wrapper(torch.compile(model, backend="eager"))) is model
    assert unwrapped(torch.compile(checkpoint_wrapper(model), backend="eager")) is model


# What the recomputation must not be taken for ---------------------------------------------------------


def watched_block(call: Callable[..., Tensor]) -> tuple[Block, ForwardCapture, list[str]]:
    """A block that is called by ``call`` within a model that is not called itself."""
    told: list[str] = []
    trainer = nn.Module()
    trainer.net = Block(0.1)
    capture = ForwardCapture(trainer, None, lambda: told.append("forward"))
    capture.armed = True
    return trainer.net, capture, told


def test_recomputation_is_no_forward() -> None:
    block, capture, told = watched_block(not_re_entrant)
    x = torch.randn(3, 8)
    output = not_re_entrant(block, x)
    first = capture.call()
    assert told == ["forward"]
    output.sum().backward()
    assert told == ["forward"]
    assert capture.call() is first, "not copied once more"


def test_recomputation_of_an_earlier_micro_batch_is_not_the_last_call() -> None:
    """Two forwards, then one backward through both: it goes through the last one first."""
    block, capture, _ = watched_block(not_re_entrant)
    first, last = torch.randn(3, 8), torch.randn(3, 8)
    (not_re_entrant(block, first).sum() + not_re_entrant(block, last).sum()).backward()
    call = capture.call()
    assert call is not None
    assert torch.equal(call.args[0], last)


def test_re_entrant_checkpoint_shows_its_inputs_only_in_backward() -> None:
    """Its forward runs without gradients, as an evaluation does; of several the last backward counts."""
    block, capture, told = watched_block(re_entrant)
    for _ in range(2):
        x = torch.randn(3, 8, requires_grad=True)
        output = re_entrant(block, x)
        output.sum().backward()
        call = capture.call()
        assert call is not None
        assert torch.equal(call.args[0], x)
    assert told == []
    last = torch.randn(3, 8)
    block(last)
    re_entrant(block, torch.randn(3, 8, requires_grad=True)).sum().backward()
    call = capture.call()
    assert call is not None
    assert torch.equal(call.args[0], last), "a call with gradients is the step's own"


def test_recomputation_of_a_whole_model_is_no_call_around_the_module_that_is_watched() -> None:
    model, told = Blocks(), []
    ForwardCapture(model, "layers.0", lambda: told.append("forward"))
    x, _ = batch(0)
    output = not_re_entrant(model, x)
    assert told == ["forward"] * 2, "of the model, and of the module in it"
    output.sum().backward()
    assert told == ["forward"] * 2


@pytest.mark.parametrize("monitor", [redline.StepHealth(1), redline.GhostRadius(1)], ids=["unarmed", "armed"])
def test_recomputation_between_two_optimizers_does_not_end_their_joint_step(monitor: redline.Monitor) -> None:
    """The first optimizer steps, then comes the backward of the second one's loss, which computes the net again."""
    torch.manual_seed(0)
    model = nn.Module()  # is not called itself
    model.net, model.other = nn.Sequential(Block(0.0), nn.Linear(8, 5)), nn.Linear(8, 5)
    optimizers = [torch.optim.SGD(half.parameters(), 0.1) for half in (model.net, model.other)]
    with redline.attach(model, optimizers, monitors=[monitor], module="net") as session:
        x, y = torch.randn(7, 8), torch.randint(0, 5, (7,))
        for _ in range(3):
            first = F.cross_entropy(not_re_entrant(model.net, x), y)
            second = F.cross_entropy(model.other(x) + not_re_entrant(model.net, x), y)
            first.backward()
            optimizers[0].step()
            second.backward()
            optimizers[1].step()
    assert session.latest.value("redline_steps_total") == 3


# Replaying --------------------------------------------------------------------------------------------


def test_r_of_a_re_entrant_model_is_that_of_the_whole_jacobian() -> None:
    torch.manual_seed(0)
    model = Blocks(dropout=0.0, call=re_entrant)
    optimizer = sgd(model)
    with redline.attach(model, optimizer, monitors=[redline.GhostRadius(1, max_samples=None)]) as session:
        for step in range(2):
            before = _twin(model)
            x, y = batch(step)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert session.latest.value(R) == pytest.approx(reference(before, _twin(model), x), rel=1e-4)


def _twin(model: nn.Module) -> nn.Module:
    twin = Blocks(dropout=0.0)
    twin.load_state_dict(model.state_dict())
    return twin


def test_checkpoints_are_back_after_a_replay_also_one_that_ends_badly() -> None:
    def memory_saved() -> bool:
        x = torch.randn(3, 8, requires_grad=True)
        output: Any = re_entrant(Block(0.1), x)
        return type(output.grad_fn).__name__ == "CheckpointFunctionBackward"

    own = vars(CheckpointFunction).copy()
    with replaying(Block(0.1)):
        assert not memory_saved()
        with replaying(Block(0.1)):  # as from another thread
            pass
        assert not memory_saved()
    assert memory_saved()
    with pytest.raises(ZeroDivisionError), replaying(Block(0.1)):
        raise ZeroDivisionError
    assert memory_saved()
    assert vars(CheckpointFunction) == own
