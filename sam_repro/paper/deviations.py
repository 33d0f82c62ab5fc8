"""The ids of docs/DEVIATIONS.md and their titles, `## D-01 One line`; and which of them concern a run or a column."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from sam_repro.config.schema import Config


def deviations_path() -> Path:
    """The document; only a checkout has it."""
    return Path(__file__).resolve().parents[2] / "docs" / "DEVIATIONS.md"


@lru_cache(maxsize=1)
def deviation_titles() -> dict[str, str]:
    """{id: title}; empty where the document is not installed."""
    path = deviations_path()
    text = path.read_text() if path.is_file() else ""
    return dict(re.findall(r"^## (D-\d+) (.+)$", text, flags=re.MULTILINE))


# Those that concern a column: how ReaL is counted, which V2 it is, and what the number on C is.
OF_COLUMNS = {"real": "D-19", "v2": "D-25", "c": "D-25"}


def deviations_of(cfg: Config) -> set[str]:
    """The deviations that concern a run, whatever table it stands in: on ImageNet those of Table 1, and Eigen-SAM's."""
    o, concerned = cfg.optim, {"D-29"} if cfg.optim.perturb == "eigen" else set()
    if cfg.data.name != "imagenet":
        return concerned
    concerned |= {"D-01", "D-02", "D-06", "D-07", "D-21", "D-22"}
    if o.perturb != "none" and o.rho_schedule != "constant":
        concerned.add("D-05")
    if cfg.recipe.base == "adamw":
        concerned.add("D-18")
    if cfg.model.family == "resnet":
        concerned |= {"D-03", "D-04", "D-09"} | ({"D-10"} if o.perturb == "none" else set())
    return concerned
