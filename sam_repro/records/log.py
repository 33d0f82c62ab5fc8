"""Reading `log.jsonl`, the truth about a run's training; the console and W&B are views of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]
LONGEST = 2**20  # bytes of a line; a longer one is damaged
BLOCK = 2**16  # bytes that are read at once from the end


def finite(value: Any) -> Any:
    """None for a NaN or an infinity, the value itself otherwise."""
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def metrics_of(record: Record) -> dict[str, Any]:
    """A log record as W&B metrics: accuracies in % under the name of their set, no nulls, and |lambda_max|.

    The eigenvalue of largest size may be negative, and W&B can neither sort nor draw by size.
    """
    if "eval" in record:
        return {f"{record['eval']}/accuracy": 100 * record["correct"] / record["total"]}
    if "sharpness" in record:
        found = {f"sharpness/{k}": v for k, v in record["sharpness"].items() if isinstance(v, (int, float))}
        largest = found.get("sharpness/lambda_max")
        return found if largest is None else found | {"sharpness/lambda_abs": abs(largest)}
    return {k: v for k, v in record.items() if k != "step" and v is not None}


def clock(seconds: float) -> str:
    """h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def read_log(path: Path) -> list[Record]:
    """All whole records of a log, as stream_log reads them."""
    return [record for _, record in stream_log(path)]


def stream_log(path: Path) -> Iterator[tuple[int, Record]]:
    """(place in the file, record) for every whole record of a log, one after the other.

    A line that a crash cut off, or that is damaged, is left out; a damaged number in a line is None.
    """
    if not path.exists():
        return
    with open(path, "rb") as file:
        place = 0
        while line := file.readline(LONGEST):
            record = parse(line)
            if record is not None:
                yield place, record
            place += len(line)


def stream_backwards(path: Path) -> Iterator[Record]:
    """The same records, the last one first: what a long log says at its end costs no reading of the rest."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        end, head = file.seek(0, os.SEEK_END), b""  # head: of a line whose other part is in the block before
        while end:
            start = max(0, end - BLOCK)
            file.seek(start)
            head, *lines = (file.read(end - start) + head).split(b"\n")
            yield from filter(None, map(parse, reversed(lines)))
            head = head if len(head) <= LONGEST else b"!"  # damaged: what is before it may not make it whole
            end = start
        yield from filter(None, [parse(head)])


def parse(line: bytes) -> Record | None:
    """The record in a line of a log, as its readers rely on it; None where it is none.

    "step" is a whole number. An evaluation has a name and whole counts, a measurement is a dictionary of numbers and
    lists of numbers; whatever else is in a record is a finite number or None.
    """
    try:
        record = json.loads(line.decode(errors="replace"))
        if not isinstance(record, dict) or not is_count(record.get("step")):
            return None
        if "eval" in record:
            counts = is_count(record.get("correct")) and is_count(record.get("total"))
            whole = counts and isinstance(record["eval"], str) and 0 < record["total"] >= record["correct"]
            return record if whole else None
        if "sharpness" in record:
            whole = isinstance(record["sharpness"], dict)
            return record | {"sharpness": {k: numbers(v) for k, v in record["sharpness"].items()}} if whole else None
        return {k: numbers(v) for k, v in record.items()}
    except (ValueError, RecursionError):
        return None


def is_count(value: Any) -> bool:
    """Whether it is a whole number, 0 or greater, of those that 64 bits hold."""
    return type(value) is int and 0 <= value < 2**63


def numbers(value: Any) -> Any:
    """A finite number, a list of them and of such lists, or None."""
    if isinstance(value, list):
        return [numbers(v) for v in value]
    return value if type(value) in (int, float) and abs(value) < 1e300 else None
