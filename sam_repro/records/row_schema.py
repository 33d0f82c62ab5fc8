"""What a ledger row holds: the type and the bounds of every field that a reader relies on, and the row's seal."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from sam_repro.errors import plural
from sam_repro.records.files import sha256

Row = dict[str, Any]
LARGEST = 2**63  # of whole numbers: beyond it neither C nor most other readers of JSON can follow


class Kind(NamedTuple):
    """A kind of value: what it must be, in words, and the test for it."""

    words: str
    fits: Callable[[Any], bool]


def whole(low: int) -> Kind:
    """Whole numbers from `low` on; true and false are none."""
    return Kind(f"a whole number from {low} on", lambda v: type(v) is int and low <= v < LARGEST)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number; true and false are none."""
    return type(value) is float and math.isfinite(value) or type(value) is int and abs(value) < LARGEST


def is_name(value: Any) -> bool:
    """Whether a value can be a file's name: text without a slash or a control character."""
    return isinstance(value, str) and 0 < len(value) <= 255 and value.isprintable() and "/" not in value


TEXT = Kind("text", lambda v: isinstance(v, str))
NAME = Kind("a name without / and control characters", is_name)
YES_NO = Kind("true or false", lambda v: isinstance(v, bool))
TEXT_OR_NULL = Kind("text or null", lambda v: v is None or isinstance(v, str))
NUMBER = Kind("a number", is_number)
NUMBER_OR_NULL = Kind("a number or null", lambda v: v is None or is_number(v))
HOURS = Kind("a number from 0 on", lambda v: is_number(v) and v >= 0)
STATUS = Kind("done or diverged", lambda v: v in ("done", "diverged"))

# A mapping with "*" takes any name, a list has any length, and a field whose name ends in "?" may be left out.
# What is not named here may be anything.
ROW: dict[str, Any] = {
    "run_id": NAME,
    "status": STATUS,
    "seed": whole(0),
    "config": {"data": {"root": TEXT_OR_NULL}},
    "config_hash": TEXT,
    "commit": TEXT,
    "dirty": YES_NO,
    "hardware": TEXT,
    "evals": {"*": {"correct": whole(0), "total": whole(1), "mean?": NUMBER, "mce?": NUMBER}},
    "step?": whole(0),
    "world?": whole(1),
    "sharing?": whole(1),
    "m?": whole(0),
    "hours?": HOURS,
    "dtype?": TEXT,
    "finished?": TEXT,
    "versions?": {"*": TEXT},
    "overrides?": [TEXT],
    "sharpness?": {"problem?": TEXT},
    "curves?": {
        "train?": {"*": [NUMBER_OR_NULL]},
        "eval?": [{"step": whole(0), "eval": TEXT, "correct": whole(0), "total": whole(1)}],
        "sharpness?": [{"step": whole(0), "lambda_max?": NUMBER, "alignment?": NUMBER}],
    },
}

# `sharpness` where it was measured.
MEASURED = dict.fromkeys(("lambda_max", "residual", "rho", "surrogate_gap", "estimate", "alignment"), NUMBER)
MEASURED |= {"images": whole(0)}


def parse_row(text: str) -> Row:
    """The row in a file's text.

    Raises:
        ValueError: one sentence on what is wrong: no JSON, a number out of bounds, a field that is missing or of
            another type.
    """
    try:
        row = json.loads(text, parse_constant=refuse_constant, parse_int=bounded_int)
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None
    if too_deep(row):
        raise ValueError("its brackets are nested too deeply")
    for problem in problems(row, ROW, ""):
        raise ValueError(problem)
    if "lambda_max" in (measured := row.get("sharpness", {})):
        for problem in problems(measured, MEASURED, "sharpness"):
            raise ValueError(problem)
    for name, counts in row["evals"].items():
        if counts["correct"] > counts["total"]:
            raise ValueError(f"{counts['correct']} of {plural(counts['total'], 'image')} correct on {name}")
    lengths = {len(values) for values in row.get("curves", {}).get("train", {}).values()}
    if len(lengths) > 1:
        raise ValueError("the curves in curves.train are of different lengths")
    return row


def refuse_constant(word: str) -> float:
    """JSON has no NaN and no Infinity, though Python reads them."""
    raise ValueError(f"{word} is not a number in JSON")


def bounded_int(digits: str) -> int:
    """A whole number, of not more digits than a reader can take."""
    if len(digits) > 40:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def too_deep(value: Any, room: int = 20) -> bool:
    """Whether brackets are nested deeper than `room`: a row needs 5, and Python's own limit ends in a traceback."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return room == 0 or any(too_deep(item, room - 1) for item in inner)


def problems(value: Any, shape: Any, path: str) -> Iterator[str]:
    """Where a value is not of a shape, one sentence each: 'evals.val.total must be a whole number from 1 on, not 0'."""
    if isinstance(shape, Kind):
        if not shape.fits(value):
            yield f"{path} must be {shape.words}, not {excerpt(value)}"
    elif isinstance(shape, list):
        if not isinstance(value, list):
            yield f"{path} must be a list, not {excerpt(value)}"
            return
        for i, item in enumerate(value):
            yield from problems(item, shape[0], f"{path}[{i}]")
    elif not isinstance(value, dict):
        yield f"{path or 'a row'} must be a mapping, not {excerpt(value)}"
    elif "*" in shape:
        for key, item in value.items():
            yield from problems(item, shape["*"], f"{path}.{key}")
    else:
        prefix = f"{path}." if path else ""
        for key, inner in shape.items():
            name = key.removesuffix("?")
            if name in value:
                yield from problems(value[name], inner, prefix + name)
            elif name == key:
                yield f"{prefix}{name} is missing"


def excerpt(value: Any) -> str:
    """A value as JSON, cut after 40 characters."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def seal_of(row: Row) -> str:
    """SHA-256 of a row without its seal, of its JSON with sorted keys. Changing a digit breaks it."""
    content = {key: value for key, value in row.items() if key != "seal"}
    return sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())
