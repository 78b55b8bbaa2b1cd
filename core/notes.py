"""Notes: what could not be measured or shown, said once, in words."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from redline.errors import RedlineWarning

_MOST = 100  # a message that names another number each time must not fill the memory of a long run


class Notes:
    """Says each thing once, as a warning, and keeps it for the report: the first hundred."""

    def __init__(self) -> None:
        self._said: dict[str, None] = {}

    def add(self, text: str) -> None:
        """Say it, unless it has been said. ``text`` names what, why, and where there is one the remedy."""
        if text not in self._said and len(self._said) < _MOST:
            self._said[text] = None
            warnings.warn(text, RedlineWarning, stacklevel=3)

    def __iter__(self) -> Iterator[str]:
        return iter(self._said)
