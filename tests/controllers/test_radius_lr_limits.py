"""RadiusLR: the limits that go with it, on single matrices and on the growth of the rate."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from radius_lr_runs import COMMITTED, SCALE, Run, bare_sgd, batch, prepared
from step_lengths import CLASSES, FEATURES, plain, reference
from torch import Tensor, nn
from torch.optim import Optimizer
from torch_optimizers import adamw, muon_and_adamw

from redline import RadiusLR


def stack() -> nn.Module:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.Parameter(torch.randn(3, FEATURES, FEATURES))
            self.head = nn.Linear(FEATURES, CLASSES)
            self.zero = nn.Linear(FEATURES, CLASSES, bias=False)
            nn.init.zeros_(self.zero.weight)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(torch.einsum("eij,bj->bi", self.experts, x))
            return self.head(x) + self.zero(x)

    return Stack()


def matrices(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {name: tensor.double() for name, tensor in tensors.items() if tensor.dim() == 2}
    for name, tensor in tensors.items():
        found.update({f"{name}[{e}]": one.double() for e, one in enumerate(tensor)} if tensor.dim() == 3 else {})
    return found


def sigma(tensor: Tensor) -> float:
    return float(torch.linalg.matrix_norm(tensor.double(), 2))


def decaying(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.5)]


@pytest.mark.parametrize("optimizers", [bare_sgd, decaying, muon_and_adamw], ids=lambda make: make.__name__)
@pytest.mark.parametrize("model", [plain, stack], ids=lambda make: make.__name__)
@pytest.mark.parametrize("most", [0.1, 0.3])
def test_no_matrix_is_pushed_harder_than_its_share_of_itself_and_the_rest_keeps_its_length(
    optimizers: Callable[[nn.Module], list[Optimizer]], model: Callable[[], nn.Module], most: float
) -> None:
    """Net of decoupled decay, which stays whole and goes by the rate that results."""
    if optimizers is muon_and_adamw and model is stack:
        pytest.skip("Muon takes matrices only")
    decay = {bare_sgd: 0.0, decaying: 1e-2 * 0.5, muon_and_adamw: 0.02 * 0.1}[optimizers]  # type: ignore[index]
    run, held, free = Run(optimizers, model), 0, 0
    with run.attach(RadiusLR(4.0, max_update_to_weight=most, max_growth=None)) as session:
        for seed in range(4):
            alone, before = run.uncontrolled(), run.parameters
            alone.step(seed)
            run.step(seed)
            proposed, after, scale = alone.parameters, run.parameters, session.latest.value(SCALE)
            told = {one.saw["matrices"]: one for one in session.interventions if "matrices" in one.saw}
            for name in before.keys() - {n.split("[")[0] for n in matrices(before)}:
                wanted = before[name] + scale * (proposed[name] - before[name])
                torch.testing.assert_close(after[name], wanted, rtol=1e-5, atol=1e-6)
            w, p, q = matrices(before), matrices(proposed), matrices(after)
            for name in w:
                net = scale * (p[name] - w[name] + decay * w[name])
                strength = sigma(w[name])
                over = strength > 0 and sigma(net) > most * strength
                factor = min(1.0, most * strength / sigma(net)) if strength > 0 else 1.0
                wanted = w[name] + factor * net - scale * decay * w[name]
                torch.testing.assert_close(q[name], wanted, rtol=0, atol=2e-3 * float((factor * net).abs().max()))
                if over:
                    assert sigma(q[name] - w[name] + scale * decay * w[name]) <= most * strength * (1 + 1e-5)
                held, free = held + over, free + (not over)
            assert told
    assert held > 5
    assert free > 0 or model is plain
    last = [one for one in session.interventions if one.step == 3]
    assert [one.action for one in last] == ["scale", "scale"], "the step, and single matrices"
    assert re.match(r"sigma_1 of the update was over the limit in \d matrices, most in ", last[1].reason)
    assert last[1].saw["limit"] / last[1].saw["sigma"] == pytest.approx(last[1].saw["scale"])
    assert "redline_committed_step_size" not in session.latest, "r of what is left is not known"


def test_matrices_under_the_limit_keep_the_step_that_they_would_have_without_it() -> None:
    runs = []
    for most in (None, 100.0):
        run = Run()
        with run.attach(RadiusLR(0.3, max_update_to_weight=most)) as session:
            run.steps_of(range(4))
        runs.append((run.everything, [one.reason for one in session.interventions]))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("growth", [1.02, 1.5])
def test_the_rate_that_results_grows_by_so_much_from_one_step_to_the_next_and_falls_at_once(growth: float) -> None:
    run, last, slow = prepared(adamw), math.inf, 0
    with run.attach(RadiusLR(0.5, max_update_to_weight=None, max_growth=growth)) as session:
        for seed in range(3, 23):
            if seed == 12:
                run.times_rate(100)
            if seed == 14:
                run.times_rate(1 / 100)
            alone, before = run.uncontrolled(), run.parameters
            alone.step(seed)
            run.step(seed)
            wanted = 0.5 / reference(alone.model, before, alone.parameters, batch(seed)[0])
            lr = run.optimizers[0].param_groups[0]["lr"]
            scale = min(wanted, growth * last / lr)
            assert session.latest.value(SCALE) == pytest.approx(scale, rel=1e-4)
            one = session.interventions[-1]
            assert one.saw["brought"] == pytest.approx(one.saw["r"] * scale, rel=1e-4)
            assert session.latest.value(COMMITTED) == pytest.approx(one.saw["brought"], rel=1e-5)
            assert f"was brought to {one.saw['brought']:.3g}: the step was scaled by {scale:.3g}." in one.reason
            slow += scale < wanted
            last = scale * lr
    assert 1 < slow < 18


def test_steps_that_were_not_measured_do_not_count_as_a_scale() -> None:
    run = Run()
    with run.attach(RadiusLR(0.5, max_growth=1.1)) as session:
        run.step(1)
        scale = session.latest.value(SCALE)
        rate = run.optimizers[0].param_groups[0]["lr"]
        run.optimizers[0].param_groups[0]["lr"] = 0.0
        run.step(2)
        assert session.latest.value(SCALE) == 1
        run.optimizers[0].param_groups[0]["lr"] = rate / 1000
        run.step(3)
        assert scale < session.latest.value(SCALE) <= 1.1 * 1000 * scale * (1 + 1e-5)


def test_one_step_far_too_long_does_not_stop_the_run_for_good() -> None:
    """The scale may fall at once; a fall by 1000 is made up for in ``log(1000) / log(1.02) = 349`` steps."""
    run, lengths = prepared(), []
    with run.attach(RadiusLR(0.5, max_update_to_weight=None)) as session:
        for seed in range(400):
            x, y = batch(seed)
            run.optimizers[0].zero_grad()
            (F.cross_entropy(run.model(x), y) * (1000 if seed == 20 else 1)).backward()
            run.update()
            lengths.append(session.latest.value(COMMITTED))
    assert np.median(lengths[10:20]) > 0.05
    assert np.median(lengths[50:60]) < 0.5 * np.median(lengths[10:20])
    assert np.median(lengths[-20:]) > 0.05
