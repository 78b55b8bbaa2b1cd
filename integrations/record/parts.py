"""The files of a record: ``run.jsonl``, then ``run.1.jsonl``, ``run.2.jsonl`` and so on, each readable by itself."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from redline.errors import ConfigurationError
from redline.integrations.record.schema import FORMAT, VERSION, Closing, Header, Line, MalformedError, decoded

LONGEST_LINE = 64 * 2**20
"""Bytes of a line; no model that fits a machine fills one, and none longer is read."""


class Part(NamedTuple):
    """One file of a record, and its number: 0 for the first."""

    number: int
    path: Path


def part_path(path: Path, number: int) -> Path:
    """Where a part of the record ``path`` lies."""
    return path.with_name(f"{path.stem}.{number}{path.suffix}") if number else path


def parts(path: Path) -> list[Part]:
    """The files of a record that are there, in order."""
    name = re.compile(re.escape(path.stem) + r"\.([1-9][0-9]*)" + re.escape(path.suffix))
    siblings = path.parent.iterdir() if path.parent.is_dir() else ()
    later = [Part(int(match[1]), one) for one in siblings if (match := name.fullmatch(one.name))]
    return [*([Part(0, path)] if path.exists() else []), *sorted(later)]


def lines(file: BinaryIO) -> Iterator[tuple[bytes, bool]]:
    """The lines from where the file stands, without their ends, and whether each is whole."""
    while text := file.readline(LONGEST_LINE):
        yield text.rstrip(b"\r\n"), text.endswith(b"\n")


def is_header(text: bytes) -> bool:
    """Whether a line starts a session, told from its first bytes."""
    return text.startswith(b'{"format"')


def first_header(path: Path) -> Header:
    """The header of a file.

    Raises:
        ConfigurationError: it is no record, or none that this Redline reads; says why.
    """
    if path.is_dir():
        there = ", ".join(sorted(one.name for one in path.glob("*.jsonl"))[:3]) or "no .jsonl file"
        raise ConfigurationError(f"got {path}, which is a folder; expected a record's file. There: {there}.")
    try:
        with path.open("rb") as file:
            text = file.readline(LONGEST_LINE)
    except FileNotFoundError as error:
        raise ConfigurationError(f"got {path}, which is not there; expected the file of a record.") from error
    except OSError as error:
        raise ConfigurationError(f"got {path}, which cannot be read: {error.strerror or error}.") from error
    if not text:
        raise ConfigurationError(f"got {path}, which is empty: the run has not come to its first step, or ended there.")
    return checked_header(text, path)


def checked_header(text: bytes, path: Path) -> Header:
    """The header that a line is, or a ConfigurationError as of ``first_header``."""
    foreign = f"got {path}, which is no record of Redline's"
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(
            f"{foreign}: its first line is not JSON. Expected what JsonlRecorder wrote."
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ConfigurationError(f'{foreign}: its first line does not say "format": "{FORMAT}".')
    version = content.get("version")
    if not isinstance(version, int) or version < 1:
        raise ConfigurationError(f"got {path}, a record of version {version!r}; expected {VERSION}.")
    if version > VERSION:
        raise ConfigurationError(
            f"got {path}, a record of version {version}; this Redline reads up to {VERSION}. Install the Redline that "
            "wrote it, or a newer one."
        )
    header = decoded_line(text, path, 1)
    assert isinstance(header, Header)
    return header


def decoded_line(text: bytes, path: Path, number: int) -> Header | Line | Closing | None:
    """What a line says; None where it is broken off or garbled.

    Raises:
        ConfigurationError: it is JSON, but not as the schema has it.
    """
    try:
        return decoded(text)
    except MalformedError as error:
        raise ConfigurationError(
            f"got {path}, whose line {number} is not as a record of version {VERSION} has it ({error}). Was the file "
            "edited?"
        ) from error
    except (ValueError, RecursionError):
        return None
