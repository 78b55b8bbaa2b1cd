"""LightningCLI builds the callback, and all that goes into it, from YAML."""

from __future__ import annotations

import inspect
import re
import sys
import traceback
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import redline
from redline.integrations.lightning import RedlineCallback
from redline.schedules import Every

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def no_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """LightningCLI warns where it is given arguments and finds those of the tests besides."""
    monkeypatch.setattr(sys, "argv", sys.argv[:1])


PLACES = {redline.Monitor: "monitors", redline.Controller: "controllers", redline.Sink: "sinks"}
PLUGINS = [
    kind
    for kind in (getattr(redline, name) for name in redline.__all__)
    if isinstance(kind, type) and issubclass(kind, tuple(PLACES)) and kind not in PLACES
]


class Small(pl.LightningModule):
    """Two layers and their data."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.randn(48, 6), torch.randint(3, (48,))), batch_size=8)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def whole_output(output: Any) -> Any:
    """Where the logits are, in words that YAML can name."""
    return output


def settings(folder: Path, **callback: Any) -> dict[str, Any]:
    return {
        "seed_everything": 0,
        "trainer": {
            "max_epochs": 1,
            "accelerator": "cpu",
            "default_root_dir": str(folder),
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [{"class_path": "redline.integrations.lightning.RedlineCallback", "init_args": callback}],
        },
    }


def command_line(path: Path, configuration: dict[str, Any], command: str | None = None) -> LightningCLI:
    path.write_text(yaml.safe_dump(configuration))
    arguments = [*([command] if command else []), f"--config={path}"]
    return LightningCLI(Small, args=arguments, run=command is not None)


def callback_of(cli: LightningCLI) -> RedlineCallback:
    (callback,) = (one for one in cli.trainer.callbacks if isinstance(one, RedlineCallback))
    return callback


def plugins_of(callback: RedlineCallback) -> dict[str, list[Any]]:
    given = callback._arguments
    return {"monitors": given["monitors"], "controllers": given["controllers"], "sinks": callback._sinks}


@pytest.mark.parametrize("kind", PLUGINS)
@pytest.mark.parametrize("arguments", ["none", "all, by name"])
def test_every_monitor_controller_and_sink_can_be_built(kind: type, arguments: str, tmp_path: Path):
    place = next(place for base, place in PLACES.items() if issubclass(kind, base))
    entry: dict[str, Any] = {"class_path": f"redline.{kind.__name__}"}
    if arguments == "all, by name":
        defaults = {name: parameter.default for name, parameter in inspect.signature(kind).parameters.items()}
        entry["init_args"] = {
            name: list(default) if isinstance(default, tuple) else default for name, default in defaults.items()
        }
    cli = command_line(tmp_path / "run.yaml", settings(tmp_path, **{place: [entry]}))
    (built,) = plugins_of(callback_of(cli))[place]
    assert type(built) is kind
    public = [{k: v for k, v in vars(one).items() if not k.startswith("_")} for one in (built, kind())]
    assert public[0] == public[1]


def test_a_whole_tree_of_objects_with_arguments(tmp_path: Path):
    reference = {"net.0.weight": 1.5, "net.2.weight": 2}
    cli = command_line(
        tmp_path / "run.yaml",
        settings(
            tmp_path,
            run="nested",
            module="net",
            batch_dim=0,
            overhead_budget=0.02,
            logits=f"{__name__}.whole_output",
            monitors=[
                {"class_path": "redline.GhostRadius", "init_args": {"every": 3, "max_samples": None, "exact": True}},
                {
                    "class_path": "redline.WeightSpectrum",
                    "init_args": {"every": {"class_path": "redline.schedules.Every", "init_args": {"n": 7}}},
                },
            ],
            controllers=[
                {"class_path": "redline.StepClamp", "init_args": {"max_r": 0.5, "stale_after": 1, "reduction": 0.9}},
                {"class_path": "redline.WeightDecayControl", "init_args": {"target": reference, "bounds": [0.0, 1]}},
                {"class_path": "redline.RadiusLR", "init_args": {"max_growth": None}},
            ],
            sinks=[
                {"class_path": "redline.TextfileSink", "init_args": {"path": str(tmp_path / "run.prom"), "every": 5}},
                {"class_path": "redline.PrometheusExporter", "init_args": {"port": 0, "max_series": 300}},
            ],
        ),
    )
    assert callback_of(cli)._arguments["logits"] is whole_output
    built = plugins_of(callback_of(cli))
    radius, spectrum = built["monitors"]
    assert (radius.max_samples, [step for step in range(7) if radius.due(step)]) == (None, [0, 3, 6])
    assert spectrum.due == Every(7)
    clamp, decay, rate = built["controllers"]
    assert (clamp.max_r, clamp.radius, clamp.stale_after) == (0.5, "bound", 1)
    assert (dict(decay.target), decay.bounds) == (reference, (0.0, 1.0))
    assert rate.max_growth is None
    textfile, exporter = built["sinks"]
    assert textfile.path == tmp_path / "run.prom"
    assert exporter.max_series == 300


def test_a_fit_from_yaml_measures_controls_shows_and_runs_again_from_the_settings_it_saved(tmp_path: Path):
    entries = settings(
        tmp_path,
        run="from yaml",
        monitors=[{"class_path": "redline.GhostRadius", "init_args": {"every": 1}}],
        controllers=[{"class_path": "redline.StepClamp", "init_args": {"max_r": 1e-3, "stale_after": 1}}],
        sinks=[{"class_path": "redline.PrometheusExporter", "init_args": {"port": 0}}],
    )
    seen = []
    for path in (tmp_path / "run.yaml", tmp_path / "config.yaml"):
        if not seen:
            path.write_text(yaml.safe_dump(entries))
        saved = tmp_path / f"again-{len(seen)}"
        saved.mkdir()
        cli = LightningCLI(Small, args=["fit", f"--config={path}", f"--trainer.default_root_dir={tmp_path}"],
                           save_config_kwargs={"overwrite": True})  # fmt: skip
        session = callback_of(cli).session
        assert session is not None
        latest = session.latest
        assert latest.run.run == "from yaml"
        assert latest.value("redline_steps_total") == 6
        assert latest.value("redline_committed_step_size") == pytest.approx(1e-3, rel=1e-3)
        seen.append([one.step for one in session.interventions])
    assert seen[0] == seen[1] == list(range(6))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"class_path": "redline.PrometheusExporter", "init_args": {"port": 70000}}, "expected 0 .* to 65535"),
        ({"class_path": "redline.TextfileSink", "init_args": {"path": "run.txt"}}, "ends in .prom"),
        ({"class_path": "redline.ConsoleReport", "init_args": {"evry": 5}}, "evry"),
        ({"class_path": "redline.StepClamp"}, "StepClamp"),
    ],
)
def test_what_cannot_be_built_says_why(
    entry: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings(tmp_path, sinks=[entry])))
    with pytest.raises((SystemExit, ValueError)) as ended:
        LightningCLI(BoringModel, args=[f"--config={path}"], run=False)
    said = capsys.readouterr().err + "".join(traceback.format_exception(ended.value))  # what the user would see
    assert re.search(message, said), said
