"""Where the tables stand, and every run of those that are named: waiting, running, stopped, done, diverged, failed.

sam-repro status                                     # a line a table, and the runs at work or failed
sam-repro status table1                              # and every run of it, with step, loss, time left or last error
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from collections import Counter
from pathlib import Path
from typing import Any

from sam_repro import failure
from sam_repro.ledger import Row
from sam_repro.log import clock, read_log
from sam_repro.paper.outcome import is_running
from sam_repro.paper.report import Part, parts_of
from sam_repro.paper.runs import Run

STATES = ("done", "diverged", "failed", "running", "stopped", "waiting")


def add_arguments(parser: ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "tables", nargs="*", metavar="table", help="names in results/paper/ (default: all but the demo)"
    )
    parser.add_argument("--ledger", type=Path, metavar="DIR", help="folder of ledger rows (default: the tables' own)")
    parser.add_argument("--json", action="store_true", help="one JSON object, for other programs")


def run(args: Namespace) -> None:
    """Print one line a table, then one a run."""
    parts = parts_of(args.tables, args.ledger)
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
            + (f"  {part.problem}" if part.problem else "")
        )
    for name, (state, detail) in states.items():
        if args.tables or state in ("failed", "running", "stopped"):
            print(f"  {name}: {state}{detail and ' ' + detail}")


def runs_of_part(part: Part) -> list[Run]:
    """The runs that a table wants, each once."""
    return list({r.run_id: r for o in part.found for r in o.runs}.values())


def counts_of(part: Part, states: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """How many runs of a table are in which state, and the hours spent."""
    counts = Counter(states[r.run_id][0] for r in runs_of_part(part))
    hours = sum(row.get("hours", 0.0) for row in part.rows.values())
    return {state: counts[state] for state in STATES} | {"hours": hours}


def state_of(r: Run, row: Row | None) -> tuple[str, str]:
    """One of STATES, and what there is to say: scores, how far it is, or the last error."""
    if row is not None:
        return row["status"], scores_of(row)
    run_dir = Path(r.config.log.runs_dir) / r.run_id
    if is_running(r):
        return "running", progress_of(run_dir)
    error = failure.read(run_dir)
    if error:
        return "failed", error
    progress = progress_of(run_dir)
    return ("stopped", progress) if progress else ("waiting", "")


def scores_of(row: Row) -> str:
    """'val 78.12 %', or at which step it diverged."""
    if row["status"] != "done":
        return f"at step {row['step']}"
    return ", ".join(f"{name} {100 * c['correct'] / c['total']:.2f} %" for name, c in row["evals"].items())


def progress_of(run_dir: Path) -> str:
    """'at step 200, loss 1.2, 0:10:00 left', or the empty string for a run without a step."""
    records = [x for x in read_log(run_dir / "log.jsonl") if "loss" in x]
    if not records:
        return ""
    end = records[-1]
    loss = "not finite" if end.get("loss") is None else f"{end['loss']:.4f}"
    return f"at step {end['step']}, loss {loss}, {clock(end.get('eta') or 0)} left"
