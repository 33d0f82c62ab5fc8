"""Draw the figure of a table as SVG and PNG: curves, sweeps or dots, with the paper's own values.

  sam-repro figures demo                               # runs/demo/figures/demo.svg and .png
  sam-repro figures fig7 --output /tmp/figures

Lines and dots are means over seeds; bands and bars are 95 % t-intervals. A paper's printed value is a hollow diamond.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from sam_repro.paper.ledger_join import join_table
from sam_repro.paper.outcomes import Outcome
from sam_repro.paper.render.figures import draw, has_number
from sam_repro.paper.render.style import save
from sam_repro.paper.spec import load_table


def add_arguments(parser: ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("table", help="name in results/paper/, or a path to a .yaml")
    parser.add_argument("--ledger", type=Path, metavar="DIR", help="folder of ledger rows (default: the table's own)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder (default: figures/ next to the ledger)")


def run(args: Namespace) -> None:
    """Draw, and print where the files are."""
    table = load_table(args.table)
    outcomes = join_table(table, args.ledger)
    folder = args.output or beside_ledger(outcomes, args.ledger)
    for path in save(draw(table, outcomes), folder / table.name):
        print(path)
    if any(o.runs for o in outcomes) and not any(o.ledger for o in outcomes):
        shown = "the paper's values only" if any(map(has_number, outcomes)) else "an empty frame"
        print(f"no run of {table.name} is in the ledger yet: the figure shows {shown}", file=sys.stderr)


def beside_ledger(outcomes: list[Outcome], ledger_dir: Path | None) -> Path:
    """figures/ in the folder that holds the ledger's."""
    runs = [r for o in outcomes for r in o.runs]
    ledger_dir = ledger_dir or Path(runs[0].config.log.ledger_dir if runs else "results/runs")
    return ledger_dir.parent / "figures"
