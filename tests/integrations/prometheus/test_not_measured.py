"""What was not measured is absent, and what is not finite is served as it is."""

from __future__ import annotations

import math

import pytest
import torch
from exporter_runs import PER_LAYER, every_step
from scraping import Loop, samples, scrape

import redline


def test_what_was_not_measured_is_absent():
    exporter = redline.PrometheusExporter(port=0, every=1)
    loop = Loop(exporter, monitors=[redline.StepHealth()])
    loop.step()
    found = samples(scrape(exporter.url))
    loop.session.close()
    assert "redline_loss" in found
    unmeasured = {*PER_LAYER, "redline_ghost_radius", "redline_normalized_step_size", "redline_committed_step_size"}
    assert unmeasured & set(found) == set()


def test_r_that_can_no_longer_be_measured_disappears():
    exporter = redline.PrometheusExporter(port=0, every=1)
    loop = Loop(exporter, monitors=[redline.GhostRadius(every=1)])
    loop.step()
    before = samples(scrape(exporter.url))
    with pytest.warns(redline.RedlineWarning, match="ghost radius is not measured"):
        loop.optimizer.step()  # without a forward there are no inputs
    after = samples(scrape(exporter.url))
    loop.session.close()
    gone = {"redline_normalized_step_size", "redline_ghost_radius", "redline_committed_step_size"}
    assert gone <= set(before)
    assert gone & set(after) == set()
    assert after["redline_steps_total"][()] == 2


def test_a_layer_of_zeros_has_a_norm_and_no_stable_rank():
    exporter = redline.PrometheusExporter(port=0, every=1)
    loop = Loop(exporter, monitors=every_step())
    with torch.no_grad():
        loop.model[0].weight.zero_()
    loop.model[0].weight.requires_grad_(False)
    loop.step()
    found = samples(scrape(exporter.url))
    loop.session.close()
    zeros = (("layer", "0.weight"),)
    assert found["redline_weight_spectral_norm"][zeros] == 0
    assert zeros not in found["redline_weight_stable_rank"]
    assert zeros not in found.get("redline_update_to_weight_ratio", {})


def test_nan_is_served_as_nan_and_counted():
    exporter = redline.PrometheusExporter(port=0, every=1)
    loop = Loop(exporter, monitors=[redline.StepHealth()])
    loop.step(math.nan)
    text = scrape(exporter.url)
    loop.session.close()
    found = samples(text)
    assert "redline_loss NaN" in text.splitlines()
    assert math.isnan(found["redline_loss"][()])
    assert math.isnan(found["redline_gradient_norm"][()])
    counts = {labels[0][1]: count for labels, count in found["redline_nonfinite_total"].items()}
    assert (counts["loss"], counts["gradient"], counts["weight"]) == (1, 1, 0)


def test_infinity_is_served_as_infinity():
    exporter = redline.PrometheusExporter(port=0, every=1)
    loop = Loop(exporter, monitors=[redline.StepHealth()])
    loop.step(math.inf)
    found = samples(scrape(exporter.url))
    loop.session.close()
    assert found["redline_loss"][()] == math.inf
