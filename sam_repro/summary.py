"""What a run says of itself: speeds for the log, thinned curves for the ledger, one last line for a person."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sam_repro.ledger import Row
from sam_repro.log import clock
from sam_repro.optim import METRICS


def rates(interval: float, counted: int, left: int, batch: int, seconds: float, world: int) -> dict[str, float]:
    """Speed over the last interval, time left, and processor-hours so far."""
    per_step = interval / counted
    return {
        "images_per_second": batch / per_step,
        "step_seconds": per_step,
        "eta": per_step * left,
        "hours": seconds * world / 3600,
    }


def curves(records: list[dict[str, Any]], most: int = 200) -> dict[str, Any]:
    """The log thinned to at most `most` training points; all evaluations."""
    training = [r for r in records if "eval" not in r]
    kept = training[:: max(1, -(-len(training) // most))]
    keys = ("step", *METRICS, "lr", "rho", "step_seconds")
    evals = [{k: r[k] for k in ("step", "eval", "correct", "total")} for r in records if "eval" in r]
    return {"train": {k: [r[k] for r in kept] for k in keys}, "eval": evals}


def report(row: Row, path: Path) -> str:
    """The last line a person reads."""
    scores = ", ".join(f"{s} {100 * c['correct'] / c['total']:.2f} %" for s, c in row["evals"].items())
    return f"{row['run_id']} {row['status']}: {scores or 'no evaluation'} after {clock(3600 * row['hours'])}; {path}"
