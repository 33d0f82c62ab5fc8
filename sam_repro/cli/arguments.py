"""Types of command line arguments, each with its sentence for what does not fit."""

from __future__ import annotations

import re
from argparse import ArgumentTypeError

from sam_repro.errors import UserError

UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def duration(text: str) -> float:
    """Seconds from '90s', '9m', '2h', '1.5d' or a bare number of seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text)
    if not match or float(match[1]) == 0:
        raise ArgumentTypeError(f"'{text}' is not a duration such as 90s, 9m or 2h")
    return float(match[1]) * UNITS[match[2]]


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)


def positive_number(text: str) -> float:
    """A number greater than 0, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ArgumentTypeError(f"'{text}' is not a number greater than 0")
    return value


def tables_and_overrides(words: list[str], command: str) -> tuple[list[str], list[str]]:
    """(names, key=value words) of a command line. Raises UserError where no table is named."""
    names = [word for word in words if "=" not in word]
    if not names:
        raise UserError(f"name a table, such as sam-repro {command} table1; sam-repro {command} --help says more")
    return names, [word for word in words if "=" in word]
