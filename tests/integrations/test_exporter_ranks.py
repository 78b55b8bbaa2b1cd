"""Which ranks serve: two processes as torchrun starts them, each with a loss of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from scraping import Loop, samples, scrape

import redline
from redline.integrations.ranks import local_rank
from redline.ranks import Ranks

CODE = """
import json, os, sys, warnings
import torch, redline
warnings.simplefilter("error", redline.RedlineWarning)
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 2))
optimizer = torch.optim.SGD(model.parameters(), 0.1)
exporter = redline.PrometheusExporter(every=1, **json.loads(sys.argv[1]))
with redline.attach(model, optimizer, monitors=[redline.StepHealth()], sinks=[exporter]) as session:
    loss = model(torch.ones(4, 3)).logsumexp(-1).mean()
    loss.backward()
    session.observe(loss=10.0 + torch.distributed.get_rank())
    optimizer.step()
    torch.distributed.barrier()
    print(exporter.url, flush=True)
    sys.stdin.readline()
torch.distributed.destroy_process_group()
"""


def free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody uses."""
    while True:
        with ExitStack() as stack:
            first = stack.enter_context(socket.socket())
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                for further in range(port + 1, port + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", further))
            except (OSError, OverflowError):
                continue
            return port


@contextmanager
def two_ranks(**exporter: Any) -> Iterator[list[str]]:
    """URLs of two processes of one run, or "None" of one that serves nothing."""
    meeting = free_ports(1)
    processes = []
    for rank in range(2):
        environment = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": 2,
            "LOCAL_WORLD_SIZE": 2,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": meeting,
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", CODE, json.dumps(exporter)],
                env={**os.environ, **{name: str(value) for name, value in environment.items()}},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    try:
        yield [process.stdout.readline().strip() for process in processes if process.stdout]
        for process in processes:
            process.communicate("\n", timeout=60)
            assert process.returncode == 0
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_every_rank_serves_on_a_port_of_its_own_if_asked():
    port = free_ports(2)
    with two_ranks(port=port, all_ranks=True) as urls:
        assert urls == [f"http://127.0.0.1:{port + rank}/metrics" for rank in range(2)]
        pages = [samples(scrape(url)) for url in urls]
    assert [page["redline_loss"][()] for page in pages] == [10.5, 10.5]  # of both ranks
    assert [page["redline_steps_total"][()] for page in pages] == [1, 1]
    assert {dict(labels)["world_size"] for page in pages for labels in page["redline_run_info"]} == {"2"}


def test_rank_0_alone_serves_unless_asked():
    port = free_ports(2)
    with two_ranks(port=port) as urls:
        assert urls == [f"http://127.0.0.1:{port}/metrics", "None"]
        assert samples(scrape(urls[0]))["redline_loss"][()] == 10.5


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Not launched by anything, whatever these tests are run by."""
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_a_single_process_serves_on_the_port_itself(launched: pytest.MonkeyPatch):
    port = free_ports(1)
    exporter = redline.PrometheusExporter(port, all_ranks=True)
    loop = Loop(exporter, monitors=[])
    assert exporter.url == f"http://127.0.0.1:{port}/metrics"
    loop.session.close()


def test_local_rank_is_what_the_launcher_says(launched: pytest.MonkeyPatch):
    assert local_rank() == 0
    launched.setenv("SLURM_LOCALID", "3")
    assert local_rank() == 3
    launched.setenv("LOCAL_RANK", "1")
    assert local_rank() == 1


def test_port_0_stays_any_free_one(launched: pytest.MonkeyPatch):
    launched.setenv("LOCAL_RANK", "3")
    exporter = redline.PrometheusExporter(0, all_ranks=True)
    loop = Loop(exporter, monitors=[])
    assert exporter.port > 3
    loop.session.close()


def test_a_rank_that_nobody_told_its_place_says_so_and_trains_on(launched: pytest.MonkeyPatch):
    launched.setattr(torch.distributed, "is_initialized", lambda: True)
    launched.setattr(torch.distributed, "get_rank", lambda *_: 1)
    launched.setattr(torch.distributed, "get_world_size", lambda *_: 2)
    launched.setattr(Ranks, "of_run", Ranks)  # the session is not what is tried: there is nobody to meet
    exporter = redline.PrometheusExporter(all_ranks=True)
    with pytest.warns(redline.RedlineWarning, match="got several processes and no LOCAL_RANK; .* Set LOCAL_RANK"):
        loop = Loop(exporter, monitors=[])
    launched.undo()
    loop.step()
    assert exporter.url is None
    loop.session.close()


def test_a_port_beyond_the_last_says_so_and_trains_on(launched: pytest.MonkeyPatch):
    launched.setenv("LOCAL_RANK", "7")
    exporter = redline.PrometheusExporter(65530, all_ranks=True)
    with pytest.warns(redline.RedlineWarning, match="got port 65530 and local rank 7; expected at most 65535"):
        loop = Loop(exporter, monitors=[])
    loop.step()
    assert exporter.url is None
    loop.session.close()
