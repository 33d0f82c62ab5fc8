"""Say what a table costs: images, EFLOP, GPU-hours, days and money per row, from speeds measured on the hardware.

  sam-repro estimate table1 --gpu h100 --gpus 8 --price 2.5
  sam-repro estimate table1 --tflops 200               # no measurement: assume 200 TFLOP/s sustained per GPU
  sam-repro estimate demo --gpu cpu --calibrate        # first measure this machine for a minute

The speed of a run is that of its step or of its loader, whichever is lower, from results/benchmarks/. With --missing, a
row whose other seeds are finished on this hardware takes their hours. If nothing was measured, the hours stay empty.

FLOP = images x FLOP of a forward pass x 3 (the backward pass is twice the forward) x passes of the method. Each row
shows these numbers. Compiling, evaluation and checkpoints are not counted. GB is the memory per GPU, first with the
fewest images per pass, then with the fastest number (train.chunk). --memory 24GB also shows how many images per pass a
run takes on such a card. The column "actual h" has the hours of finished runs, with their number in brackets.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from sam_repro.cli.arguments import positive, positive_number
from sam_repro.config.memory import memory_bytes
from sam_repro.paper.estimate import ALL, HEADER, cost_of, line_of, memory_cells, own_hours, summary
from sam_repro.paper.ledger_join import join_table
from sam_repro.paper.measured_speeds import (
    known_hardware,
    load_rates,
)
from sam_repro.paper.memory import load_passes
from sam_repro.paper.spec import load_table


def add_arguments(parser: ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("tables", nargs="+", metavar="table", help="name in results/paper/, or a path to a .yaml")
    parser.add_argument("--gpu", default="h100", help="hardware whose speeds to take: h100, cpu, ... (default: h100)")
    parser.add_argument("--gpus", type=positive, default=8, metavar="N", help="GPUs at work together (default: 8)")
    parser.add_argument("--price", type=positive_number, metavar="X", help="price of a GPU-hour, in any currency")
    parser.add_argument("--seeds", type=positive, metavar="N", help="seeds per row, instead of what the table asks for")
    parser.add_argument("--missing", action="store_true", help="count only the runs that the ledger lacks")
    parser.add_argument(
        "--tflops", type=positive_number, metavar="X", help="assume this sustained speed per GPU where none is known"
    )
    parser.add_argument("--memory", metavar="GB", help="of a card, such as 24GB: also print its images per pass")
    parser.add_argument("--calibrate", action="store_true", help="measure the models and methods of the tables first")
    parser.add_argument("--ledger", type=Path, metavar="DIR", help="folder of ledger rows (default: the tables' own)")


def run(args: Namespace) -> None:
    """Print the estimate."""
    tables = [load_table(name) for name in args.tables]
    if args.calibrate:
        from sam_repro.runner.calibrate import calibrate

        calibrate(tables, args.gpu)
    card = None if args.memory is None else memory_bytes(args.memory, "--memory")
    entries, passes = load_rates(args.gpu), load_passes(args.gpu)
    header = f"{HEADER} {'per pass':>8}  speed" if card else f"{HEADER}  speed"
    total, counted = [], set()
    width = max(len(ALL), *(len(row.id) for table in tables for row in table.rows))
    for table in tables:
        print(f"{table.title}")
        print(f"  {'row':<{width}} {header}")
        for o in join_table(table, args.ledger, seeds=args.seeds):
            done = {row["run_id"] for row in o.ledger}
            runs = [r for r in o.runs if r.run_id not in counted and not (args.missing and r.run_id in done)]
            counted |= {r.run_id for r in runs}
            own = own_hours(o.ledger, args.gpu) if args.missing else ()
            costs = [cost_of(r, entries, args.tflops, own=own) for r in runs]
            total += costs
            memory = memory_cells(o, passes, args.gpus, card)
            print(f"  {o.row.id:<{width}} {line_of(o, costs, args.gpus, args.price, memory)}")
        print()
    print(summary(total, width, args.gpus, args.price))
    if any(cost.hours is not None for cost in total):
        print(f"  GPU-hours of {args.gpu}; days with {args.gpus} of them at work")
    if any(cost.hours is None for cost in total):
        some = " for some rows" if entries else ""
        print(
            f"no measured speed of {args.gpu}{some} (measured: {', '.join(known_hardware())}): "
            "`sam-repro estimate ... --calibrate` on such a machine, or --tflops to assume one",
            file=sys.stderr,
        )
