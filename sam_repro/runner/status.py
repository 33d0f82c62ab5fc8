"""The state of a run: waiting, running, stopped, done, diverged or failed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from sam_repro.paper.ledger_join import JoinedTable
from sam_repro.paper.outcomes import is_running
from sam_repro.paper.runs import Run
from sam_repro.records import failure
from sam_repro.records.ledger import Row
from sam_repro.records.log import clock, stream_backwards

STATES = ("done", "diverged", "failed", "running", "stopped", "waiting")


def runs_of_part(part: JoinedTable) -> list[Run]:
    """The runs that a table wants, each once."""
    return list({r.run_id: r for o in part.outcomes for r in o.runs}.values())


def counts_of(part: JoinedTable, states: dict[str, tuple[str, str]]) -> dict[str, Any]:
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
    end = next((record for record in stream_backwards(run_dir / "log.jsonl") if "loss" in record), None)
    if end is None:
        return ""
    loss = "not finite" if end.get("loss") is None else f"{end['loss']:.4f}"
    return f"at step {end['step']}, loss {loss}, {clock(end.get('eta') or 0)} left"
