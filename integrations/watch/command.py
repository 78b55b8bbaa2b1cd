"""The loop of ``redline watch``: look, show, wait."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console, RenderableType
from rich.live import Live

from redline.errors import ConfigurationError
from redline.integrations.watch.exposition import UnreachableError
from redline.integrations.watch.sources import Source, source_of
from redline.integrations.watch.trail import Trail
from redline.integrations.watch.view import watch_view


def watch(target: str, *, interval: float = 2.0, once: bool = False, console: Console | None = None) -> None:
    """Show a running job until it ends, or until Ctrl-C.

    On a terminal the view is redrawn in place; elsewhere one is printed at each new step seen.

    Args:
        target: an address or a record's file, see ``source_of``.
        interval: seconds between looks.
        once: show one view and return.
        console: to print on; by default on stdout.

    Raises:
        ConfigurationError: the target is neither; with ``once`` also: nothing is to be seen there now.
    """
    if not interval > 0:
        raise ConfigurationError(f"got an interval of {interval} s; expected a positive number of seconds, such as 2.")
    console, source, trail = console or Console(), source_of(target, live=not once), Trail()
    if once:
        _look_once(source, trail)
        console.print(watch_view(trail, source.name, time.time()))
        return
    try:
        if console.is_terminal:
            with Live(console=console, auto_refresh=False) as live:
                _keep_looking(source, trail, interval, lambda view, moved: live.update(view, refresh=True))
        else:
            _keep_looking(source, trail, interval, lambda view, moved: console.print(view) if moved else None)
    except KeyboardInterrupt:
        pass


def _look_once(source: Source, trail: Trail) -> None:
    try:
        for snapshot in source.poll():
            trail.add(snapshot, time.time())
    except UnreachableError as error:
        raise ConfigurationError(
            f"nothing answers at {error}; expected a running job with redline.PrometheusExporter. Has it started, and "
            "is this its port?"
        ) from error
    if trail.snapshot is None:
        raise ConfigurationError(f"got {source.name}, which holds no snapshot yet; expected at least one.")


def _keep_looking(source: Source, trail: Trail, interval: float, show: Callable[[RenderableType, bool], None]) -> None:
    """``show`` is given a view, and whether it shows anything new."""
    said = ""
    while True:
        trouble, before = "", trail.snapshot
        ended = source.ended  # asked first: then what is left is seen below
        try:
            for snapshot in source.poll():
                trail.add(snapshot, time.time())
        except UnreachableError as error:
            trouble = f"Nothing answers at {error}. Trying again every {interval:g} s; Ctrl-C ends."
        moved = trail.snapshot is not None and (before is None or trail.snapshot.step != before.step)
        if ended:
            trouble = "The run has ended."
        show(watch_view(trail, source.name, time.time(), trouble=trouble), moved or trouble != said)
        said = trouble
        if ended:
            return
        time.sleep(interval)
