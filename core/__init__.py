"""Redline: the rev counter and rev limiter of neural-network training.

``redline.attach(model, optimizer)`` measures each optimizer step against the limits that theory sets for it.
"""

from importlib.metadata import version as _version

from redline import numerics
from redline.controller import Controller, Intervention, Reject, Scale, Withhold
from redline.errors import ConfigurationError, ControllerError, RedlineWarning, StepRejectedError
from redline.integrations.attach import attach
from redline.integrations.console import ConsoleReport
from redline.integrations.prometheus import PrometheusExporter
from redline.metrics import METRICS, Metric
from redline.monitor import Monitor, Need
from redline.monitors import GhostRadius, StepHealth, UpdateSpectrum, WeightSpectrum, default_monitors
from redline.readings import Readings, RunInfo, Series, Snapshot
from redline.report import StabilityReport
from redline.session import Session
from redline.sink import Sink
from redline.step import Step

__version__ = _version("redline")

__all__ = [
    "METRICS",
    "ConfigurationError",
    "ConsoleReport",
    "Controller",
    "ControllerError",
    "GhostRadius",
    "Intervention",
    "Metric",
    "Monitor",
    "Need",
    "PrometheusExporter",
    "Readings",
    "RedlineWarning",
    "Reject",
    "RunInfo",
    "Scale",
    "Series",
    "Session",
    "Sink",
    "Snapshot",
    "StabilityReport",
    "Step",
    "StepHealth",
    "StepRejectedError",
    "UpdateSpectrum",
    "WeightSpectrum",
    "Withhold",
    "attach",
    "default_monitors",
    "numerics",
]
