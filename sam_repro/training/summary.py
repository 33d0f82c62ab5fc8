"""What a run says of itself: speeds for the log, thinned curves for the ledger, one last line for a person."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from sam_repro.optim import METRICS
from sam_repro.records.ledger import Row
from sam_repro.records.log import clock


def rates(interval: float, counted: int, left: int, batch: int, hours: float) -> dict[str, float]:
    """Speed over the last interval, time left, and processor-hours so far."""
    per_step = interval / counted
    return {
        "images_per_second": batch / per_step,
        "step_seconds": per_step,
        "eta": per_step * left,
        "hours": hours,
    }


def lag(waits: list[float]) -> dict[str, float]:
    """Which rank the others wait for in the gradient's reduction, and how long; nothing for one rank.

    Args:
        waits: mean seconds that each rank spent in a reduction. All pay for the transfer; the slowest pays no more.
    """
    if len(waits) == 1:
        return {}
    return {"slowest_rank": waits.index(min(waits)), "lag_seconds": max(waits) - min(waits)}


def curves(records: list[dict[str, Any]], most: int = 200) -> dict[str, Any]:
    """The log thinned to at most `most` training points, the last among them; all evaluations."""
    training = [r for r in records if "eval" not in r and "sharpness" not in r]
    stride = max(1, -(-len(training) // most))
    kept = training[(len(training) - 1) % stride :: stride]
    keys = ("step", *METRICS, "lr", "rho", "step_seconds")
    evals = [{k: r[k] for k in ("step", "eval", "correct", "total")} for r in records if "eval" in r]
    measured = [{"step": r["step"], **r["sharpness"]} for r in records if "sharpness" in r]
    return {"train": {k: [r[k] for r in kept] for k in keys}, "eval": evals} | (
        {"sharpness": measured} if measured else {}
    )


def report(row: Row, path: Path) -> str:
    """The last line a person reads."""
    scores = ", ".join(f"{s} {100 * c['correct'] / c['total']:.2f} %" for s, c in row["evals"].items())
    spent = f"{clock(3600 * row['hours'])} of processor time"  # of all ranks together, start-up not counted
    return f"{row['run_id']} {row['status']}: {scores or 'no evaluation'}, {spent}; {path}"


def sharpness_of(row: Row) -> list[str]:
    """A paragraph on the curvature that was measured at the end, or nothing."""
    s = row.get("sharpness", {})
    if "lambda_max" not in s:
        return []
    said = (
        f"Top eigenvalue of the Hessian {s['lambda_max']:.4g} (relative residual {s['residual']:.0e}); surrogate gap h "
    )
    said += f"{s['surrogate_gap']:.4g} at rho {s['rho']:.3g}; both of the training loss, on {s['images']} images."
    return [said, ""]


def model_card(row: Row) -> str:
    """What somebody who finds the weights needs: how they were made, what they score, how to load and repeat them."""
    model, data = row["config"]["model"], row["config"]["data"]
    kwargs = {k: v for k, v in model["kwargs"].items() if k not in ("weight_init",)}
    scores = [f"| {name} | {c['correct']:,} / {c['total']:,} | {100 * c['correct'] / c['total']:.2f} % |"
              for name, c in row["evals"].items()]  # fmt: skip
    lines = [
        f"# {row['run_id']}",
        "",
        f"{model['name']} trained on {data['name']} with {row['config']['optim']['name']}, seed {row['seed']}, "
        f"{row['step']:,} steps of {row['config']['recipe']['batch_size']} images, groups of m = {row['m']}.",
        "",
        "| split | correct | top-1 |",
        "|---|---|---|",
        *scores,
        "",
        *sharpness_of(row),
        f"Commit {row['commit'][:12]}{' with uncommitted changes' if row['dirty'] else ''}, {row['world']} x "
        f"{row['hardware']}, {row['dtype']}, {row['hours']:.3f} processor hours, torch {row['versions'].get('torch')}, "
        f"timm {row['versions'].get('timm')}, data {row['manifest']}, finished {row['finished']}.",
        "",
        "Weights: `model.safetensors`, under timm's own names,",
        "",
        f"    timm.create_model({model['timm']!r}, num_classes={data['num_classes']}, ...)  # {kwargs}",
        "",
        f"for RGB images of {data['image_size']} px, normalised with mean {data['mean']} and std {data['std']}. Again:",
        "",
        f"    python train.py {shlex.join(row['overrides'])}",
        "",
        "Known departures from the papers: docs/DEVIATIONS.md of sam-repro.",
    ]
    return "\n".join(lines) + "\n"
