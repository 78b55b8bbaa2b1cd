"""The commands of ``redline``, one a file: ``add`` says what it takes, ``run`` does it."""

from __future__ import annotations

from types import ModuleType

from redline.integrations.commands import demo, doctor, watch

COMMANDS: tuple[ModuleType, ...] = (demo, doctor, watch)
"""In the order in which ``redline --help`` lists them."""
