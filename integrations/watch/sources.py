"""Where the snapshots of a running job come from: an address, or a record's file."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Protocol

from redline.errors import ConfigurationError
from redline.integrations.watch.exposition import fetch
from redline.readings import Snapshot

_HOST_AND_PORT = re.compile(r"(?P<address>([\w.-]+|\[[0-9a-fA-F:]+\]):\d+)(?P<path>/.*)?")
_MOST_WAITING = 10_000


class Source(Protocol):
    """Hands out what is new.

    Attributes:
        name: what it reads, for people.
        ended: whether nothing more can come.
    """

    name: str
    ended: bool

    def poll(self) -> list[Snapshot]:
        """The snapshots since the last time, oldest first; does not wait for one to come."""


class ExpositionSource:
    """The metrics that a run serves over HTTP."""

    ended = False  # a port that is closed may be opened again

    def __init__(self, url: str) -> None:
        self.name = url

    def poll(self) -> list[Snapshot]:
        """What is served now, if it can be fetched."""
        return [fetch(self.name)]


class RecordSource:
    """A record that a run is writing; it is followed in a thread of its own, which waits for the file to grow."""

    def __init__(self, path: Path, follow: Callable[[Path], Iterator[Snapshot]]) -> None:
        self.name, self.ended = str(path), False
        self._waiting: deque[Snapshot] = deque(maxlen=_MOST_WAITING)
        self._error: BaseException | None = None
        self._thread = Thread(target=self._follow, args=(path, follow), daemon=True)
        self._thread.start()

    def _follow(self, path: Path, follow: Callable[[Path], Iterator[Snapshot]]) -> None:
        try:
            self._waiting.extend(follow(path))  # one by one, as they come
        except Exception as error:  # noqa: BLE001 raised again where it is heard
            self._error = error
        finally:
            self.ended = True

    def poll(self) -> list[Snapshot]:
        """What was read since the last time."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return [self._waiting.popleft() for _ in range(len(self._waiting))]

    def wait(self) -> None:
        """Wait until nothing more can come: for a record that is read to its present end only."""
        self._thread.join()


def source_of(target: str, *, live: bool = True) -> Source:
    """Tell an address from a file.

    Args:
        target: "http(s)://host:port/path", "host:port" (served under /metrics), or a record's file.
        live: whether a record is followed as it grows, or read as far as it goes.

    Raises:
        ConfigurationError: it is none of these.
    """
    if target.startswith(("http://", "https://")):
        return ExpositionSource(target if "/" in target.partition("://")[2] else f"{target}/metrics")
    path = Path(target)
    if path.exists():
        return _record_source(path, live)
    if found := _HOST_AND_PORT.fullmatch(target):
        return ExpositionSource(f"http://{found['address']}{found['path'] or '/metrics'}")
    raise ConfigurationError(
        f"got {target!r}; expected the address of a run's metrics, such as http://127.0.0.1:9108/metrics or "
        "127.0.0.1:9108, or the file that a JsonlRecorder writes. There is no such file here."
    )


def _record_source(path: Path, live: bool) -> RecordSource:
    from redline.integrations.record import follow  # read only by those who watch a record

    source = RecordSource(path, lambda path: follow(path, live=live))
    if not live:
        source.wait()
    return source
