"""Amounts of memory as they are typed: `train.memory=24GB`, `train.memory=0.5`, `--memory 24GB`."""

from __future__ import annotations

import re

from sam_repro.errors import UserError

GB = 10**9  # bytes; a card that is sold as 24 GB has a little more


def memory_bytes(text: str, key: str, *, total: float | None = None) -> float:
    """Bytes of "24GB", or of a share such as "0.5" where the `total` that it is of is known.

    Raises:
        UserError: for anything else; `key` is what was typed before it.
    """
    amount = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(GB|gb|Gb)?\s*", text)
    value = float(amount[1]) if amount else 0.0
    if amount and amount[2] and value > 0:
        return value * GB
    if amount and not amount[2] and total is not None and 0 < value <= 1:
        return value * total
    share = "" if total is None else ", or a share of the memory in (0, 1], such as 0.5"
    raise UserError(f"{key}={text} is no amount of memory: give GB, such as 24GB{share}")
