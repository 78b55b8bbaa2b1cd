"""Write the files that the package carries to a folder of the user's."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from redline.errors import ConfigurationError

DEFAULT_TARGET = "127.0.0.1:9108"
"""Where ``PrometheusExporter`` serves unless told otherwise."""

_CARRIED = Path(__file__).with_name("files")
_TARGET = re.compile(r"(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):(?P<port>[0-9]{1,5})")


def export(folder: str | Path, targets: Sequence[str] = (DEFAULT_TARGET,)) -> list[Path]:
    """Write dashboard, rules, alerts, provisioning and a compose file.

    Args:
        folder: where to; made if it is not there. A file that is there already and differs is never overwritten.
        targets: what Prometheus is to scrape: ``host:port`` of each process that serves metrics.

    Returns:
        The files, relative to the folder.

    Raises:
        ConfigurationError: a target is not host and port, a file is there and differs, or the folder cannot be written.
    """
    contents = _contents(_checked(targets))
    root = Path(folder)
    try:
        differing = [path for path, content in contents.items() if _differs(root / path, content)]
        if differing:
            raise ConfigurationError(
                f"got {root}, where {', '.join(map(str, differing))} is there already and differs; expected a folder "
                "without. Nothing was written: pass another folder, or move what is there out of the way."
            )
        for path, content in contents.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(content)
    except OSError as error:
        raise ConfigurationError(
            f"got {root}, where {error.filename or 'a file'} cannot be written ({error.strerror}); expected a folder "
            "that can be made and written. Pass another one."
        ) from error
    return list(contents)


def _checked(targets: Sequence[str]) -> Sequence[str]:
    for target in targets:
        matched = _TARGET.fullmatch(target)
        if not matched or not 0 < int(matched["port"]) <= 65535:
            raise ConfigurationError(
                f"got {target!r} as a target; expected host:port of a process that serves metrics, such as "
                f"{DEFAULT_TARGET}, without http:// and without /metrics."
            )
    if not targets:
        raise ConfigurationError(f"got no target; expected at least one host:port, such as {DEFAULT_TARGET}.")
    return targets


def _contents(targets: Sequence[str]) -> dict[Path, bytes]:
    """Content of each file by its path, the targets filled in."""
    carried = {path.relative_to(_CARRIED): path.read_bytes() for path in sorted(_CARRIED.rglob("*")) if path.is_file()}
    configuration = Path("prometheus", "prometheus.yml")
    scraped = json.dumps(list(targets))[1:-1]
    carried[configuration] = carried[configuration].replace(f'"{DEFAULT_TARGET}"'.encode(), scraped.encode())
    return carried


def _differs(path: Path, content: bytes) -> bool:
    return path.exists() and path.read_bytes() != content
