"""Readings in the trainer's own loggers."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger
from lightning_runs import QUIET, CallsItself, R, data, trainer

import redline
from redline.integrations.lightning import RedlineCallback

pytestmark = QUIET


def test_readings_reach_the_trainers_loggers(tmp_path: Path):
    module = CallsItself()
    callback = RedlineCallback()
    trainer(callback, max_epochs=1, logger=CSVLogger(tmp_path), log_every_n_steps=4).fit(module, data(10))
    (file,) = tmp_path.rglob("metrics.csv")
    with file.open() as lines:
        rows = [row for row in csv.DictReader(lines) if row.get("redline_loss")]
    assert [int(row["step"]) for row in rows] == [0, 4, 8]
    assert [float(row["redline_loss"]) for row in rows] == pytest.approx([module.losses[step] for step in (0, 4, 8)])
    first = rows[0]
    for metric in ("redline_weight_spectral_norm", "redline_update_spectral_norm", "redline_update_to_weight_ratio"):
        assert float(first[f"{metric}/net.0.weight"]) > 0
        assert float(first[f"{metric}/net.2.weight"]) > 0
    for name in (R, "redline_ghost_radius", "redline_gradient_norm", "redline_update_norm"):
        assert float(first[name]) > 0
    assert float(first["redline_learning_rate/SGD/0"]) == pytest.approx(0.1)
    assert [float(row["redline_steps_total"]) for row in rows] == [1, 5, 9]
    assert float(rows[-1]["redline_nonfinite_total/loss"]) == 0


def test_what_was_not_measured_is_not_logged(tmp_path: Path):
    callback = RedlineCallback(monitors=[redline.StepHealth()])
    trainer(callback, max_epochs=1, logger=CSVLogger(tmp_path), log_every_n_steps=1).fit(CallsItself(), data(2))
    (file,) = tmp_path.rglob("metrics.csv")
    header = file.read_text().splitlines()[0].split(",")
    assert "redline_loss" in header
    assert not [name for name in header if name.startswith((R, "redline_weight_spectral", "redline_ghost"))]
