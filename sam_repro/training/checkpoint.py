"""Checkpoints that survive: written beside, named into place, checked by digest, never unpickled as code.

A checkpoint is two files, `step-00001234.pt` and `step-00001234.json`. The JSON (step, score, configuration hash,
SHA-256 of the .pt, and a seal on all that) is written last: a .pt without it is an unfinished save and is ignored.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from sam_repro.errors import UserError

KEEP = 2  # the newest checkpoints kept, besides the best


def save(run_dir: Path, state: dict[str, Any], *, step: int, config_hash: str, score: float | None = None) -> Path:
    """Write a checkpoint; afterwards remove all but the newest two and the best.

    Args:
        state: tensors, numbers, strings, lists and dictionaries of them.
        score: higher is better; None if this step was not evaluated.

    Raises:
        UserError: if it cannot be written (a full disk, say). Older checkpoints are untouched.
    """
    path = run_dir / f"step-{step:08d}.pt"
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        record = {"step": step, "score": score, "config_hash": config_hash, "sha256": digest(temporary)}
        os.replace(temporary, path)
        write_json(path.with_suffix(".json"), record)
    except (OSError, RuntimeError) as error:
        # torch.save says of a full disk that a position is unexpected
        full = isinstance(error, RuntimeError) and shutil.disk_usage(run_dir).free < 2**20
        temporary.unlink(missing_ok=True)
        why = os.strerror(errno.ENOSPC) if full else error
        raise UserError(f"could not save {path}: {why}; the checkpoints before it are intact") from error
    prune(run_dir, step)
    return path


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write JSON atomically and durably, with a seal on its fields."""
    temporary = path.with_suffix(".json.tmp")
    with open(temporary, "w") as file:
        json.dump(record | {"seal": seal(record)}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def seal(record: dict[str, Any]) -> str:
    """A checksum of a record's fields, so that a damaged one is not mistaken for another run's."""
    fields = {k: v for k, v in record.items() if k != "seal"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def records(run_dir: Path) -> list[dict[str, Any]]:
    """What the finished checkpoints of a run say of themselves, oldest first; a damaged record has only its path."""
    found = []
    for path in sorted(run_dir.glob("step-*.json")):
        weights = {"path": path.with_suffix(".pt")}
        try:
            record = json.loads(path.read_bytes())
            whole = record["seal"] == seal(record)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            whole = False
        found.append(record | weights if whole else weights)
    return found


def prune(run_dir: Path, step: int) -> None:
    """Remove all but the newest KEEP checkpoints up to `step` and the best one, and what dead saves left behind.

    A later one than the one just saved is damaged: the run has gone back behind it.
    """
    known = [r for r in records(run_dir) if r.get("step", math.inf) <= step]
    scored = [r for r in known if r.get("score") is not None]
    keep = known[-KEEP:] + ([max(scored, key=lambda r: r["score"])] if scored else [])
    names = {r["path"].stem for r in keep}
    for path in run_dir.glob("step-*"):
        if re.fullmatch(r"step-\d{8}", path.stem.split(".")[0]) and path.stem.split(".")[0] not in names:
            path.unlink(missing_ok=True)


def load_newest(run_dir: Path, *, config_hash: str, device: torch.device) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest checkpoint that is whole, and one sentence for each newer one that is not.

    Returns (None, []) where there is none at all.

    Raises:
        UserError: if the checkpoint belongs to another configuration, or none of those there can be read.
    """
    damaged: list[str] = []
    for record in reversed(records(run_dir)):
        path = record["path"]
        theirs = record.get("config_hash", config_hash)
        if theirs != config_hash:
            raise UserError(f"{path} was made with another configuration (hash {theirs}, this run's is {config_hash})")
        try:
            return load(record, device), damaged
        except Exception as error:  # a damaged archive raises whatever its bytes lead to
            damaged.append(f"{path.name} is damaged ({error}); going back to the one before it")
    if damaged:
        raise UserError(f"no checkpoint in {run_dir} can be read: {'; '.join(damaged)}")
    return None, []


def load(record: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The state of one checkpoint; ValueError if it is not what was saved."""
    path = record["path"]
    if "sha256" not in record:
        raise ValueError(f"{path.with_suffix('.json').name} is not as it was written")
    if digest(path) != record["sha256"]:
        raise ValueError("its SHA-256 is not the one recorded")
    return torch.load(path, map_location=device, weights_only=True)


def load_step(run_dir: Path, step: int, device: torch.device, *, patience: float = 60) -> dict[str, Any]:
    """The checkpoint that another process found whole; on NFS it may appear here a little later."""
    deadline = time.monotonic() + patience
    while True:
        try:
            (record,) = (r for r in records(run_dir) if r.get("step") == step)
            return load(record, device)
        except (OSError, ValueError) as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"rank 0 resumes from step {step}, but here {run_dir} does not have it ({error}): "
                    "the folder must be on a file system that all nodes share"
                ) from None
        time.sleep(1)


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def export(model: nn.Module, path: Path, description: dict[str, str]) -> None:
    """The weights under timm's own names, as safetensors: `timm.create_model(...).load_state_dict(load_file(path))`."""
    temporary = path.with_suffix(".tmp")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    try:
        save_file(tensors, temporary, metadata=description)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:  # a full disk is safetensors' own error
        temporary.unlink(missing_ok=True)
        raise UserError(f"could not save {path}: {error}; the checkpoint is intact") from error
