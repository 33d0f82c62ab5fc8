"""Measured speeds in results/benchmarks/*.json, and the one that fits a run.

A file is {"hardware": name as the ledger has it, "gpu": short name such as "h100", "date", "commit", "versions",
"entries": [...]}. An entry is one of

    {"kind": "step", "model", "method", "m", "images_per_second", "batch": of a GPU, "dtype", "image_size", "period"}
    {"kind": "loader", "data", "backend", "workers", "images_per_second"}

per GPU: a loader entry is what the cores of one GPU deliver. Other keys (compile, memory) are kept and ignored.
`flops.json` is of another form: {"gflop_forward": {model: {image size: GFLOP of one image}}}.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sam_repro.config.schema import Config
from sam_repro.errors import UserError

Entry = dict[str, Any]
REQUIRED = {"step": ("model", "method", "m", "images_per_second"), "loader": ("data", "images_per_second")}


@dataclass(frozen=True)
class Rate:
    """Images per second of one GPU, and how it is known."""

    images_per_second: float
    how: str


def benchmarks_dir() -> Path:
    """results/benchmarks of the checkout."""
    return Path(__file__).resolve().parents[2] / "results" / "benchmarks"


def passes_of(cfg: Config) -> float:
    """Forward and backward passes over the batch a step.

    1 without a perturbation, 2 with one, 3 for CR-SAM's two; with a cadence only every k-th step. Entropy-SGD: as many
    as it takes inner steps, each on its part of the batch. Eigen-SAM: p Hessian-vector products every k steps on top,
    on m images or a whole batch, each counted as 2 passes (its authors say 1 to 2).
    """
    o = cfg.optim
    if o.kind == "entropy_sgd":
        return o.inner_steps / o.inner_parts
    if o.perturb == "none":
        return 1
    passes = 1 + (2 if o.combine == "cr" else 1) / o.every
    if o.perturb == "eigen":
        share = min(1, o.m / cfg.recipe.batch_size) if o.eigen_images == "group" and o.m else 1
        passes += 2 * o.p / o.k * share
    return passes


def period_of(cfg: Config) -> int:
    """Steps after which a method's cost repeats: k of Eigen-SAM's power iteration and of LookSAM, else 1."""
    return cfg.optim.k if cfg.optim.perturb == "eigen" else cfg.optim.every


@cache
def forward_gflop(model: str, image_size: int) -> float | None:
    """Counted GFLOP of one image's forward pass, or None where nobody counted."""
    path = benchmarks_dir() / "flops.json"
    table = json.loads(path.read_text())["gflop_forward"] if path.is_file() else {}
    return table.get(model, {}).get(str(image_size))


def stored(folder: Path | None = None, key: str = "entries") -> list[tuple[Path, dict[str, Any]]]:
    """The measurements that have `key`, by file name. Raises UserError for a file that is not JSON."""
    reports = []
    for path in sorted((folder or benchmarks_dir()).glob("*.json")):
        try:
            tree = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path} is not JSON: {error}") from None
        if isinstance(tree, dict) and tree.get(key):
            reports.append((path, tree))
    return reports


def load_rates(gpu: str, folder: Path | None = None) -> list[Entry]:
    """All entries measured on a kind of hardware; `gpu` is the short name, the full one or a word of it.

    Raises:
        UserError: a file that does not follow the form.
    """
    entries = []
    for path, tree in stored(folder):
        if gpu.lower() != tree.get("gpu", "").lower() and not is_named(tree.get("hardware", ""), gpu):
            continue
        for entry in tree["entries"]:
            missing = [k for k in REQUIRED.get(entry.get("kind", ""), ("kind",)) if k not in entry]
            if missing:
                raise UserError(f"{path}: an entry lacks {', '.join(missing)}")
            entries.append(entry | {"file": path.name})
    return entries


def is_named(hardware: str, name: str) -> bool:
    """Whether hardware may be called so: by its full name or a part of it, such as h100."""
    return name.lower() in (hardware.lower(), *re.split(r"[\s-]+", hardware.lower()))


def known_hardware(folder: Path | None = None) -> list[str]:
    """The hardware whose steps were measured."""
    steps = [tree for _, tree in stored(folder) if any(e.get("kind") == "step" for e in tree["entries"])]
    return sorted({tree["hardware"] for tree in steps})


def step_rate(cfg: Config, entries: list[Entry]) -> Rate | None:
    """The step's speed: measured for this model, method and m, else scaled from another method of the same model.

    Scaling is by the number of passes and says so; another model's speed is never used.
    """
    m, passes, period = cfg.optim.m, passes_of(cfg), period_of(cfg)
    same = [e for e in entries if e["kind"] == "step" and e["model"] == cfg.model.name]
    same = [e for e in same if e.get("image_size", cfg.data.image_size) == cfg.data.image_size]
    for entry in same:
        if entry["method"] == cfg.optim.name and (passes == 1 or entry["m"] == m) and entry.get("period", 1) == period:
            return Rate(entry["images_per_second"], f"measured ({entry['file']})")
    others = [e for e in same if e["method"] in PASSES and (e["m"] == m or passes == 1)]
    if not others:
        return None
    nearest = min(others, key=lambda e: abs(PASSES[e["method"]] - passes))
    scaled = PASSES[nearest["method"]] / passes * nearest["images_per_second"]
    return Rate(scaled, f"scaled by passes from {nearest['method']} ({nearest['file']})")


PASSES = {"vanilla": 1, "sam": 2, "gsam": 2}  # methods that others may be scaled from


def loader_rate(cfg: Config, entries: list[Entry]) -> Rate | None:
    """The loader's speed for one GPU on this data set."""
    known = [e for e in entries if e["kind"] == "loader" and e["data"] == cfg.data.name]
    return max((Rate(e["images_per_second"], f"measured ({e['file']})") for e in known), default=None, key=speed)


def speed(rate: Rate) -> float:
    """What rates are ordered by."""
    return rate.images_per_second
