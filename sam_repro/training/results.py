"""What a run leaves when it ends: the ledger row, and for a trained model its weights and model card."""

from __future__ import annotations

import time
from array import array
from pathlib import Path
from typing import Any

from sam_repro.config.compose import to_dict
from sam_repro.config.run_id import config_hash
from sam_repro.config.schema import Config
from sam_repro.errors import DIVERGED
from sam_repro.optim import METRICS
from sam_repro.records import ledger
from sam_repro.records.files import write_atomic
from sam_repro.records.ledger import Row
from sam_repro.records.log import clock, parse, stream_log
from sam_repro.training import checkpoint
from sam_repro.training.data import Data
from sam_repro.training.job import Job
from sam_repro.training.memory import peak_bytes
from sam_repro.training.model_card import model_card
from sam_repro.training.progress import Progress
from sam_repro.training.run import Run, hardware

CURVE_POINTS = 200  # at most, of a curve in a row
CURVES = ("step", *METRICS, "lr", "rho", "step_seconds")


def write_results(
    cfg: Config,
    run: Run,
    data: Data,
    job: Job,
    progress: Progress,
    status: str,
    sharpness: dict[str, Any],
    overrides: list[str],
) -> Row:
    """Write the weights and the model card of a run that is done, and its ledger row; rank 0 writes.

    Args:
        status: "done" | "diverged".
        sharpness: the final measurement, or {}.
        overrides: what was typed after train.py.

    Returns:
        the row; with its curves on rank 0 only.
    """
    row: Row = {
        "run_id": run.name,
        "status": status,
        "seed": cfg.seed,
        "step": progress.step,
        "steps": data.total,
        "steps_per_epoch": data.steps_per_epoch,
        "evals": progress.counts,
        "sharpness": sharpness,
        "config": to_dict(cfg),
        "config_hash": config_hash(cfg),
        "overrides": overrides,
        "manifest": data.train.manifest,
        "backend": data.train.backend,
        "m": job.step.m,
        "images_per_pass": job.step.chunk,
        "peak_bytes": peak_bytes(run.ranks.device),
        "world": run.ranks.world,
        "hardware": hardware(run.ranks),
        "dtype": "bf16" if run.bf16 else "fp32",
        "hours": progress.hours,
        "sharing": progress.sharing,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **ledger.provenance(),
    }
    if run.ranks.main:
        row["curves"] = curves(run.dir / "log.jsonl")
        if status == "done":
            description = {"run_id": run.name, "timm": cfg.model.timm}
            row["weights_sha256"] = checkpoint.export(job.model, run.dir / "model.safetensors", description)
            write_atomic(run.dir / "model_card.md", model_card(row))
        path = ledger.write_row(cfg.log.ledger_dir, row)
        run.log.close(DIVERGED if status == "diverged" else 0, row)
        run.log.say(report(row, path))
    return row


def curves(log: Path) -> dict[str, Any]:
    """The log thinned to at most CURVE_POINTS training points, the last among them; all evaluations and measurements.

    The log is read once; of its training records only the places are kept. A value that is missing or damaged is None.
    """
    places, evals, measured = array("Q"), [], []
    for place, record in stream_log(log):
        if "eval" in record:
            evals.append({k: record[k] for k in ("step", "eval", "correct", "total")})
        elif "sharpness" in record:
            measured.append({"step": record["step"], **record["sharpness"]})
        else:
            places.append(place)
    stride = max(1, -(-len(places) // CURVE_POINTS))
    kept = []
    if places:
        with open(log, "rb") as file:
            for place in places[(len(places) - 1) % stride :: stride]:
                file.seek(place)
                kept.append(parse(file.readline()) or {})
    trained = {"train": {k: [r.get(k) for r in kept] for k in CURVES}, "eval": evals}
    return trained | ({"sharpness": measured} if measured else {})


def report(row: Row, path: Path) -> str:
    """The last line a person reads."""
    scores = ", ".join(f"{s} {100 * c['correct'] / c['total']:.2f} %" for s, c in row["evals"].items())
    spent = f"{clock(3600 * row['hours'])} of processor time"  # of all ranks together, start-up not counted
    return f"{row['run_id']} {row['status']}: {scores or 'no evaluation'}, {spent}; {path}"
