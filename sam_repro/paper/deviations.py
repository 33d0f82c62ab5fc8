"""The ids of docs/DEVIATIONS.md and their titles: `## D-01 One line`."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path


def deviations_path() -> Path:
    """The document; only a checkout has it."""
    return Path(__file__).resolve().parents[2] / "docs" / "DEVIATIONS.md"


@lru_cache(maxsize=1)
def deviation_titles() -> dict[str, str]:
    """{id: title}; empty where the document is not installed."""
    path = deviations_path()
    text = path.read_text() if path.is_file() else ""
    return dict(re.findall(r"^## (D-\d+) (.+)$", text, flags=re.MULTILINE))
