"""What the measurements of a run say of its training: drawn from its log, without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sam_repro.errors import UserError
from sam_repro.records.log import read_log


def measurements(run: Path) -> list[dict[str, Any]]:
    """The run's sharpness records, oldest first: {"step": ..., and what sharpness.Monitor measures}.

    Raises:
        UserError: where there are fewer than two.
    """
    found = [{"step": r["step"]} | r["sharpness"] for r in read_log(run / "log.jsonl") if "sharpness" in r]
    if len(found) < 2:
        raise UserError(
            f"{run} has {len(found)} measurements over training, and this needs two: train with sharpness.every=100"
        )
    return found


def decay_by_age(found: list[dict[str, Any]]) -> dict[int, dict[str, list[float]]]:
    """{age in steps: {"step", "cosine", "quality"}}: what was left of eigenvectors of that age, over training."""
    ages: dict[int, dict[str, list[float]]] = {}
    for record in found:
        for age, cosine, quality in record["decay"]:
            entry = ages.setdefault(int(age), {"step": [], "cosine": [], "quality": []})
            entry["step"].append(record["step"])
            entry["cosine"].append(cosine)
            entry["quality"].append(quality)
    return dict(sorted(ages.items()))
