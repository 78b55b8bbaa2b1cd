"""What the studies share: cases run side by side, kept on disk, and held against what was published.

A study is a list of cases, a function that runs one, and what is made of the results: a table, a plot, and claims, each
with the published figure beside its own. Every study has the same command line (``--help``).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Literal

import rich
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table as RichTable

from redline.integrations.demo.machine import describe

Verdict = Literal["holds", "holds in part", "does not hold here"]
Case = dict[str, Any]  # the keyword arguments of one run: plain values, since they go to JSON
Result = dict[str, Any]  # a case and what came of it, in one


@dataclass(frozen=True)
class Claim:
    """A published claim and what became of it here.

    Attributes:
        claim: the claim, in a sentence.
        published: the figure as published, with its place in the paper.
        measured: this study's figure, with over how many runs.
        verdict: whether it holds.
    """

    claim: str
    published: str
    measured: str
    verdict: Verdict


@dataclass(frozen=True)
class Table:
    """A table of strings, for a terminal and for a page."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]] = field(default_factory=list)

    def __rich__(self) -> RichTable:
        table = RichTable(title=self.title)
        for place, heading in enumerate(self.columns):
            table.add_column(heading, justify="right" if place else "left")
        for row in self.rows:
            table.add_row(*row)
        return table


@dataclass(frozen=True)
class Study:
    """One study.

    Attributes:
        name: of its files; the script's own.
        title: a line for people.
        source: paper, figures and tables it repeats.
        cases: ``quick -> cases``; the short form is what the tests run, within a minute.
        run: runs one case, seeded by it, and returns plain values. It is called in another process, on one thread.
        table: of all results.
        plot: ``(results, matplotlib figure)``: draws on the figure.
        claims: of all results.
        size: inches, of the plot.
    """

    name: str
    title: str
    source: str
    cases: Callable[[bool], list[Case]]
    run: Callable[..., dict[str, Any]]
    table: Callable[[list[Result]], Table]
    plot: Callable[[list[Result], Any], None]
    claims: Callable[[list[Result]], list[Claim]]
    size: tuple[float, float] = (9.0, 4.0)

    def main(self, arguments: Sequence[str] | None = None) -> None:
        """The command line."""
        parser = argparse.ArgumentParser(description=f"{self.title} {self.source}")
        parser.add_argument("--quick", action="store_true", help="the short form, within a minute")
        parser.add_argument("--out", type=Path, default=Path("evidence"), help="folder of the results (%(default)s)")
        parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="side by side (%(default)s)")
        parser.add_argument("--again", action="store_true", help="run cases that the results in --out have already")
        options = parser.parse_args(arguments)
        options.out.mkdir(parents=True, exist_ok=True)
        kept = options.out / f"{self.name}.json"
        cases = self.cases(options.quick)
        done = _read(kept) if kept.exists() and not options.again else {}
        results = {_key(case): done[_key(case)] for case in cases if _key(case) in done}
        if results:
            rich.print(f"{len(results)} of {len(cases)} cases are read from {kept}; --again runs them anew.")
        earlier = json.loads(kept.read_text()).get("minutes", 0.0) if results else 0.0
        seconds = time.time()
        for case, outcome in self._run([case for case in cases if _key(case) not in results], options.processes):
            results[_key(case)] = {**case, **outcome}
            kept.write_text(json.dumps({"results": list(results.values()), "keys": list(results)}))
        seconds = time.time() - seconds

        ordered = [results[_key(case)] for case in cases]
        table, claims = self.table(ordered), self.claims(ordered)
        rich.print(table)
        for claim in claims:
            rich.print(f"[bold]{claim.verdict}[/]: {claim.claim} Published: {claim.published}. Here: {claim.measured}.")
        self._draw(ordered, options.out / f"{self.name}.png")
        command = f"python examples/studies/{self.name}.py{' --quick' if options.quick else ''} --out {options.out}"
        page = {
            "title": self.title,
            "source": self.source,
            "command": command,
            "machine": describe(),
            "date": date.today().isoformat(),
            "minutes": round(earlier + seconds / 60, 1),
            "cases": len(cases),
            "table": asdict(table),
            "claims": [asdict(claim) for claim in claims],
            "results": ordered,
            "keys": [_key(case) for case in cases],
        }
        kept.write_text(json.dumps(page, indent=1) + "\n")
        rich.print(f"Results and plot: {kept}, {kept.with_suffix('.png')}")

    def _run(self, cases: list[Case], processes: int) -> Iterator[tuple[Case, dict[str, Any]]]:
        columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn())
        with (
            ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool,
            Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as progress,
        ):
            waiting = {pool.submit(self.run, **case): case for case in cases}
            try:
                for future in progress.track(as_completed(waiting), total=len(cases), description=self.name):
                    yield waiting[future], future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _draw(self, results: list[Result], path: Path) -> None:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot

        figure = pyplot.figure(figsize=self.size)
        self.plot(results, figure)
        figure.tight_layout()
        figure.savefig(path, dpi=110)


def select(results: list[Result], **where: Any) -> list[Result]:
    """The results of which all these hold."""
    return [one for one in results if all(one[name] == value for name, value in where.items())]


def _key(case: Case) -> str:
    return ", ".join(f"{name}={value}" for name, value in case.items())


def _read(kept: Path) -> dict[str, Result]:
    page = json.loads(kept.read_text())
    return dict(zip(page["keys"], page["results"], strict=True))
