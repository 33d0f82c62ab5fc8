"""Run what the ledger lacks of tables or plans, one after the other."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import shlex
import signal
import sys
import threading
import time
from argparse import Namespace
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from sam_repro.errors import UserError
from sam_repro.paper.ledger_join import unique_runs
from sam_repro.paper.runs import Run, make_run
from sam_repro.paper.spec import Table, load_table
from sam_repro.records.ledger import Row, read_row, row_path
from sam_repro.records.lock import Held
from sam_repro.records.log import clock
from sam_repro.runner.plan import finished, lost_start, tables_and_overrides
from sam_repro.runner.worker import fresh
from sam_repro.training.signals import STOPS, Interrupted, StopSignal, handle, restore

DIVERGED = 3  # train.py's exit code


def wanted(args: Namespace) -> dict[str, Run]:
    """The runs of all tables and plans by run id, those that --only leaves."""
    names, extra = tables_and_overrides(args.words, "run")
    runs: dict[str, Run] = {}
    for name in names:
        runs |= planned(Path(name), extra) if name.endswith(".tsv") else of_table(load_table(name), args, extra)
    if not runs and args.only is not None:
        raise UserError(f"--only '{args.only}' matches no row of {', '.join(names)}")
    return runs


def of_table(table: Table, args: Namespace, extra: list[str]) -> dict[str, Run]:
    """The runs of one table that --only leaves."""
    options = {"seeds": args.seeds, "extra": extra, "ledger": args.ledger}
    runs = unique_runs([table], **options)
    if args.only is None:
        return runs
    rows = replace(table, rows=tuple(row for row in table.rows if fnmatch.fnmatch(row.id, args.only)))
    of_rows = unique_runs([rows], **options)
    return {k: r for k, r in runs.items() if k in of_rows or fnmatch.fnmatch(k, args.only)}


@cache
def read_plan(path: Path) -> tuple[tuple[str, ...], ...]:
    """The overrides of every line of a plan."""
    try:
        return tuple(tuple(shlex.split(line.split("\t", 1)[1])) for line in path.read_text().splitlines() if line)
    except (OSError, IndexError, ValueError) as error:
        raise UserError(f"{path} is not a plan of `sam-repro plan`: {error}") from None


def planned(path: Path, extra: list[str]) -> dict[str, Run]:
    """The runs of a file that `sam-repro plan` wrote, after those of it whose weights they start from."""
    runs = {}
    for line in read_plan(path):
        r = make_run((*line, *extra))
        runs[r.run_id] = r
    return {name: replace(r, after=runs.get(Path(r.config.init or "").name)) for name, r in runs.items()}


class Queue:
    """Runs one after the other, with the signals and the budget that may end them."""

    def __init__(self, runs: list[Run], queue: list[Run], ledger_dir: Path | None, budget: float | None):
        self.runs, self.queue, self.ledger_dir, self.budget = runs, queue, ledger_dir, budget
        self.stopped_by: int | None = None
        self.spent = self.busy = False

    def work(self) -> int:
        """Run until the queue is empty, a signal comes or the budget is spent."""
        before = handle(STOPS, self.note)
        timer = threading.Timer(self.budget or 0, self.spend)
        timer.daemon = True
        if self.budget:
            timer.start()
        try:
            return self.drain()
        finally:
            timer.cancel()
            restore(before)

    def drain(self) -> int:
        """The loop; returns the exit code."""
        from sam_repro.training.main import main  # torch comes with it: not before there is something to run

        diverged = 0
        for i, r in enumerate(self.queue, 1):
            if self.spent:  # also where the signal came too late for a run that was just ending
                self.stopped_by = signal.SIGUSR2
            if self.stopped_by is None:
                if why := lost_start(r, self.ledger_dir):
                    say(f"{r.run_id} is left out: {why}")
                    continue
                say(f"({i}/{len(self.queue)}) {r.run_id}{self.eta(i - 1)}")
                try:
                    self.busy = True
                    diverged += self.train(main, r)["status"] == "diverged"
                    self.stopped_by = self.stopped_by or StopSignal.late
                    fresh()
                except Interrupted as stop:
                    self.stopped_by = int(stop.code or 0) - 128  # pyright: ignore[reportArgumentType]: an int
                except Held as error:
                    say(f"{r.run_id} is left out: {error}")
                finally:
                    self.busy = False
            if self.stopped_by is not None:
                why = "the budget is spent" if self.spent else f"stopped by {signal.Signals(self.stopped_by).name}"
                say(f"{why}: {self.tally()}; the same command goes on from there")
                return 0 if self.spent else 128 + self.stopped_by
        say(self.tally())
        return DIVERGED if diverged else 0

    def tally(self) -> str:
        """How far the queue has come."""
        return f"{sum(finished(r, self.ledger_dir) for r in self.runs)} of {len(self.runs)} runs are in the ledger"

    def train(self, main: Any, r: Run) -> Row:
        """One run, as `python train.py <overrides>` would do it."""
        if self.ledger_dir is not None:
            r.config.log.ledger_dir = str(self.ledger_dir)
        return main(r.config, list(r.overrides))

    def note(self, number: int, frame: Any) -> None:
        """A signal between two runs, or as one starts; once it trains, train.py's own handler takes it."""
        self.stopped_by = number
        if self.busy:
            raise Interrupted(128 + number)

    def spend(self) -> None:
        """End of the budget: the same signal that SLURM sends before it ends a job."""
        self.spent = True
        os.kill(os.getpid(), signal.SIGUSR2)

    def eta(self, started: int) -> str:
        """Time left for the queue from run `started` on, from the hours of the rows there are.

        A run costs the mean of its own model and method, else of all rows; silent before the first row.
        """
        rows = [read_row(p) for p in (self.row_of(r) for r in self.runs) if p.exists()]
        rows = [row for row in rows if row["status"] == "done"]
        if not rows:
            return ""
        hours: dict[str, list[float]] = {}
        for row in rows:
            hours.setdefault(kind_of(row["run_id"]), []).append(row["hours"] / max(1, row.get("world", 1)))
        everything = [h for kind in hours.values() for h in kind]
        left = 0.0
        for r in self.queue[started:]:
            known = hours.get(kind_of(r.run_id), everything)
            left += 3600 * sum(known) / len(known)
        return f"   about {clock(left)} left, until {time.strftime('%H:%M', time.localtime(time.time() + left))}"

    def row_of(self, r: Run) -> Path:
        """Where the row of a run is or will be."""
        return row_path(self.ledger_dir or r.config.log.ledger_dir, r.run_id)


def kind_of(run_id: str) -> str:
    """<model>-<optim> of a run id."""
    return run_id.rsplit("-", 2)[0]


def say(sentence: str) -> None:
    """A line for the person watching; stdout stays free for what other programs read."""
    with contextlib.suppress(OSError):  # a terminal that is gone ends no queue
        print(sentence, file=sys.stderr, flush=True)
