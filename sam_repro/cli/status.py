"""Count the runs of tables by state: waiting, running, stopped, done, diverged, failed. A named table lists them.

sam-repro status                                   # a line per table, and runs that run, stopped or failed
sam-repro status table1                            # every run of it, with step, loss, time left or last error
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path

from sam_repro.paper.ledger_join import join_tables, search_first
from sam_repro.runner.status import STATES, counts_of, runs_of_part, state_of


def add_arguments(parser: ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "tables", nargs="*", metavar="table", help="names in results/paper/ (default: all but the demo)"
    )
    parser.add_argument("--ledger", type=Path, metavar="DIR", help="folder of ledger rows (default: the tables' own)")
    parser.add_argument("--json", action="store_true", help="one JSON object, for other programs")


def run(args: Namespace) -> None:
    """Print one line per table, then one per run."""
    parts = join_tables(args.tables, args.ledger)
    states = {r.run_id: state_of(r, part.rows.get(r.run_id)) for part in parts for r in runs_of_part(part)}
    if args.json:
        tables = {part.table.name: counts_of(part, states) for part in parts}
        print(json.dumps(tables | ({"runs": states} if args.tables else {}), indent=1))
        return
    print(f"{'table':<18} " + " ".join(f"{state:>8}" for state in STATES) + f" {'hours':>8}")
    for part in parts:
        n = counts_of(part, states)
        print(
            f"{part.table.name:<18} "
            + " ".join(f"{n[state]:>8}" for state in STATES)
            + f" {n['hours']:>8.3g}"
            + f"  {part.problem or search_first([part.table], ledger=args.ledger)}".rstrip()
        )
    for name, (state, detail) in states.items():
        if args.tables or state in ("failed", "running", "stopped"):
            print(f"  {name}: {state}{detail and ' ' + detail}")
