"""Redline: the rev counter and rev limiter of neural-network training.

``redline.attach(model, optimizer)`` measures each optimizer step against the limits that theory sets for it.
"""

from importlib.metadata import version as _version

from redline import numerics, scaling
from redline.controller import (
    Controller,
    Decay,
    Keep,
    Reject,
    RollBack,
    RunOutline,
    Scale,
    ScaleMatrices,
    Stop,
    Withhold,
)
from redline.controllers import NonFiniteGuard, RadiusLR, SpikeGuard, StepClamp, UpdateClamp, WeightDecayControl
from redline.errors import ConfigurationError, ControllerError, RedlineWarning, RunStoppedError
from redline.integrations.attach import attach
from redline.integrations.console import ConsoleReport
from redline.integrations.prometheus import PrometheusExporter
from redline.integrations.record import JsonlRecorder
from redline.integrations.textfile import TextfileSink
from redline.interventions import Intervention
from redline.metrics import METRICS, Metric
from redline.monitor import Monitor, Need
from redline.monitors import GhostRadius, LayerRadii, StepHealth, UpdateSpectrum, WeightSpectrum, default_monitors
from redline.readings import Readings, RunInfo, Series, Snapshot
from redline.report import StabilityReport
from redline.session import Session
from redline.sink import Sink
from redline.step import Step, StepStart

__version__ = _version("redline")

__all__ = [
    "METRICS",
    "ConfigurationError",
    "ConsoleReport",
    "Controller",
    "ControllerError",
    "Decay",
    "GhostRadius",
    "Intervention",
    "JsonlRecorder",
    "Keep",
    "LayerRadii",
    "Metric",
    "Monitor",
    "Need",
    "NonFiniteGuard",
    "PrometheusExporter",
    "RadiusLR",
    "Readings",
    "RedlineWarning",
    "Reject",
    "RollBack",
    "RunInfo",
    "RunOutline",
    "RunStoppedError",
    "Scale",
    "ScaleMatrices",
    "Series",
    "Session",
    "Sink",
    "Snapshot",
    "SpikeGuard",
    "StabilityReport",
    "Step",
    "StepClamp",
    "StepHealth",
    "StepStart",
    "Stop",
    "TextfileSink",
    "UpdateClamp",
    "UpdateSpectrum",
    "WeightDecayControl",
    "WeightSpectrum",
    "Withhold",
    "attach",
    "default_monitors",
    "numerics",
    "scaling",
]
