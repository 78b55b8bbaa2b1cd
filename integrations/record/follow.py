"""Following a record while it grows."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from pathlib import Path

from redline.integrations.record.parts import Part, checked_header, decoded_line, first_header, is_header, parts
from redline.integrations.record.schema import Closing, Header
from redline.integrations.record.state import State
from redline.readings import Snapshot


def follow(path: str | Path, *, poll: float = 0.5, live: bool = True) -> Iterator[Snapshot]:
    """The snapshots of a record, from its first line on, and then each as it is written.

    Each has all values as of its line, and in ``since`` what happened since the line before. It ends with the run, at
    a closing line with nothing behind it. A run that was killed wrote none: then it waits, for the run to be resumed.

    Args:
        path: the record's first file, or another of its files, to begin there.
        poll: seconds between looks at the file, while nothing new is there.
        live: whether to wait for what is yet to be written; else it ends with what is there.

    Raises:
        ConfigurationError: at the first ``next``: no record is there, or none that this Redline reads.
    """
    path = Path(path)
    state = State(first_header(path))
    done: int | None = None
    ended = False
    while not ended:
        there = [part for part in parts(path) if done is None or part.number > done]
        for part in there:
            ended = yield from _follow_part(part, path, state, poll if live else None)
            done = part.number
        if not live:
            return


def _follow_part(part: Part, path: Path, state: State, poll: float | None) -> Generator[Snapshot, None, bool]:
    """Until the run has ended, which it returns, or until there is a next part; ``poll``: None to end with the file."""
    closed, number, begun = False, 0, b""
    with part.path.open("rb") as file:
        while True:
            newer = any(other.number > part.number for other in parts(path))  # asked first: then this one is complete
            while text := file.readline():
                begun += text
                if not begun.endswith(b"\n"):
                    break
                whole, begun, number = begun, b"", number + 1
                said = checked_header(whole, part.path) if is_header(whole) else decoded_line(whole, part.path, number)
                closed = isinstance(said, Closing)
                if isinstance(said, Header):
                    state.begin(said)
                elif said is not None and not isinstance(said, Closing):
                    state.add(said)
                    yield state.snapshot(said)
            if newer:
                return False
            if closed or poll is None:
                return True
            time.sleep(poll)
