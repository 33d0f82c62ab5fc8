"""Where the tables stand: runs done, running, missing; and how far those at work have come.

sam-repro status                                     # every table
sam-repro status demo                                # and its runs at work, with step, loss and time left
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections import Counter
from pathlib import Path

from sam_repro.log import clock, read_log
from sam_repro.paper.outcome import is_running
from sam_repro.paper.report import Part, parts_of
from sam_repro.paper.runs import Run


def add_arguments(parser: ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "tables", nargs="*", metavar="table", help="names in results/paper/ (default: all but the demo)"
    )
    parser.add_argument("--ledger", type=Path, metavar="DIR", help="folder of ledger rows (default: the tables' own)")
    parser.add_argument("--json", action="store_true", help="one JSON object, for other programs")


def run(args: Namespace) -> None:
    """Print one line a table, then one a run at work or interrupted."""
    parts = parts_of(args.tables, args.ledger)
    if args.json:
        print(json.dumps({part.table.name: counts_of(part) for part in parts}, indent=1))
        return
    print(f"{'table':<18} {'done':>5} {'diverged':>8} {'running':>7} {'missing':>7} {'hours':>8}")
    for part in parts:
        n = counts_of(part)
        print(
            f"{part.table.name:<18} {n['done']:>5} {n['diverged']:>8} {n['running']:>7} {n['missing']:>7} "
            f"{n['hours']:>8.3g}" + (f"  {part.problem}" if part.problem else "")
        )
    started = {r.run_id: r for part in parts for r in runs_of_part(part) if r.run_id not in part.rows}
    for line in filter(None, map(progress_of, started.values())):
        print(line)


def runs_of_part(part: Part) -> list[Run]:
    """The runs that a table wants, each once."""
    return list({r.run_id: r for o in part.found for r in o.runs}.values())


def counts_of(part: Part) -> dict[str, float]:
    """How many runs of a table are in which state, and the hours spent."""
    runs = runs_of_part(part)
    states = Counter(row["status"] for row in part.rows.values())
    running = sum(is_running(r) for r in runs if r.run_id not in part.rows)
    return {
        "done": states["done"],
        "diverged": states["diverged"],
        "running": running,
        "missing": len(runs) - len(part.rows) - running,
        "hours": sum(row.get("hours", 0.0) for row in part.rows.values()),
    }


def progress_of(r: Run) -> str:
    """'<run id>: running, step 200, loss 1.2, 0:10:00 left', or the empty string for a run that has not begun."""
    records = [x for x in read_log(Path(r.config.log.runs_dir) / r.run_id / "log.jsonl") if "loss" in x]
    if not records:
        return ""
    end, state = records[-1], "running" if is_running(r) else "interrupted"
    loss = "not finite" if end.get("loss") is None else f"{end['loss']:.4f}"
    return f"  {r.run_id}: {state} at step {end['step']}, loss {loss}, {clock(end.get('eta') or 0)} left"
