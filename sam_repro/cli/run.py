"""Train the runs of tables or plans that are missing in the ledger, one after the other or several per GPU.

  sam-repro run demo
  sam-repro run demo --only '*/gsam' --seeds 1 recipe.epochs=5
  sam-repro run study_noise --only '*label_noise=0.4' --only '*-s[1-3]-*'     # both must match
  sam-repro run demo --budget 9m                       # stop and save after nine minutes; the same command goes on
  sam-repro run study_cifar study_m --gpus 2 --per-gpu 3 --budget 9m
  sam-repro run plan.tsv                               # the lines of `sam-repro plan`

Tables come in the order given. In each table, every row gets its first seed before any row gets its second. A finished
run is not repeated, and an interrupted run resumes. A diverged run is a result: the queue goes on, and the exit code is
3. Ctrl-C, SIGTERM, SIGUSR1, SIGUSR2 and SIGHUP save the runs at work and end the queue; the exit code is 128 + signal.
With --gpus or --per-gpu, worker processes share the runs; their logs are in <runs_dir>/pool/. If a run fails or kills
its worker, the others go on, and the exit code is 1.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from sam_repro.cli.arguments import duration, positive, tables_and_overrides
from sam_repro.errors import plural
from sam_repro.paper.ledger_join import search_first
from sam_repro.paper.runs import Run
from sam_repro.paper.spec import load_table
from sam_repro.runner.plan import finished, wanted
from sam_repro.runner.scheduler import Scheduler, gpu_slots, say


def add_arguments(parser: ArgumentParser) -> None:
    """The command's arguments."""
    what = "tables (names, or paths to .yaml), plans (.tsv), and overrides laid over every row's own (key=value)"
    parser.add_argument("words", nargs="+", metavar="table | plan.tsv | key=value", help=what)
    parser.add_argument("--seeds", type=positive, metavar="N", help="seeds per row, instead of what the table asks for")
    parser.add_argument("--limit", type=positive, metavar="N", help="start at most N runs")
    only = "only rows whose id, or runs whose run id, match (* is anything); given twice, both must"
    parser.add_argument("--only", metavar="PATTERN", action="append", default=[], help=only)
    parser.add_argument(
        "--budget", type=duration, metavar="9m", help="save and stop after this time: 90s, 9m, 2h; exit code 0"
    )
    parser.add_argument("--gpus", type=positive, metavar="N", help="share the runs among this many GPUs")
    parser.add_argument(
        "--per-gpu", type=positive, metavar="K", help="this many runs at the same time on each GPU (default: 1)"
    )
    parser.add_argument("--ledger", type=Path, metavar="DIR", help="write the rows here instead of the table's folder")


def run(args: Namespace) -> int:
    """Run what is missing; returns the exit code."""
    names, extra = tables_and_overrides(args.words, "run")

    def plan() -> list[Run]:
        return list(wanted(names, extra, seeds=args.seeds, only=args.only, ledger=args.ledger).values())

    runs = plan()
    to_go = sum(not finished(r, args.ledger) for r in runs)
    say(f"{len(runs) - to_go} of {plural(len(runs), 'run')} in the ledger, {to_go} to go")
    tables = [] if to_go else [load_table(name) for name in names if not name.endswith(".tsv")]
    if sentence := search_first(tables, extra, args.ledger):
        say(sentence)
    slots = gpu_slots(args.gpus or 1, args.per_gpu or 1) if args.gpus or args.per_gpu else None
    return Scheduler(plan, slots, ledger_dir=args.ledger, limit=args.limit, budget=args.budget).work()
