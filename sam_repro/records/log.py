"""Reading `log.jsonl`, the truth about a run's training; the console and W&B are views of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def finite(value: Any) -> Any:
    """None for a NaN or an infinity, the value itself otherwise."""
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def metrics_of(record: Record) -> dict[str, Any]:
    """A log record as W&B metrics: accuracies in % under the name of their set, no nulls."""
    if "eval" in record:
        return {f"{record['eval']}/accuracy": 100 * record["correct"] / record["total"]}
    if "sharpness" in record:
        return {f"sharpness/{k}": v for k, v in record["sharpness"].items() if isinstance(v, (int, float))}
    return {k: v for k, v in record.items() if k != "step" and v is not None}


def clock(seconds: float) -> str:
    """h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def read_log(path: Path) -> list[Record]:
    """All whole records of a log; a line cut off by a crash is left out."""
    records = []
    if path.exists():
        for line in path.read_text(errors="replace").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
    return records
