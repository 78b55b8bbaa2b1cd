"""Observing alone changes nothing: models wrapped in DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch.distributed as dist
from observed_runs import Run, assert_unchanged, muon_and_adamw, sgd
from torch import nn
from torch.optim import Optimizer


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def distribute(run: Run) -> None:
    run.called = nn.parallel.DistributedDataParallel(run.model, find_unused_parameters=True)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("moment", ["prepare", "midway"])
@pytest.mark.parametrize("optimizers", [sgd, muon_and_adamw])
def test_distributed_data_parallel_is_unchanged(
    moment: str, optimizers: Callable[[nn.Module], list[Optimizer]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert_unchanged(capsys, steps=20, optimizers=optimizers, **{moment: distribute})
