"""A mask beside the logits: what does not count is left out of r."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from ghost_radius_runs import LanguageModel, R, loss_of, mlp, sentences, spreads, vectors, watched_step
from torch import nn

import redline
from redline import ConfigurationError, GhostRadius
from redline.step_tangent import StepTangent


class TestMask:
    def test_positions_that_do_not_count_are_left_out(self):
        class Padded(nn.Module):
            """Says by itself which positions are padding, so that a part of the batch can be replayed."""

            def __init__(self):
                super().__init__()
                self.inner = LanguageModel()

            def forward(self, tokens):
                return {"scores": self.inner(tokens), "padding": tokens < 4}

        readings = {
            "all": lambda output: output["scores"],
            "text": lambda output: (output["scores"], ~output["padding"]),
            "padding": lambda output: (output["scores"], output["padding"]),
        }
        model, x, r = Padded(), sentences(), {}
        for count, logits in readings.items():
            twin = copy.deepcopy(model)
            optimizer = torch.optim.SGD(twin.parameters(), lr=0.5)
            with redline.attach(twin, optimizer, monitors=[GhostRadius(every=1)], logits=logits) as session:
                before, update = watched_step(session, twin, optimizer, x, lambda output: loss_of(output["scores"]))
                r[count] = session.latest.value(R)
        every = spreads(before, x, update, lambda output: output["scores"]) / math.pi
        assert r["all"] == pytest.approx(float(every.max()), rel=1e-4)
        assert r["text"] == pytest.approx(float(every[x >= 4].max()), rel=1e-4)
        assert r["padding"] == pytest.approx(float(every[x < 4].max()), rel=1e-4)
        assert min(r.values()) < 0.95 * r["all"]  # the mask matters here

    def test_of_a_step_tangent(self):
        logits, tangent = torch.zeros(3, 2), torch.tensor([[0.0, 1.0], [0.0, 5.0], [0.0, math.nan]])
        mask = torch.tensor([True, False, False])
        masked = StepTangent(logits, tangent, mask, "forward_mode", torch.arange(3), 3, 0)
        assert float(masked.normalized_step_size) == pytest.approx(1 / math.pi)
        two = StepTangent(logits[:2], tangent[:2], None, "forward_mode", torch.arange(2), 2, 0)
        assert float(two.normalized_step_size) == pytest.approx(5 / math.pi)
        every = StepTangent(logits, tangent, None, "forward_mode", torch.arange(3), 3, 0)
        assert math.isnan(every.normalized_step_size)

    def test_where_nothing_counts_no_step_is_too_long(self):
        tangent = StepTangent(
            torch.zeros(2, 2), torch.ones(2, 2), torch.zeros(2, dtype=torch.bool), "forward_mode", torch.arange(2), 2, 0
        )
        assert float(tangent.normalized_step_size) == 0

    def test_one_of_another_shape_ends_the_run_with_what_to_do(self):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        wrong = torch.ones(3, dtype=torch.bool)
        monitors = [GhostRadius(every=1)]
        with redline.attach(model, optimizer, monitors=monitors, logits=lambda z: (z, wrong)) as session:  # noqa: SIM117
            with pytest.raises(
                ConfigurationError, match=r"got a mask of shape \(3,\).*expected a bool tensor of shape \(12,\)"
            ):
                watched_step(session, model, optimizer, vectors())
