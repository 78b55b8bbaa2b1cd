"""The commands of ``redline``, one a file: ``add`` says what it takes, ``run`` does it."""

from __future__ import annotations

from types import ModuleType

from redline.integrations.commands import demo

COMMANDS: tuple[ModuleType, ...] = (demo,)
"""In the order in which ``redline --help`` lists them."""
