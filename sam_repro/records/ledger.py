"""The ledger: one immutable JSON file a finished run. The training half writes it, the paper half reads it."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from sam_repro.errors import UserError
from sam_repro.records.files import write_atomic
from sam_repro.records.log import metrics_of
from sam_repro.records.row_schema import Row, parse_row, seal_of

PACKAGES = ("torch", "torchvision", "timm", "ffcv", "numpy", "numba", "opencv-python-headless", "hydra-core", "wandb")


def row_path(ledger_dir: str | Path, run_id: str) -> Path:
    """Where the row of a run is."""
    return Path(ledger_dir) / f"{run_id}.json"


def write_row(ledger_dir: str | Path, row: Row) -> Path:
    """Write a row once, sealed; an existing row of the run is never changed."""
    path = row_path(ledger_dir, row["run_id"])
    path.parent.mkdir(parents=True, exist_ok=True)
    sealed = row | {"seal": seal_of(row)}
    write_atomic(path, json.dumps(sealed, indent=1, allow_nan=False) + "\n", replace=False)
    return path


def read_row(path: Path) -> Row:
    """One row, checked for the fields that every reader relies on; its seal is for `sam-repro check`.

    Raises:
        UserError: the file cannot be read or is no row; one sentence names the field.
    """
    try:
        row = parse_row(path.read_text())
        if row["run_id"] != path.stem:
            raise ValueError(f"it is the row of {row['run_id']}, whatever the file's name says")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a ledger row: {error}") from None
    return row


def read_ledger(ledger_dir: str | Path) -> list[Row]:
    """All rows of a folder, by run id."""
    return [read_row(path) for path in sorted(Path(ledger_dir).glob("*.json"))]


def summary_of(row: Row) -> dict[str, Any]:
    """What W&B's table of runs can be sorted by, under the names of its curves (records.log.metrics_of).

    The values are those of tables: at the end of training, not the best on the way. The speed is the median interval's.
    """
    found: dict[str, Any] = {f"{name}/accuracy": 100 * c["correct"] / c["total"] for name, c in row["evals"].items()}
    found |= metrics_of({"sharpness": row.get("sharpness", {})})
    found |= {key: row[key] for key in ("status", "m", "hours") if key in row}
    if seconds := [s for s in row.get("curves", {}).get("train", {}).get("step_seconds", []) if s]:
        found["images_per_second"] = row["config"]["recipe"]["batch_size"] / statistics.median(seconds)
    if "peak_bytes" in row:
        found["peak_GB"] = row["peak_bytes"] / 1e9
    return found


@cache
def provenance() -> Row:
    """Commit, dirty flag, versions and CPU of this process when first asked: what a number needs to be printed.

    SAM_REPRO_COMMIT names the commit of a tree that was copied without its history, as into a container.
    """
    given = os.environ.get("SAM_REPRO_COMMIT")
    return {
        "commit": given or git("rev-parse", "HEAD") or "unknown",
        "dirty": not given and bool(git("status", "--porcelain", "--untracked-files=no")),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES if version(p)},
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
    }


def git(*arguments: str) -> str:
    """git's output in this project's checkout, or the empty string outside one."""
    where = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "-C", str(where), *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def version(package: str) -> str:
    """The installed version of a package, or the empty string."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def cpu_name() -> str:
    """The processor's name as the kernel reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
