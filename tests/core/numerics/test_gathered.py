"""Units of a model, and torch's hooks, as one process can see them."""

from __future__ import annotations

from contextlib import suppress
from functools import partial

import pytest
import torch
from torch import nn

from redline.errors import ConfigurationError
from redline.numerics.gathered import _places, _torchs_hooks_aside
from redline.numerics.sharded import class_name, is_sharded, local_part
from redline.numerics.tangents import logit_tangent


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))])
        self.deeper = nn.ModuleDict({"rows": nn.ModuleList([nn.Linear(4, 4)])})
        self.readout = nn.Linear(4, 5, bias=False)
        self.readout.weight = self.embedding.weight
        self.blocks[1][1].weight = self.blocks[1][0].weight  # within one unit
        self.deeper["rows"][0].bias = self.blocks[0].bias  # across two


def test_a_parameter_belongs_to_the_innermost_unit_around_all_that_hold_it():
    model = Tied()
    names = {module: name for name, module in model.named_modules()}
    found = {
        name: (names[unit], [f"{names[module]}.{own}" for module, own in places])
        for unit, name, places in _places(model, {name for name, _ in model.named_parameters()})
    }
    assert found == {
        "embedding.weight": ("", ["embedding.weight", "readout.weight"]),
        "blocks.0.weight": ("blocks.0", ["blocks.0.weight"]),
        "blocks.0.bias": ("", ["blocks.0.bias", "deeper.rows.0.bias"]),
        "blocks.1.0.weight": ("blocks.1", ["blocks.1.0.weight", "blocks.1.1.weight"]),
        "blocks.1.0.bias": ("blocks.1", ["blocks.1.0.bias"]),
        "blocks.1.1.bias": ("blocks.1", ["blocks.1.1.bias"]),
        "deeper.rows.0.weight": ("deeper.rows.0", ["deeper.rows.0.weight"]),
    }


def test_what_is_whole_on_each_rank_is_the_models():
    model = Tied()
    assert {unit for unit, _, _ in _places(model, set())} == {model}


def of_torch(*_: object) -> None:
    """A hook, as torch.distributed would register it."""


of_torch.__module__ = "torch.distributed.tensor._api"


def of_the_user(*_: object) -> None:
    """A hook of the user's own."""


def test_torchs_hooks_are_aside_and_come_back_to_their_places():
    model = nn.Sequential(nn.Linear(2, 2))
    hooks = [of_the_user, of_torch, of_the_user, partial(of_torch, 1), of_the_user]
    handles = [model[0].register_forward_hook(hook) for hook in hooks]
    model[0].register_forward_pre_hook(of_torch)
    with suppress(ValueError), _torchs_hooks_aside(model):
        assert list(model[0]._forward_hooks.values()) == [of_the_user] * 3
        assert not model[0]._forward_pre_hooks
        handles[2].remove()
        model[0].register_forward_hook(new := lambda *_: None)
        raise ValueError("within")
    assert list(model[0]._forward_hooks.values()) == [hooks[0], hooks[1], hooks[3], hooks[4], new]
    assert list(model[0]._forward_pre_hooks.values()) == [of_torch]
    handles[3].remove()  # its handle still knows where it is
    assert list(model[0]._forward_hooks.values()) == [hooks[0], hooks[1], hooks[4], new]


def test_a_plain_tensor_is_all_of_itself():
    tensor = torch.ones(3, requires_grad=True)
    assert not is_sharded(tensor)
    assert local_part(tensor).data_ptr() == tensor.data_ptr()
    assert class_name(nn.Linear(1, 1)) == "Linear"


def test_a_model_without_shards_has_no_rung_for_them():
    model = nn.Linear(2, 3)
    with pytest.raises(ConfigurationError, match="got method='sharded_difference' for a model that is whole"):
        logit_tangent(model, (torch.ones(1, 2),), {}, {}, method="sharded_difference")
