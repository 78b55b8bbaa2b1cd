"""On a CUDA device: nothing is changed, nothing is waited for, and the figures are those of the CPU."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from sinks import Keep
from torch import Tensor, nn

import redline
from redline.integrations.demo.models import ByteLM
from redline.numerics import exact_ghost_radius, least_ghost_radius, top_singular_values

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none here"),
]


def batches(steps: int, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(256, (48, 33), generator=generator).to(device) for _ in range(steps)]


def train(model: nn.Module, data: list[Tensor], optimizer: torch.optim.Optimizer) -> None:
    for tokens in data:
        F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def language_model(device: str = "cuda", dropout: float = 0.1) -> nn.Module:
    torch.manual_seed(0)
    return ByteLM(width=96, layers=2, context=32, dropout=dropout).to(device)


@pytest.mark.parametrize("fused", [False, True])
def test_observation_changes_nothing(fused):
    def run(observed: bool) -> tuple[dict[str, Tensor], Tensor]:
        model = language_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
        monitors = [redline.WeightSpectrum(5), redline.UpdateSpectrum(5), redline.GhostRadius(2), redline.StepHealth()]
        monitors.append(redline.LayerRadii(2))
        session = redline.attach(model, optimizer, monitors=monitors) if observed else None
        train(model, batches(50, "cuda"), optimizer)
        if session is not None:
            session.close()
            assert session.latest.value("redline_normalized_step_size") > 0
        return dict(model.state_dict()), torch.cuda.get_rng_state()

    (plain, plain_random), (watched, watched_random) = run(False), run(True)
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    assert torch.equal(plain_random, watched_random)


def test_monitors_do_not_wait_for_the_device():
    model = language_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    monitors = [redline.WeightSpectrum(1), redline.UpdateSpectrum(1), redline.GhostRadius(1), redline.StepHealth()]
    monitors.append(redline.LayerRadii(1))
    with redline.attach(model, optimizer, monitors=monitors) as session:
        data = batches(6, "cuda")
        train(model, data[:2], optimizer)  # the first tangent is checked once, which waits
        torch.cuda.set_sync_debug_mode("error")
        try:
            train(model, data[2:], optimizer)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert session.latest.value("redline_measurements_total", monitor="GhostRadius") == 6
        assert session.notes == ()


@pytest.mark.parametrize("controllers", [lambda: [], lambda: [redline.UpdateClamp(1e-4)]], ids=["watched", "held"])
def test_snapshots_come_without_a_wait_and_are_those_of_a_run_that_waits(controllers, monkeypatch):
    def run(waits: bool) -> tuple[list[redline.Snapshot], list[redline.Intervention]]:
        model = language_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        monitors = [redline.WeightSpectrum(5), redline.UpdateSpectrum(5), redline.GhostRadius(2), redline.StepHealth()]
        sink = Keep(5)
        data = batches(24, "cuda")
        with redline.attach(
            model, optimizer, monitors=monitors, controllers=controllers(), sinks=[sink], run="run"
        ) as session:
            train(model, data[:2], optimizer)  # the first tangent is checked once, which waits
            torch.cuda.synchronize()
            with monkeypatch.context() as patch:
                if not waits:
                    torch.cuda.set_sync_debug_mode("error")
                    patch.setattr(torch.cuda.Event, "synchronize", lambda event: pytest.fail("it was waited for"))
                try:
                    for tokens in data[2:]:
                        train(model, [tokens], optimizer)
                        if waits:
                            _ = session.latest
                        else:
                            while not torch.cuda.current_stream().query():
                                pass  # no copy is overtaken by the next, which would have to wait for it
                finally:
                    torch.cuda.set_sync_debug_mode("default")
        return sink.snapshots, list(session.interventions)

    (late, did_late), (waited, did) = run(waits=False), run(waits=True)
    timed = {"redline_last_step_timestamp_seconds", "redline_overhead_ratio", "redline_monitoring_ratio"}
    assert [snapshot.step for snapshot in late] == [snapshot.step for snapshot in waited] == [0, 5, 10, 15, 20]
    for one, other in zip(late, waited, strict=True):
        values = [{s: v for s, v in each.values.items() if s.metric not in timed} for each in (one, other)]
        assert values[0] == values[1]
        assert one.measured_at == other.measured_at
    assert did_late == did
    assert bool(did) is bool(controllers())


def test_time_on_the_device_is_counted_by_whose_it_is():
    class Sleeping(redline.Monitor):
        def measure(self, step, readings):
            torch.cuda._sleep(50_000_000)  # some tens of milliseconds, none of them the host's

    model = language_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with redline.attach(model, optimizer, monitors=[Sleeping(1)]) as session:
        train(model, batches(12, "cuda"), optimizer)
        torch.cuda.synchronize()
        _, observing, controlling = session._time.totals()
    assert observing > 12 * 0.005
    assert controlling == 0


def test_an_overhead_budget_puts_measurements_off_and_changes_nothing():
    def run(budget: float | None) -> tuple[dict[str, Tensor], float]:
        model = language_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        monitors = [redline.GhostRadius(1, max_samples=None), redline.WeightSpectrum(1)]
        with redline.attach(model, optimizer, monitors=monitors, overhead_budget=budget) as session:
            for tokens in batches(60, "cuda"):
                train(model, [tokens], optimizer)
                torch.cuda.synchronize()  # what a step took is known by the next
        return dict(model.state_dict()), session.latest.value("redline_put_off_total", monitor="GhostRadius")

    (free, never), (held, often) = run(None), run(0.02)
    assert (never, often > 30) == (0, True)
    assert all(torch.equal(free[name], held[name]) for name in free)


def test_spectra_agree_with_a_full_svd():
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(shape, generator=generator) for shape in [(768, 3072), (512, 512), (300, 40), (100, 1)]]
    state = None
    for _ in range(3):
        estimate = top_singular_values([matrix.cuda() for matrix in matrices], state)
        state = estimate.state
    expected = torch.stack([torch.linalg.matrix_norm(matrix.double(), 2) for matrix in matrices])
    assert (estimate.sigma.cpu().double() / expected - 1).abs().max() < 1e-4


def test_r_agrees_with_the_cpu():
    there = language_model(dropout=0.0)
    here = copy.deepcopy(there).cpu()
    sizes = []
    for model, device in ((there, "cuda"), (here, "cpu")):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with redline.attach(model, optimizer, monitors=[redline.GhostRadius(1)]) as session:
            train(model, batches(1, device), optimizer)
        sizes.append(session.latest.value("redline_normalized_step_size"))
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-3)


@pytest.mark.parametrize("classes", [2, 10, 1_000, 8_192])
def test_exact_radii_agree_with_the_cpu(classes):
    generator = torch.Generator().manual_seed(0)
    z, a = (torch.randn(64, classes, generator=generator) for _ in range(2))
    assert torch.allclose(exact_ghost_radius(z.cuda(), a.cuda()).cpu(), exact_ghost_radius(z, a), rtol=1e-5)
    on_device, on_host = least_ghost_radius(z.cuda(), a.cuda()), least_ghost_radius(z, a)
    assert float(on_device.upper) == pytest.approx(float(on_host.upper), rel=1e-5)


@pytest.mark.parametrize("radius", ["bound", "exact"])
def test_clamp_on_the_device_commits_what_it_commits_on_the_host(radius):
    there = language_model(dropout=0.0)
    here = copy.deepcopy(there).cpu()
    ends = []
    for model, device in ((there, "cuda"), (here, "cpu")):
        optimizer = torch.optim.SGD(model.parameters(), lr=30.0)
        with redline.attach(model, optimizer, monitors=[], controllers=[redline.StepClamp(radius=radius)]) as session:
            train(model, batches(1, device), optimizer)
        (held,) = session.interventions
        ends.append((held.saw["r"], torch.cat([p.detach().flatten().cpu() for p in model.parameters()])))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-3)
    torch.testing.assert_close(ends[0][1], ends[1][1], rtol=1e-3, atol=1e-4)


def test_single_matrices_are_held_on_the_device_as_on_the_host():
    there = language_model(dropout=0.0)
    here = copy.deepcopy(there).cpu()
    ends = []
    for model, device in ((there, "cuda"), (here, "cpu")):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1, eps=1e-3)
        target = {"blocks.0.up.weight": 1.0}
        controllers = [redline.UpdateClamp(2.0, "fan"), redline.WeightDecayControl(target, every=2, horizon=2)]
        with redline.attach(model, optimizer, monitors=[], controllers=controllers) as session:
            train(model, batches(5, device), optimizer)
        read = [session.latest.layers(f"redline_weight_{name}") for name in ("spectral_ceiling", "decay_in_force")]
        ends.append((read, torch.cat([p.detach().flatten().cpu() for p in model.parameters()])))
        assert {one.action for one in session.interventions} == {"scale", "decay"}
    for on_device, on_host in zip(ends[0][0], ends[1][0], strict=True):
        assert on_device == pytest.approx(on_host, rel=1e-2)
    torch.testing.assert_close(ends[0][1], ends[1][1], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("controllers", "waits"),
    [
        (lambda: [redline.StepClamp()], 1),
        (lambda: [redline.StepClamp(stale_after=1)], 0),
        (lambda: [redline.RadiusLR()], 0),
        (lambda: [redline.UpdateClamp()], 0),
        (lambda: [redline.UpdateClamp(2.0, "fan"), redline.WeightDecayControl(every=1)], 0),
        (lambda: [redline.NonFiniteGuard(), redline.SpikeGuard()], 1),
    ],
)
def test_a_controller_waits_at_most_once_a_step(controllers, waits):
    model = language_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with redline.attach(model, optimizer, monitors=[], controllers=controllers()) as session:
        for step, tokens in enumerate(batches(8, "cuda")):
            loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            session.observe(loss=loss)
            loss.backward()
            with warnings.catch_warnings(record=True) as waited:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    optimizer.step()
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            if step > 1:  # the first tangent is checked once, which waits
                assert sum("synchronizing" in str(one.message) for one in waited) <= waits
            optimizer.zero_grad()


@pytest.mark.parametrize("memory", ["device", "host"])
def test_roll_back_on_the_device(memory):
    model = language_model(dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    guard = redline.SpikeGuard(patience=0, every=100, memory=memory)
    at_start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with redline.attach(model, optimizer, monitors=[], controllers=[guard]) as session:
        for step, tokens in enumerate(batches(4, "cuda")):
            loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            session.observe(loss=loss * float("nan") if step == 3 else loss)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert [one.action for one in session.interventions] == ["rollback"]
    assert all(torch.equal(tensor, at_start[name]) for name, tensor in model.state_dict().items())
    assert not optimizer.state
