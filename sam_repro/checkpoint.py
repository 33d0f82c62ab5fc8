"""Checkpoints that survive: written beside, named into place, checked by digest, never unpickled as code.

A checkpoint is two files, `step-00001234.pt` and `step-00001234.json`. The JSON (step, score, configuration hash,
SHA-256 of the .pt) is written last: a .pt without it is an unfinished save and is ignored.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
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
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        raise UserError(f"could not save {path}: {error}; the checkpoints before it are intact") from error
    prune(run_dir)
    return path


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write JSON atomically and durably."""
    temporary = path.with_suffix(".json.tmp")
    with open(temporary, "w") as file:
        json.dump(record, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def records(run_dir: Path) -> list[dict[str, Any]]:
    """What the finished checkpoints of a run say of themselves, oldest first."""
    found = []
    for path in sorted(run_dir.glob("step-*.json")):
        try:
            found.append(json.loads(path.read_text()) | {"path": path.with_suffix(".pt")})
        except (OSError, ValueError):
            continue  # a damaged record: its checkpoint cannot be trusted
    return [r for r in found if {"step", "config_hash", "sha256"} <= r.keys()]


def prune(run_dir: Path) -> None:
    """Remove all but the newest KEEP checkpoints and the best one, and what dead saves left behind."""
    known = records(run_dir)
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
        if record["config_hash"] != config_hash:
            theirs = record["config_hash"]
            raise UserError(f"{path} was made with another configuration (hash {theirs}, this run's is {config_hash})")
        try:
            if digest(path) != record["sha256"]:
                raise ValueError("its SHA-256 is not the one recorded")
            return torch.load(path, map_location=device, weights_only=True), damaged
        except Exception as error:  # a damaged archive raises whatever its bytes lead to
            damaged.append(f"{path.name} is damaged ({error}); going back to the one before it")
    if damaged:
        raise UserError(f"no checkpoint in {run_dir} can be read: {'; '.join(damaged)}")
    return None, []


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def export(model: nn.Module, path: Path, description: dict[str, str]) -> None:
    """The weights under timm's own names, as safetensors: `timm.create_model(...).load_state_dict(load_file(path))`."""
    temporary = path.with_suffix(".tmp")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, temporary, metadata=description)
    os.replace(temporary, path)
