"""Run what the ledger lacks of a table, one run after the other in this process, through the code of train.py.

  sam-repro run demo
  sam-repro run demo --only '*/gsam' --seeds 1 recipe.epochs=5
  sam-repro run demo --budget 9m                       # stop and save after nine minutes; the same command goes on

A finished run is never repeated and an interrupted one resumes. A diverged run is a result: the queue goes on, and
the exit code is 3. Ctrl-C, SIGTERM and SIGUSR2 save the current run and end the queue (128 + signal).
"""

from __future__ import annotations

import fnmatch
import os
import re
import signal
import sys
import threading
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from sam_repro.errors import UserError
from sam_repro.ledger import Row, read_row, row_path
from sam_repro.paper.plan import finished, positive
from sam_repro.paper.spec import Run, load_table, unique_runs
from sam_repro.signals import Interrupted

UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
DIVERGED = 3  # train.py's exit code


def add_arguments(parser: ArgumentParser) -> None:
    """The command's arguments."""
    parser.parse_args = parser.parse_intermixed_args  # overrides may stand before, between and after the options
    parser.add_argument("table", help="name in results/paper/, or a path to a .yaml")
    parser.add_argument("extra", nargs="*", metavar="key=value", help="overrides laid over every row's own")
    parser.add_argument("--seeds", type=positive, metavar="N", help="seeds a row, instead of what the table asks for")
    parser.add_argument("--limit", type=positive, metavar="N", help="start at most N runs")
    parser.add_argument("--only", metavar="PATTERN", help="rows whose id, or runs whose run id, match (* is anything)")
    parser.add_argument("--budget", type=duration, metavar="9m", help="stop after this time: 90s, 9m, 2h; exit code 0")
    parser.add_argument("--ledger", type=Path, metavar="DIR", help="write the rows here instead of the table's folder")


def duration(text: str) -> float:
    """Seconds from '90s', '9m', '2h', '1.5d' or a bare number of seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text)
    if not match or float(match[1]) == 0:
        raise ArgumentTypeError(f"'{text}' is not a duration such as 90s, 9m or 2h")
    return float(match[1]) * UNITS[match[2]]


def run(args: Namespace) -> int:
    """Run the queue; returns the exit code."""
    if bad := [word for word in args.extra if "=" not in word]:
        raise UserError(f"'{bad[0]}' is not an override such as recipe.epochs=5")
    runs = list(wanted(args).values())
    queue = [r for r in runs if not finished(r, args.ledger)]
    say(f"{len(runs) - len(queue)} of {len(runs)} runs are in the ledger, {len(queue)} to go")
    return Queue(runs, queue[: args.limit], args.ledger, args.budget).work()


def wanted(args: Namespace) -> dict[str, Run]:
    """The table's runs by run id, those that --only leaves."""
    table = load_table(args.table)
    runs = unique_runs([table], seeds=args.seeds, extra=args.extra)
    if args.only is None:
        return runs
    rows = replace(table, rows=tuple(row for row in table.rows if fnmatch.fnmatch(row.id, args.only)))
    of_rows = unique_runs([rows], seeds=args.seeds, extra=args.extra)
    kept = {k: r for k, r in runs.items() if k in of_rows or fnmatch.fnmatch(k, args.only)}
    if not kept:
        raise UserError(f"--only '{args.only}' matches no row of {table.name}: {', '.join(r.id for r in table.rows)}")
    return kept


class Queue:
    """Runs one after the other, with the signals and the budget that may end them."""

    def __init__(self, runs: list[Run], queue: list[Run], ledger_dir: Path | None, budget: float | None):
        self.runs, self.queue, self.ledger_dir, self.budget = runs, queue, ledger_dir, budget
        self.stopped_by: int | None = None
        self.spent = False

    def work(self) -> int:
        """Run until the queue is empty, a signal comes or the budget is spent."""
        before = {s: signal.signal(s, self.note) for s in (signal.SIGTERM, signal.SIGUSR2)}
        timer = threading.Timer(self.budget or 0, self.spend)
        timer.daemon = True
        if self.budget:
            timer.start()
        try:
            return self.drain()
        finally:
            timer.cancel()
            for number, handler in before.items():
                signal.signal(number, handler)

    def drain(self) -> int:
        """The loop; returns the exit code."""
        from sam_repro.train import main  # torch comes with it: not before there is something to run

        diverged = 0
        for i, r in enumerate(self.queue, 1):
            if self.spent:  # also where the signal came too late for a run that was just ending
                self.stopped_by = signal.SIGUSR2
            if self.stopped_by is None:
                say(f"({i}/{len(self.queue)}) {r.run_id}{self.eta(i - 1)}")
                try:
                    diverged += self.train(main, r)["status"] == "diverged"
                except Interrupted as stop:
                    self.stopped_by = int(stop.code or 0) - 128  # pyright: ignore[reportArgumentType]: an int
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
        """A signal between two runs; during a run train.py's own handler takes it."""
        self.stopped_by = number

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


def clock(seconds: float) -> str:
    """h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def say(sentence: str) -> None:
    """A line for the person watching; stdout stays free for what other programs read."""
    print(sentence, file=sys.stderr, flush=True)
