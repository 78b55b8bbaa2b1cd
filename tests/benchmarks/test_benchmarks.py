"""Every benchmark runs, in a tiny form, and gives tables whose rows have as many cells as their heads."""

import copy
import importlib
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
TINY = {
    "spectra": {"repeats": 1, "apart": 1, "layers": 1, "width": 192},
    "overhead": {"pairs": 2, "large": 1, "width": 64, "layers": 1, "batch": 4},
    "growth": {"widths": [32, 64], "layers": [1, 2], "width": 32, "pairs": 1, "repeats": 1, "batch": 2},
    "controllers": {"repeats": 1, "steps": 1, "batch": 4, "warmup": 3},
    "exact_radius": {"repeats": 1, "moments": [0]},
    "exporter": {"series": [100], "pairs": 2, "seldom": 1, "scrapes": 1, "batch": 2},
    "peers": {"repeats": 1, "batch": 2, "warmup": 1, "iterations": 3, "only": "top_singular_values"},
}


@pytest.fixture(autouse=True)
def _their_folder(monkeypatch):
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER)):
            del sys.modules[name]


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("name", TINY)
def test_gives_well_formed_tables(name, monkeypatch, tmp_path):
    frame = importlib.import_module("frame")
    monkeypatch.setattr(frame, "RESULTS", tmp_path)
    page = importlib.import_module(name).benchmark.run("cpu", quick=True, write=True, **TINY[name])
    assert (tmp_path / f"{name}_cpu.md").read_text().splitlines() == "\n".join(page.lines).splitlines()
    assert "redline" in page.lines[2]
    assert page.lines[4].startswith(f"Command: `python benchmarks/{name}.py --device cpu --quick")
    heads = [index for index, line in enumerate(page.lines) if set(line) == {"|", "-"}]
    assert heads
    for head in heads:
        rows = [cells(line) for line in page.lines[head + 1 :]]
        rows = rows[: next((index for index, row in enumerate(rows) if len(row) == 1), len(rows))]
        assert rows
        assert {len(row) for row in rows} == {len(cells(page.lines[head - 1]))}
    assert not [line for line in page.lines if "skipped: " in line]


def test_the_suite_has_every_benchmark():
    listed = importlib.import_module("run").BENCHMARKS
    assert set(listed) == set(TINY) == {path.stem for path in FOLDER.glob("*.py") if "Benchmark(\n" in path.read_text()}


def test_the_interval_holds_the_ratio_and_is_a_point_where_all_pairs_are_alike():
    overhead = importlib.import_module("overhead")
    noise = torch.rand(2, 100, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    low, high = overhead.interval(1 + noise, draws=200)
    sums = (1 + noise).sum((0, 1))
    assert low < sums[1] / sums[0] < high
    alike = torch.tensor([1.0, 1.25], dtype=torch.float64).expand(1, 100, 2)
    assert overhead.interval(alike, draws=20) == pytest.approx((1.25, 1.25))


def test_what_a_session_keeps_is_counted_and_what_the_model_holds_is_not():
    overhead, pairs = importlib.import_module("overhead"), importlib.import_module("pairs")
    workload = pairs.byte_level(2)
    trainer = pairs.Trainer(workload.model, "cpu")
    trainer.session = overhead.monitors()(trainer)
    trainer.step(*workload.batches(torch.Generator().manual_seed(0)))
    before = overhead.kept_bytes(trainer)
    trainer.session.kept_for_the_test = {"here": [torch.zeros(1000), *trainer.model.parameters()]}
    assert overhead.kept_bytes(trainer) - before == 4000
    assert before < 1e5
    trainer.session.close()


def test_a_peer_that_is_not_there_has_a_row_that_says_how_to_install_it(monkeypatch):
    peers = importlib.import_module("peers")
    monkeypatch.setitem(sys.modules, "weightwatcher", None)
    page = peers.benchmark.run("cpu", quick=True, repeats=1, batch=2, warmup=1, only="weightwatcher")
    assert "not installed" in page.lines[-1]
    assert "pip install weightwatcher==" in page.lines[-1]


def test_the_eigenvalue_that_peers_are_compared_with_is_the_hessians():
    """Of a net so small that its Hessian can be written down."""
    peers, pairs = importlib.import_module("peers"), importlib.import_module("pairs")
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3))
    workload = pairs.Workload(lambda: copy.deepcopy(model), lambda generator: None)
    trainer = pairs.Trainer(workload.model, "cpu")
    bench = peers.Bench(workload, trainer, torch.randn(8, 3), torch.randint(3, (8,)))
    names, shapes = zip(*((name, one.shape) for name, one in model.named_parameters()), strict=True)

    def loss(flat):
        parts = flat.split([shape.numel() for shape in shapes])
        parts = {name: part.view(shape) for name, shape, part in zip(names, shapes, parts, strict=True)}
        return peers.loss_of(torch.func.functional_call(model, parts, (bench.inputs.double(),)), bench.targets)

    flat = torch.cat([one.detach().double().flatten() for one in model.parameters()])
    exact = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat))[-1].item()
    assert peers.exact_curvature(bench, 20) == pytest.approx(exact, rel=1e-6)
