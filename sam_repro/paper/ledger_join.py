"""The tables joined with the ledger: the runs that a row wants, and what came out of every row."""

from __future__ import annotations

import itertools
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sam_repro.config.compose import nearest
from sam_repro.errors import UserError, plural
from sam_repro.paper.outcomes import Cell, Outcome, computed, is_as_printed, state_of, summary, value_of, winners
from sam_repro.paper.runs import Run, make_run, words_of
from sam_repro.paper.spec import Table, TableRow, load_table, table_names
from sam_repro.paper.statistics import verdict
from sam_repro.records.ledger import Row, read_row, row_path


def runs_of(
    table: Table, row: TableRow, *, seeds: int | None = None, extra: Iterable[str] = (), ledger: Path | None = None
) -> list[Run]:
    """The runs of a row, by seed; none where the row has nothing to run, or waits for a sweep.

    Args:
        seeds: instead of the row's own number.
        extra: overrides laid over the row's.
        ledger: folder of ledger rows, for a sweep's winner; None: where the sweep's runs say.
    """
    if row.overrides is None:
        return []
    extra = tuple(extra)
    if row.tuned:
        point = winning_point(row.tuned, extra, ledger)
        if point is None:
            return []
        row = replace(row, point=point | row.point)
    assert row.overrides is not None
    overrides = (*table.base, *row.overrides, *extra)
    starts: list[Run] | list[None] = [None] * (row.seeds if seeds is None else seeds)
    if row.after:
        starts = start_runs(row.after, len(starts), extra)
    runs_of_points = []
    for seed, start in enumerate(starts):
        point = row.point | ({"init": f"{start.config.log.runs_dir}/{start.run_id}"} if start else {})
        runs_of_points.append(make_run((*overrides, *words_of(point)), seed, start))
    return runs_of_points


def winning_point(tuned: str, extra: tuple[str, ...], ledger: Path | None) -> dict[str, Any] | None:
    """The point of the sweep `<table>:<model>/<method>` that won on the table's `select`, or None before it is over."""
    name, _, sweep = tuned.partition(":")
    table = load_table(name)
    rows = [row for row in table.rows if row.point and row.id.rpartition("/")[0] == sweep]
    if not rows or not table.select:
        raise UserError(f"tuned: {tuned}: table {name} has no `select`, or no sweep '{sweep}'")
    outcomes = [join_row(table, row, ledger, seeds=None, extra=extra) for row in rows]
    if any(len(o.ledger) < len(o.runs) for o in outcomes):
        return None
    best = winners(table, outcomes)
    return best[0].outcome.row.point if best else None


def search_first(tables: Iterable[Table], extra: Iterable[str] = (), ledger: Path | None = None) -> str:
    """What to run before the rows of `tables` that take a sweep's winner; empty where no row waits for one."""
    extra = tuple(extra)
    waiting = [row.tuned for t in tables for row in t.rows if row.tuned and not winning_point(row.tuned, extra, ledger)]
    searches = dict.fromkeys(tuned.partition(":")[0] for tuned in waiting)
    command = shlex.join(["sam-repro", "run", *searches, *extra])
    return f"{plural(len(waiting), 'row')} more after a search; first type `{command}`" if waiting else ""


def start_runs(after: str, seeds: int, extra: tuple[str, ...]) -> list[Run]:
    """The runs of `<table>:<row id>`."""
    name, _, row_id = after.partition(":")
    table = load_table(name)
    rows = {row.id: row for row in table.rows}
    if row_id not in rows:
        raise UserError(f"after: {after}: table {name} has no row '{row_id}'{nearest(row_id, list(rows))}")
    return runs_of(table, rows[row_id], seeds=seeds, extra=extra)


def unique_runs(
    tables: Iterable[Table], *, seeds: int | None = None, extra: Iterable[str] = (), ledger: Path | None = None
) -> dict[str, Run]:
    """All runs of some tables by run id, each once, after the run whose weights it starts from.

    The first seed of every row comes before the second of any, so that an interrupted plan is evenly filled.
    """
    extra = tuple(extra)
    wanted_rows = [(table, row) for table in tables for row in table.rows]
    bar = tqdm(wanted_rows, desc="rows", leave=False, disable=None, delay=1)
    rows = [runs_of(table, row, seeds=seeds, extra=extra, ledger=ledger) for table, row in bar]
    in_turn = [run for turn in itertools.zip_longest(*rows) for run in turn if run is not None]
    return {run.run_id: run for wanted in in_turn for run in (wanted.after, wanted) if run is not None}


def join_table(table: Table, ledger_dir: Path | None = None, *, seeds: int | None = None) -> list[Outcome]:
    """What came out of every row of a table.

    Args:
        ledger_dir: folder of ledger rows; None takes the folder in each run's configuration.
        seeds: instead of the number the rows ask for.

    Raises:
        UserError: a folder that was named but does not exist, a damaged row, or overrides that do not compose.
    """
    if ledger_dir is not None and not ledger_dir.is_dir():
        raise UserError(f"there is no folder {ledger_dir} with ledger rows")
    return [join_row(table, row, ledger_dir, seeds=seeds) for row in table.rows]


def join_row(
    table: Table, row: TableRow, ledger_dir: Path | None, *, seeds: int | None, extra: tuple[str, ...] = ()
) -> Outcome:
    """What came out of one row; `extra`: overrides laid over the row's."""
    runs = runs_of(table, row, seeds=seeds, extra=extra, ledger=ledger_dir)
    paths = [row_path(ledger_dir or r.config.log.ledger_dir, r.run_id) for r in runs]
    rows = [read_row(path) for path in paths if path.exists()]
    state = "pending" if row.tuned and not runs else state_of(runs, rows)
    cells = []
    for column in table.columns:
        values = [value_of(r, column) for r in rows if r["status"] == "done"]
        values += [computed(row, column)] if row.overrides is None else []
        values = [v for v in values if v is not None]
        ours, printed = summary(values, column), row.printed.get(column.name)
        word = verdict(ours, printed, digits=column.digits)
        if row.settings and ours is not None:
            word = "as printed" if is_as_printed(ours.mean, printed) else "differs"
        if word == "pending" and state != "done":
            word = state
        if any(r["status"] == "diverged" for r in rows):
            word = "diverged"
        cells.append(Cell(column, ours, printed, word))
    return Outcome(row, tuple(runs), tuple(rows), state, tuple(cells))


@dataclass(frozen=True)
class JoinedTable:
    """A table with what came out of it, or why it cannot be planned."""

    table: Table
    outcomes: list[Outcome]
    problem: str = ""

    @property
    def runs(self) -> set[str]:
        """Run ids wanted."""
        return {r.run_id for o in self.outcomes for r in o.runs}

    @property
    def rows(self) -> dict[str, Row]:
        """Ledger rows by run id."""
        return {row["run_id"]: row for o in self.outcomes for row in o.ledger}


def join_tables(names: list[str], ledger_dir: Path | None = None) -> list[JoinedTable]:
    """The tables joined with the ledger; one that does not compose is reported as such instead of ending it all."""
    if ledger_dir is not None and not ledger_dir.is_dir():
        raise UserError(f"there is no folder {ledger_dir} with ledger rows")
    parts = []
    every = names or sorted((n for n in table_names() if n != "demo"), key=place)
    for name in tqdm(every, desc="tables", leave=False, disable=None):
        table = load_table(name)
        try:
            parts.append(JoinedTable(table, join_table(table, ledger_dir)))
        except UserError as error:
            if names:
                raise
            print(f"{name}: {error}", file=sys.stderr)
            printed = replace(table, rows=tuple(replace(row, overrides=None) for row in table.rows))
            parts.append(JoinedTable(table, join_table(printed, ledger_dir), str(error)))
    return parts


def place(name: str) -> tuple[int, str]:
    """Tables before figures, GSAM before Eigen-SAM, searches last."""
    kinds = ("table", "fig", "eigen", "study", "search")
    return next((i for i, kind in enumerate(kinds) if name.startswith(kind)), len(kinds)), name
