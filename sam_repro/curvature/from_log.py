"""What the measurements of a run say about its training: drawn from its log, without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sam_repro.errors import UserError, plural
from sam_repro.records.log import stream_log


def measurements(run: Path, *keys: str) -> list[dict[str, Any]]:
    """The run's sharpness records, oldest first: {"step": ..., and what curvature.monitor.Monitor measures}.

    A record in which one of `keys` is missing or damaged is left out.

    Raises:
        UserError: where there are fewer than two.
    """
    records = ({"step": r["step"]} | r["sharpness"] for _, r in stream_log(run / "log.jsonl") if "sharpness" in r)
    whole = [record for record in records if all(is_whole(key, record.get(key)) for key in keys)]
    if len(whole) < 2:
        found = plural(len(whole), "measurement")
        raise UserError(f"{run} has {found} over training, but two are needed: train with sharpness.every=100")
    return whole


def is_whole(key: str, value: Any) -> bool:
    """Whether a value is a number, or for "decay" rows of three; the log's reader has None for a damaged number."""
    if key != "decay":
        return isinstance(value, (int, float))
    rows = value if isinstance(value, list) else [None]
    return all(isinstance(row, list) and [isinstance(x, (int, float)) for x in row] == [True] * 3 for row in rows)


def decay_by_age(records: list[dict[str, Any]]) -> dict[int, dict[str, list[float]]]:
    """{age in steps: {"step", "cosine", "quality"}}: what was left of eigenvectors of that age, over training."""
    ages: dict[int, dict[str, list[float]]] = {}
    for record in records:
        for age, cosine, quality in record["decay"]:
            entry = ages.setdefault(int(age), {"step": [], "cosine": [], "quality": []})
            entry["step"].append(record["step"])
            entry["cosine"].append(cosine)
            entry["quality"].append(quality)
    return dict(sorted(ages.items()))
