"""One finding, and what makes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

if TYPE_CHECKING:
    from redline.report import StabilityReport

Level: TypeAlias = Literal["good", "watch", "bad"]

LEVELS: tuple[Level, ...] = ("bad", "watch", "good")
"""Worst first."""


@dataclass(frozen=True)
class Finding:
    """What a rule found in a run.

    Attributes:
        level: good, watch (it deserves a look), or bad (the run is not to be trusted as it is).
        rule: name of the rule, as in docs/findings.md.
        seen: what was seen, with figures and steps.
        why: why it matters.
        advice: what to try.
    """

    level: Level
    rule: str
    seen: str
    why: str
    advice: str

    @property
    def text(self) -> str:
        """All of it in one paragraph."""
        return " ".join(part for part in (self.seen, self.why, self.advice) if part)


Rule: TypeAlias = "Callable[[StabilityReport], Finding | None]"
