"""Writing the record of a run: one snapshot a line."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any, BinaryIO

from redline.errors import ConfigurationError
from redline.integrations.ranks import is_rank_zero
from redline.integrations.record.parts import part_path, parts
from redline.integrations.record.schema import Header, closing_text, header_text, line_of, line_text
from redline.readings import Snapshot
from redline.report import StabilityReport
from redline.schedules import Schedule
from redline.sink import Sink

MOST_PARTS = 8
_LEAST_BYTES = 4096


class JsonlRecorder(Sink):
    """Records a run on rank 0: ``redline report FILE`` reads it, during the run and after it.

    Each line holds what was measured, counted and done since the one before, every loss and every r among it, and is
    handed to the system as one write: a run that is killed loses what its last line did not hold. A file that has
    reached ``max_bytes`` is followed by another: ``run.jsonl``, ``run.1.jsonl``, ``run.2.jsonl``. There are at most 8;
    when there is one more, the second oldest is deleted, so that the start of the run stays and the latest does.

    A resumed run goes on in the same files; what it does again replaces what was recorded of those steps. What cannot
    be written, as on a full disk, is a warning, and the run goes on unrecorded.
    """

    def __init__(
        self, path: str | Path = "redline.jsonl", every: int | Schedule = 10, *, max_bytes: int = 64 * 2**20
    ) -> None:
        """Record to a file.

        Args:
            path: the first file; its folder is made if it is not there.
            every: schedule of the lines.
            max_bytes: size at which the next file begins, 4,096 at least; one line may be more than that.
        """
        super().__init__(every)
        if max_bytes < _LEAST_BYTES:
            raise ConfigurationError(f"got max_bytes={max_bytes}; expected at least {_LEAST_BYTES}.")
        if Path(path).is_dir():
            raise ConfigurationError(f"got path {str(path)!r}, which is a folder; expected a file, such as run.jsonl.")
        self.path, self.max_bytes = Path(path), max_bytes
        self._file: BinaryIO | None = None
        self._part, self._goes_on = 0, False
        self._before: Snapshot | None = None  # of the line last written to this file

    def open(self, snapshot: Snapshot) -> None:
        """Open the last file there is, to go on in it, and keep other recorders away."""
        if not is_rank_zero():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        there = parts(self.path)
        self._goes_on = False
        self._open(there[-1].number if there else 0)

    def emit(self, snapshot: Snapshot) -> None:
        """Write a line."""
        if self._file is None:
            return
        try:
            self._write_snapshot(self._file, snapshot)
        except OSError as error:
            self._let_go()
            raise OSError(
                f"{part_path(self.path, self._part)} cannot be written ({error.strerror or error}). The run goes on, "
                f"unrecorded from step {snapshot.step} on"
            ) from error

    def finish(self, snapshot: Snapshot) -> None:
        """Write what there was since the last line, if there was anything."""
        if not line_of(snapshot, self._before).says_nothing:
            self.emit(snapshot)

    def close(self, report: StabilityReport) -> None:
        """Write what only the end tells, and close the file."""
        try:
            if self._file is not None:
                _write(self._file, closing_text(report))
        finally:
            self._let_go()

    def _open(self, part: int) -> None:
        path = part_path(self.path, part)
        file = path.open("ab", buffering=0)
        try:
            _lock(file, path)
            _end_line(file, path)
        except BaseException:
            file.close()
            raise
        self._let_go()
        self._file, self._part = file, part

    def _let_go(self) -> None:
        """Close the file, and let others write to it: its lock is shared with processes that were forked meanwhile."""
        if self._file is not None:
            _unlock(self._file)
            self._file.close()
        self._file = self._before = None

    def _write_snapshot(self, file: BinaryIO, snapshot: Snapshot) -> None:
        text = line_text(line_of(snapshot, self._before))
        if file.tell() and file.tell() + len(text) > self.max_bytes:
            self._open(self._part + 1)
            for old in parts(self.path)[1 : 1 - MOST_PARTS]:
                old.path.unlink(missing_ok=True)
            assert self._file is not None
            file, text = self._file, line_text(line_of(snapshot, None))
        if self._before is None:
            text = header_text(Header(snapshot.run, snapshot.first_step, self._part, self._goes_on)) + text
        _write(file, text)
        self._before, self._goes_on = snapshot, True

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_file": None, "_before": None}


def _lock(file: BinaryIO, path: Path) -> None:
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OSError(
            f"got path {str(path)!r}, to which another recorder writes; expected one of its own. The run goes on "
            "without being recorded: pass another path"
        ) from error
    except OSError:
        pass  # a file system without locks


def _unlock(file: BinaryIO) -> None:
    if sys.platform != "win32":
        import fcntl

        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_UN)


def _end_line(file: BinaryIO, path: Path) -> None:
    """A run that was killed may have left a line broken off; what follows it starts a line of its own."""
    if file.seek(0, os.SEEK_END):
        with path.open("rb") as written:
            written.seek(-1, os.SEEK_END)
            if written.read(1) != b"\n":
                _write(file, b"\n")


def _write(file: BinaryIO, text: bytes) -> None:
    """All of it; one call of the system, unless that takes less than all."""
    rest = memoryview(text)
    while rest:
        rest = rest[file.write(rest) :]
