"""Copies to the host: in order, in full precision, and of the moment at which they were started."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from redline.host_copy import HostCopy, to_host


def test_every_tensor_comes_as_a_flat_list_in_its_place() -> None:
    tensors = [
        torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        torch.tensor(True),
        torch.tensor([], dtype=torch.float16),
        torch.tensor([5, 6]),
        torch.tensor(1 / 3, dtype=torch.float64),
    ]
    assert HostCopy(tensors).read() == [[1.0, 2.0, 3.0, 4.0], [1.0], [], [5.0, 6.0], [1 / 3]]
    assert list(to_host(tensors)) == HostCopy(tensors).read()


def test_what_is_not_finite_arrives_as_it_is() -> None:
    ((low, high, nan),) = HostCopy([torch.tensor([-math.inf, math.inf, math.nan])]).read()
    assert (low, high, math.isnan(nan)) == (-math.inf, math.inf, True)


def test_nothing_is_a_copy_too() -> None:
    copy = HostCopy([])
    assert copy.ready
    assert copy.read() == []


@pytest.mark.parametrize("tensor", [torch.zeros(3, dtype=torch.float64), torch.zeros(3)])
def test_it_is_of_the_moment_at_which_it_was_started(tensor: Tensor) -> None:
    copy = HostCopy([tensor])
    tensor += 1
    assert copy.read() == [[0.0] * 3]


def test_on_the_cpu_it_is_there_at_once_and_can_be_read_again() -> None:
    copy = HostCopy([torch.tensor(1.0)])
    assert copy.ready
    assert copy.read() == copy.read() == [[1.0]]
