"""List the runs of tables, one per line: the run id, a tab, and the overrides.

  sam-repro plan table1                                # every run
  sam-repro plan table1 table5 --missing > plan.tsv    # what is missing; shared runs once
  sam-repro plan table1 'data.eval_sets=[v1,real,v2,r,c]' data.eval_root=/data/testsets    # in every line

Each line stands for `python train.py <overrides>`. A SLURM array with one task per line trains the table.
"""

from __future__ import annotations

import shlex
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from sam_repro.cli.arguments import positive, tables_and_overrides
from sam_repro.errors import plural
from sam_repro.paper.ledger_join import search_first, unique_runs
from sam_repro.paper.spec import load_table
from sam_repro.runner.plan import finished


def add_arguments(parser: ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "words",
        nargs="+",
        metavar="table | key=value",
        help="tables (names in results/paper/, or paths to .yaml), and overrides laid over every row's own",
    )
    parser.add_argument("--missing", action="store_true", help="leave out the runs that the ledger has")
    parser.add_argument("--seeds", type=positive, metavar="N", help="seeds per row, instead of what the table asks for")
    parser.add_argument("--ledger", type=Path, metavar="DIR", help="folder of ledger rows (default: the table's own)")


def run(args: Namespace) -> None:
    """Print the plan on stdout and how many lines it has on stderr."""
    names, extra = tables_and_overrides(args.words, "plan")
    tables = [load_table(name) for name in names]
    runs = unique_runs(tables, seeds=args.seeds, extra=extra, ledger=args.ledger).values()
    shown = [r for r in runs if not (args.missing and finished(r, args.ledger))]
    for r in shown:
        print(f"{r.run_id}\t{shlex.join(r.overrides)}")
    print(f"{len(shown)} of {plural(len(runs), 'run')}", file=sys.stderr)
    if sentence := search_first(tables, extra, args.ledger):
        print(sentence, file=sys.stderr)
