"""Of how many of a batch's samples r is taken."""

from __future__ import annotations

import math
from collections import deque

import pytest
import torch
from ghost_radius_runs import BATCH, CLASSES, SAMPLES, R, cnn, images, mlp, spreads, vectors, watched_step
from torch import nn

import redline
from redline import ConfigurationError, GhostRadius


class Counting(nn.Module):
    """Remembers how many samples each call without gradients was given: the replays."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.seen = inner, deque()  # no list: what a replay adds to one is taken out again

    def forward(self, x):
        if not torch.is_grad_enabled():
            self.seen.append(len(x))
        return self.inner(x)


class TestSamples:
    @pytest.mark.parametrize("max_samples", [1, 5, 16, 63])
    def test_as_many_are_used_as_are_said(self, max_samples):
        model = Counting(mlp())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        with redline.attach(model, optimizer, monitors=[GhostRadius(every=1, max_samples=max_samples)]) as session:
            x = vectors(64)
            before, update = watched_step(session, model, optimizer, x)
            latest = session.latest
        every = spreads(before.inner, x, {n.removeprefix("inner."): p for n, p in update.items()}) / math.pi
        assert set(model.seen) == {max_samples}
        assert (latest.value(SAMPLES), latest.value(BATCH)) == (max_samples, 64)
        assert latest.value(R) <= float(every.max()) * (1 + 1e-5)
        assert float((every / latest.value(R) - 1).abs().min()) < 1e-4  # it is that of one of the samples
        rank = int((every > latest.value(R) * (1 + 1e-4)).sum())
        assert rank <= 64 - max_samples

    def test_more_of_them_never_give_less(self):
        readings = []
        for max_samples in (1, 2, 4, 8, 16, 32, None):
            torch.manual_seed(0)
            model = mlp()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
            with redline.attach(model, optimizer, monitors=[GhostRadius(every=1, max_samples=max_samples)]) as session:
                watched_step(session, model, optimizer, vectors(32))
                readings.append(session.latest.value(R))
        assert readings[-2] == readings[-1]
        assert max(readings) == readings[-1]

    @pytest.mark.parametrize("max_samples", [None, 12, 40])
    def test_the_whole_batch_is_used_where_it_is_no_larger(self, max_samples):
        model = Counting(mlp())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        with redline.attach(model, optimizer, monitors=[GhostRadius(every=1, max_samples=max_samples)]) as session:
            watched_step(session, model, optimizer, vectors(12))
            assert set(model.seen) == {12}
            assert session.latest.value(SAMPLES) == 12

    def test_batch_norm_in_train_mode_takes_the_whole_batch(self):
        model = Counting(cnn())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        with redline.attach(model, optimizer, monitors=[GhostRadius(every=1, max_samples=4)]) as session:
            x = images()
            before, update = watched_step(session, model, optimizer, x)
            expected = spreads(before.inner, x, {n.removeprefix("inner."): p for n, p in update.items()})
            assert set(model.seen) == {12}
            assert session.latest.value(SAMPLES) == 12
            assert session.latest.value(R) == pytest.approx(float(expected.max()) / math.pi, rel=1e-4)

    def test_batch_norm_that_is_frozen_does_not(self):
        model = cnn().train()
        for module in model:
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        with redline.attach(model, optimizer, monitors=[GhostRadius(every=1, max_samples=4)]) as session:
            watched_step(session, model, optimizer, images())
            assert session.latest.value(SAMPLES) == 4

    def test_batch_norm_without_running_statistics_uses_the_batch_in_any_mode(self):
        model = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16, track_running_stats=False), nn.Linear(16, CLASSES))
        model[1].eval()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        with redline.attach(model, optimizer, monitors=[GhostRadius(every=1, max_samples=4)]) as session:
            x = vectors(32)
            before, update = watched_step(session, model, optimizer, x)
            expected = float(spreads(before, x, update).max()) / math.pi
            assert session.latest.value(R) == pytest.approx(expected, rel=1e-4)

    def test_another_batch_dimension(self):
        class TimeFirst(nn.Module):
            def __init__(self):
                super().__init__()
                self.cells, self.head = nn.LSTM(12, 10), nn.Linear(10, CLASSES)
                self.seen = deque()

            def forward(self, x):
                self.seen.append(tuple(x.shape[:2]))
                return self.head(self.cells(x)[0][-1])

        model = TimeFirst()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        monitors = [GhostRadius(every=1, max_samples=3)]
        with redline.attach(model, optimizer, monitors=monitors, batch_dim=1) as session:
            watched_step(session, model, optimizer, torch.randn(5, 9, 12))
            assert set(list(model.seen)[1:]) == {(5, 3)}
            assert (session.latest.value(SAMPLES), session.latest.value(BATCH)) == (3, 9)

    @pytest.mark.parametrize("max_samples", [0, -1])
    def test_less_than_one_is_refused(self, max_samples):
        with pytest.raises(ConfigurationError, match=rf"got max_samples={max_samples}; expected at least 1, or None"):
            GhostRadius(max_samples=max_samples)
