"""Which runs tables and plan files want, which of them are finished, and which can never start."""

from __future__ import annotations

import fnmatch
import shlex
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from sam_repro.errors import UserError
from sam_repro.paper.ledger_join import unique_runs
from sam_repro.paper.runs import Run, make_run
from sam_repro.paper.spec import Table, load_table
from sam_repro.records.ledger import read_row, row_path


def wanted(
    names: Sequence[str],
    extra: Sequence[str] = (),
    *,
    seeds: int | None = None,
    only: Sequence[str] = (),
    ledger: Path | None = None,
) -> dict[str, Run]:
    """The runs of tables and of plan files (.tsv), by run id, in the order in which to start them.

    Args:
        extra: overrides laid over every run's own.
        seeds: per row, instead of what the table asks for.
        only: patterns of row ids or run ids; a run that one of them does not match is left out.
        ledger: folder of ledger rows, for the winners of sweeps.

    Raises:
        UserError: no such table or plan, overrides that do not compose, a pattern that matches nothing.
    """
    runs: dict[str, Run] = {}
    for name in names:
        if name.endswith(".tsv"):
            runs |= planned(Path(name), extra)
        else:
            runs |= of_table(load_table(name), extra, seeds, only, ledger)
    if not runs and only:
        raise UserError(f"--only {shlex.join(only)} matches no row of {', '.join(names)}")
    return runs


def of_table(
    table: Table, extra: Sequence[str], seeds: int | None, only: Sequence[str], ledger: Path | None
) -> dict[str, Run]:
    """The runs of one table that every pattern of `only` leaves."""
    runs = unique_runs([table], seeds=seeds, extra=extra, ledger=ledger)
    for pattern in only:
        rows = replace(table, rows=tuple(row for row in table.rows if fnmatch.fnmatch(row.id, pattern)))
        of_rows = unique_runs([rows], seeds=seeds, extra=extra, ledger=ledger)
        runs = {k: r for k, r in runs.items() if k in of_rows or fnmatch.fnmatch(k, pattern)}
    return runs


@cache
def read_plan(path: Path) -> tuple[tuple[str, ...], ...]:
    """The overrides of every line of a plan. Raises UserError with the number of a line that cannot be read."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a plan of `sam-repro plan`: {error}") from None
    plan = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            plan.append(tuple(shlex.split(line.split("\t", 1)[1])))
        except (IndexError, ValueError) as error:
            why = "it has no tab" if isinstance(error, IndexError) else str(error).lower()
            raise UserError(f"{path}, line {number}, is not a line of `sam-repro plan`: {why}") from None
    return tuple(plan)


def planned(path: Path, extra: Sequence[str]) -> dict[str, Run]:
    """The runs of a file that `sam-repro plan` wrote, each with the run of it whose weights it starts from."""
    runs = {r.run_id: r for r in (make_run((*line, *extra)) for line in read_plan(path))}
    return {name: replace(r, after=runs.get(Path(r.config.init or "").name)) for name, r in runs.items()}


def finished(r: Run, ledger_dir: Path | None = None) -> bool:
    """Whether the ledger has the row of a run; it lies where the run's configuration says, unless given."""
    return row_path(ledger_dir or r.config.log.ledger_dir, r.run_id).exists()


def lost_start(r: Run, ledger_dir: Path | None = None) -> str:
    """Why a run has no weights to start from: the run that was to make them is over, and diverged. Else ''."""
    if r.after is None or not finished(r.after, ledger_dir):
        return ""
    row = read_row(row_path(ledger_dir or r.after.config.log.ledger_dir, r.after.run_id))
    return "" if row["status"] == "done" else f"{r.after.run_id}, from which it starts, {row['status']}"
