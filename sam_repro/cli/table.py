"""Print our numbers and the paper's: mean, 95 % t-interval over seeds, difference, verdict, provenance.

  sam-repro table demo
  sam-repro table table1 --format html --output table1.html
  sam-repro table demo --format brief                  # the rows alone
  sam-repro table table1 --format csv                  # one line per number, for other programs

Verdicts: pending (no run yet), running, one seed, within / above / below (our interval, widened by the rounding of
the printed number, against that number), diverged, not in our sources.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from sam_repro.cli.arguments import positive
from sam_repro.errors import UserError
from sam_repro.paper.ledger_join import join_table
from sam_repro.paper.render.tables import FORMATS, render
from sam_repro.paper.spec import load_table


def add_arguments(parser: ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("table", help="name in results/paper/, or a path to a .yaml")
    parser.add_argument("--format", choices=sorted(FORMATS), default="md")
    parser.add_argument("--ledger", type=Path, metavar="DIR", help="folder of ledger rows (default: the table's own)")
    parser.add_argument(
        "--seeds", type=positive, metavar="N", help="look at N seeds instead of what the table asks for"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write here instead of to the terminal")


def run(args: Namespace) -> None:
    """Print or write the table."""
    table = load_table(args.table)
    text = render(table, join_table(table, args.ledger, seeds=args.seeds), args.format)
    if args.output is None:
        print(text, end="")
        return
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text)
    except OSError as error:
        raise UserError(f"cannot write {args.output}: {error}") from error
    print(args.output, file=sys.stderr)
