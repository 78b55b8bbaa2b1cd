"""The commands of ``redline``, one a file: ``add`` says what it takes, ``run`` does it."""

from __future__ import annotations

from types import ModuleType

from redline.integrations.commands import compare, dashboards, demo, doctor, report, watch

COMMANDS: tuple[ModuleType, ...] = (demo, doctor, watch, report, compare, dashboards)
"""In the order in which ``redline --help`` lists them."""
