"""Compute every published number from the ledger again, and compare.

  sam-repro check                                      # names what is stale or edited by hand; exit code 1
  sam-repro check --write                              # write the generated files and blocks anew

It checks that every ledger row is whole and its counts are possible, that Table 4 agrees with the configurations, and
that rows cite the deviations of their runs. It checks that results/README.md and results/index.html are what `sam-repro
report` writes, and that the blocks

    <!-- sam-repro table demo --format md -->
    ...
    <!-- sam-repro end -->

in README.md, docs/ and benchmarks/ are what that command prints. Do not edit such a block by hand.
The tables of our own benchmarks are checked by `python benchmarks/report.py --check`.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from sam_repro.errors import UserError
from sam_repro.paper.check import generated, rows_problems, settings_problems, warnings_problems


def add_arguments(parser: ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("--write", action="store_true", help="write generated files and blocks instead of complaining")
    parser.add_argument("--root", type=Path, default=Path("."), metavar="DIR", help="checkout (default: here)")


def run(args: Namespace) -> int:
    """Print what is wrong, one line each; returns 1 if anything is."""
    if not (args.root / "results").is_dir():
        raise UserError(f"{args.root} is not a checkout, for it has no folder results/: add --root CHECKOUT")
    problems = [*rows_problems(args.root / "results" / "runs"), *settings_problems(), *warnings_problems()]
    for path, text in generated(args.root):
        if path.is_file() and path.read_text() == text:
            continue
        if args.write:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            print(f"wrote {path}")
        else:
            problems.append(f"{path} is stale or was edited by hand; `sam-repro check --write` makes it anew")
    for problem in problems:
        print(problem)
    if not problems and not args.write:
        print("every number is the ledger's")
    return 1 if problems else 0
