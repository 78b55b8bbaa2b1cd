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
        results, minutes = self._measure(self.cases(options.quick), kept, options)
        table, claims = self.table(results), self.claims(results)
        rich.print(table)
        for claim in claims:
            rich.print(f"[bold]{claim.verdict}[/]: {claim.claim} Published: {claim.published}. Here: {claim.measured}.")
        self._draw(results, kept.with_suffix(".png"))
        page = {
            "title": self.title,
            "source": self.source,
            "command": f"python examples/studies/{self.name}.py{' --quick' * options.quick} --out {options.out}",
            "machine": describe(),
            "date": date.today().isoformat(),
            "minutes": round(minutes, 1),
            "table": asdict(table),
            "claims": [asdict(claim) for claim in claims],
        }
        _write(kept, page, results)
        rich.print(f"Results and plot: {kept}, {kept.with_suffix('.png')}")

    def _measure(self, cases: list[Case], kept: Path, options: argparse.Namespace) -> tuple[list[Result], float]:
        """Results of all cases in order, those on disk among them, and the minutes that all of them took."""
        page = json.loads(kept.read_text()) if kept.exists() and not options.again else {}
        known = [next(iter(select(page.get("results", []), **case)), None) for case in cases]
        minutes = page.get("minutes", 0.0) if any(known) else 0.0
        if any(known):
            rich.print(f"{len(cases) - known.count(None)} of {len(cases)} cases are read from {kept}; --again: anew.")
        started = time.time()
        for place, outcome in self._run(cases, [place for place, one in enumerate(known) if one is None], options):
            known[place] = {**cases[place], **outcome}
            done = minutes + (time.time() - started) / 60
            _write(kept, {"minutes": done}, [one for one in known if one is not None])
        return [one for one in known if one is not None], minutes + (time.time() - started) / 60

    def _run(
        self, cases: list[Case], places: list[int], options: argparse.Namespace
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Run the cases at these places side by side; each place and its outcome, as they come."""
        columns = ("[progress.description]{task.description}", BarColumn(), MofNCompleteColumn())
        spawned = multiprocessing.get_context("spawn")
        with (
            ProcessPoolExecutor(options.processes, spawned, torch.set_num_threads, (1,)) as pool,
            Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as progress,
        ):
            waiting = {pool.submit(self.run, **cases[place]): place for place in places}
            try:
                for future in progress.track(as_completed(waiting), total=len(places), description=self.name):
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


def judge(holds: bool, in_part: bool | int = False) -> Verdict:
    """The verdict on a claim that holds, or else in part (or of some, counted)."""
    return "holds" if holds else "holds in part" if in_part else "does not hold here"


def select(results: list[Result], **where: Any) -> list[Result]:
    """The results of which all these hold."""
    return [one for one in results if all(name in one and one[name] == value for name, value in where.items())]


def _write(path: Path, page: dict[str, Any], results: list[Result]) -> None:
    """A result a line."""
    head = json.dumps(page, indent=1)[:-2]
    lines = ",\n".join(f"  {json.dumps(one)}" for one in results)
    path.write_text(f'{head},\n "results": [\n{lines}\n ]\n}}\n')
