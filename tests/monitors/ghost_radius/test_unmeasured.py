"""Where r cannot be measured, it is absent, or the run ends with what to do."""

from __future__ import annotations

import math

import pytest
import torch
from ghost_radius_runs import CLASSES, FALLBACKS, RHO, TAU, R, loss_of, mlp, spreads, vectors, watched_step
from torch import nn

import redline
from redline import ConfigurationError, GhostRadius, RedlineWarning


class TestWhatCannotBeMeasured:
    def test_without_a_forward_in_training_mode_r_is_absent_and_tau_is_there(self):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        with redline.attach(model, optimizer, monitors=[GhostRadius(every=1)]) as session:
            watched_step(session, model, optimizer, vectors())
            assert R in session.latest
            model.eval()
            with pytest.warns(RedlineWarning, match="not called in training mode with gradients enabled"):  # noqa: PT031
                for _ in range(2):  # said by the second at the latest
                    _, update = watched_step(session, model, optimizer, vectors())
                    for metric in (R, RHO):
                        assert metric not in session.latest  # the last one's would mislead
                    tau = math.sqrt(sum(float(p.square().sum()) for p in update.values()))
                    assert session.latest.value(TAU) == pytest.approx(tau, rel=1e-5)
            model.train()
            watched_step(session, model, optimizer, vectors())
            assert R in session.latest

    def test_a_model_that_cannot_be_called_again(self):
        class Once(nn.Module):
            def __init__(self):
                super().__init__()
                self.head = nn.Linear(12, CLASSES)

            def forward(self, x):
                if not torch.is_grad_enabled():
                    raise KeyError("only once")
                return self.head(x)

        model = Once()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        with redline.attach(model, optimizer, monitors=[GhostRadius(every=1)]) as session:
            with pytest.warns(RedlineWarning, match="calling Once again on its own inputs failed with KeyError"):
                watched_step(session, model, optimizer, vectors())
            assert R not in session.latest

    def test_logits_that_are_none_end_the_run_with_what_to_do(self):
        class Pair(nn.Module):
            def __init__(self):
                super().__init__()
                self.head = nn.Linear(12, CLASSES)

            def forward(self, x):
                return [self.head(x)]

        model = Pair()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        with redline.attach(model, optimizer, monitors=[GhostRadius(every=1)]) as session:  # noqa: SIM117
            with pytest.raises(ConfigurationError, match="got a list as logits; expected a floating tensor"):
                watched_step(session, model, optimizer, vectors(), lambda output: loss_of(output[0]))

    def test_a_kernel_that_drops_tangents_is_found_out(self):
        class Dropping(nn.Module):
            """Half of its derivative is lost in forward mode, as under a faulty compiled kernel."""

            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(12, CLASSES), nn.Linear(12, CLASSES)

            def forward(self, x):
                lost = self.b(x)
                if torch.autograd.forward_ad._current_level >= 0:
                    lost = torch.autograd.forward_ad.unpack_dual(lost).primal
                return self.a(x) + lost

        model = Dropping()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        with redline.attach(model, optimizer, monitors=[GhostRadius(every=1)]) as session:
            for step in range(2):
                x = vectors()
                if step == 0:
                    with pytest.warns(RedlineWarning, match="forward_mode are off by .* from a finite difference"):
                        before, update = watched_step(session, model, optimizer, x)
                else:
                    before, update = watched_step(session, model, optimizer, x)
                expected = float(spreads(before, x, update).max()) / math.pi
                assert session.latest.value(R) == pytest.approx(expected, rel=2e-2)
            assert session.latest.value(FALLBACKS, method="finite_difference") == 2
