"""Write everything as one self-contained page: claims, figures, tables, every run's curves, costs, deviations.

  sam-repro report                                     # results/index.html, from the rows in results/runs
  sam-repro report demo --output runs/demo/index.html

The page needs no network and fits a phone. The same ledger gives the same bytes.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from sam_repro.errors import UserError
from sam_repro.paper.render.report import report


def add_arguments(parser: ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "tables", nargs="*", metavar="table", help="names in results/paper/ (default: all but the demo)"
    )
    parser.add_argument("--ledger", type=Path, metavar="DIR", help="folder of ledger rows (default: the tables' own)")
    parser.add_argument(
        "--figures", type=Path, default=Path("results/figures"), metavar="DIR", help="folder of SVG files to show"
    )
    parser.add_argument("--output", type=Path, default=Path("results/index.html"), metavar="FILE")


def run(args: Namespace) -> None:
    """Write the page."""
    text = report(args.tables, args.ledger, args.figures)
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text)
    except OSError as error:
        raise UserError(f"cannot write {args.output}: {error}") from error
    print(args.output)
