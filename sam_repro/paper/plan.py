"""List the runs of tables, one a line: run id, tab, overrides.

  sam-repro plan table1                                # every run
  sam-repro plan table1 table5 --missing > plan.tsv    # what the ledger lacks; shared runs once
  sam-repro plan table1 'data.eval_sets=[v1,real,v2,r,c]' data.eval_root=/data/testsets    # in every line

Line N is `python train.py <overrides>`, so that a SLURM array of `wc -l < plan.tsv` tasks trains the table.
"""

from __future__ import annotations

import shlex
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path

from sam_repro.errors import UserError
from sam_repro.ledger import read_row, row_path
from sam_repro.paper.runs import Run, unique_runs
from sam_repro.paper.spec import load_table


def add_arguments(parser: ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "words",
        nargs="+",
        metavar="table | key=value",
        help="tables (names in results/paper/, or paths to .yaml), and overrides laid over every row's own",
    )
    parser.add_argument("--missing", action="store_true", help="leave out the runs that the ledger has")
    parser.add_argument("--seeds", type=positive, metavar="N", help="seeds a row, instead of what the table asks for")
    parser.add_argument("--ledger", type=Path, metavar="DIR", help="folder of ledger rows (default: the table's own)")


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)


def positive_number(text: str) -> float:
    """A number greater than 0, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ArgumentTypeError(f"'{text}' is not a number greater than 0")
    return value


def run(args: Namespace) -> None:
    """Print the plan on stdout and how many lines it has on stderr."""
    names, extra = tables_and_overrides(args.words, "plan")
    runs = unique_runs(map(load_table, names), seeds=args.seeds, extra=extra, ledger=args.ledger).values()
    shown = [r for r in runs if not (args.missing and finished(r, args.ledger))]
    for r in shown:
        print(f"{r.run_id}\t{shlex.join(r.overrides)}")
    print(f"{len(shown)} of {len(runs)} runs", file=sys.stderr)


def tables_and_overrides(words: list[str], command: str) -> tuple[list[str], list[str]]:
    """(names, key=value words) of a command line. Raises UserError where no table is named."""
    names = [word for word in words if "=" not in word]
    if not names:
        raise UserError(f"no table is named; see sam-repro {command} --help")
    return names, [word for word in words if "=" in word]


def finished(r: Run, ledger_dir: Path | None = None) -> bool:
    """Whether the ledger has the row of a run; it lies where the run's configuration says, unless given."""
    return row_path(ledger_dir or r.config.log.ledger_dir, r.run_id).exists()


def lost_start(r: Run, ledger_dir: Path | None = None) -> str:
    """Why a run has no weights to start from: the run that was to make them is over, and diverged. Else ''."""
    if r.after is None or not finished(r.after, ledger_dir):
        return ""
    row = read_row(row_path(ledger_dir or r.after.config.log.ledger_dir, r.after.run_id))
    return "" if row["status"] == "done" else f"{r.after.run_id}, from which it starts, {row['status']}"
