"""Which values a field may have, and when it is read. Both stand next to the field, as its metadata."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Range:
    """An interval of finite numbers; `open_low` and `open_high` leave its ends out."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, x: Any) -> bool:
        if not isinstance(x, (int, float)) or not math.isfinite(x):
            return False
        return self.low <= x <= self.high and not (self.open_low and x == self.low or self.open_high and x == self.high)

    def __str__(self) -> str:
        if self.high < math.inf:
            return f"in {'[('[self.open_low]}{self.low}, {self.high}{'])'[self.open_high]}"
        if self.low == -math.inf:
            return "a finite number"
        if self.open_low:
            return f"greater than {self.low}"
        return f"at least {self.low}" if self.low else "a finite number, 0 or greater"


FINITE = Range()
POSITIVE = Range(0, open_low=True)
NOT_NEGATIVE = Range(0)
AT_LEAST_ONE = Range(1)
UNIT = Range(0, 1)  # both ends
PART = Range(0, 1, open_low=True)  # not nothing
BELOW_ONE = Range(0, 1, open_high=True)
NAME = re.compile(r"\w[\w.+-]*")  # of a file or a folder, and of nothing above it

Limit = Range | tuple[str, ...] | re.Pattern[str]
REFERENCE = "reference"  # of a key that is read where a file of configs/ refers to it
Condition = dict[str, Any]  # dotted key: the Range or the tuple that its value is in; all of them


def limited(
    default: Any,
    within: Limit | None = None,
    *,
    length: int = 0,
    ascending: bool = False,
    read_by: Condition | str | tuple[Condition, ...] = (),
) -> Any:
    """A field of a dataclass with its limits.

    Args:
        default: of the field; a list is copied for every instance.
        within: a Range, the words that it may be, or a pattern; of a list, each of its numbers. None passes.
        length: numbers in a list.
        ascending: a list's numbers do not decrease.
        read_by: settings under which the value matters, any of several; () is always, REFERENCE where a file has it.
    """
    metadata = {"within": within, "length": length, "ascending": ascending}
    metadata["read_by"] = read_by if isinstance(read_by, tuple) else (read_by,)
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)
