"""Checkpoints that survive: put in place whole, checked by digest, never unpickled as code.

A checkpoint is two files, `step-00001234.pt` and `step-00001234.json`. The JSON (step, score, configuration hash,
SHA-256 of the .pt, and a seal on all that) is in place first: without its .pt it is a save that was not finished, and
a .pt without its JSON has lost its digest.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import nn

from sam_repro.errors import UserError
from sam_repro.models.pretrained import load_pickle
from sam_repro.records.files import sha256, write_atomic

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

    def write(file: BinaryIO) -> None:
        torch.save(state, file)
        file.flush()
        digest = sha256(Path(file.name))
        write_json(
            path.with_suffix(".json"), {"step": step, "score": score, "config_hash": config_hash, "sha256": digest}
        )

    try:
        write_atomic(path, write)
    except (OSError, RuntimeError) as error:
        # torch.save says about a full disk that a position is unexpected
        full = isinstance(error, RuntimeError) and shutil.disk_usage(run_dir).free < 2**20
        why = os.strerror(errno.ENOSPC) if full else error
        raise UserError(f"could not save {path}: {why}; the checkpoints before it are intact") from error
    prune(run_dir, step)
    return path


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write the JSON of a checkpoint, with a seal on its fields."""
    write_atomic(path, json.dumps(record | {"seal": seal(record)}))


def seal(record: dict[str, Any]) -> str:
    """A checksum of a record's fields, so that a damaged one is not mistaken for another run's."""
    fields = {k: v for k, v in record.items() if k != "seal"}
    return sha256(json.dumps(fields, sort_keys=True).encode())[:16]


def records(run_dir: Path) -> list[dict[str, Any]]:
    """What the finished checkpoints of a run say about themselves, oldest first; a damaged record has only its path."""
    checkpoints = []
    for path in sorted(run_dir.glob("step-*.json")):
        weights = {"path": path.with_suffix(".pt")}
        try:
            record = json.loads(path.read_bytes())
            whole = record["seal"] == seal(record)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            whole = False
        checkpoints.append(record | weights if whole else weights)
    return checkpoints


def prune(run_dir: Path, step: int) -> None:
    """Remove all but the newest KEEP checkpoints up to `step` and the best one, and what dead saves left behind.

    A later one than the one just saved is damaged: the run has gone back behind it.
    """
    known = [r for r in records(run_dir) if r.get("step", math.inf) <= step and r["path"].exists()]
    scored = [r for r in known if r.get("score") is not None]
    keep = known[-KEEP:] + ([max(scored, key=lambda r: r["score"])] if scored else [])
    names = {r["path"].stem for r in keep}
    for path in run_dir.glob("step-*"):
        if re.fullmatch(r"step-\d{8}", path.stem.split(".")[0]) and path.stem.split(".")[0] not in names:
            path.unlink(missing_ok=True)


def load_newest(run_dir: Path, *, config_hash: str, device: torch.device) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest checkpoint that is whole, and one sentence for each newer one that is not.

    The state is None where no save was ever finished.

    Raises:
        UserError: if the checkpoint belongs to another configuration, or none of those there can be read.
    """
    known = records(run_dir)
    paths = {r["path"] for r in known}
    known += [{"path": p} for p in run_dir.glob("step-*.pt") if p not in paths]
    sentences, damaged = [], []
    for record in sorted(known, key=lambda r: r["path"], reverse=True):
        path = record["path"]
        theirs = record.get("config_hash", config_hash)
        if theirs != config_hash:
            raise UserError(f"{path} was made with another configuration (hash {theirs}, this run's is {config_hash})")
        if not path.exists():
            sentences.append(f"{path.name} is not there: its save was not finished")
            continue
        try:
            state = load(record, device)
        except Exception as error:  # a damaged archive raises whatever its bytes lead to
            damaged.append(f"{path.name} is damaged ({error})")
            continue
        sentences = [*sentences, *damaged]
        return state, [f"{sentence}; going back to {path.name}" for sentence in sentences]
    if damaged:
        raise UserError(
            f"no checkpoint in {run_dir} can be read: {'; '.join(damaged)}. Put the files back as they were, or remove "
            f"{run_dir}/step-* to train from the beginning"
        )
    return None, sentences


def load(record: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The state of one checkpoint; ValueError if it is not what was saved."""
    path = record["path"]
    if "sha256" not in record:
        lost = path.with_suffix(".json")
        raise ValueError(
            f"{lost.name}, which holds its digest, is {'not as it was written' if lost.exists() else 'gone'}"
        )
    if sha256(path) != record["sha256"]:
        raise ValueError("its SHA-256 is not the one recorded")
    return load_pickle(path, device)


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


def export(model: nn.Module, path: Path, description: dict[str, str]) -> str:
    """The weights under timm's own names, as safetensors: `timm.create_model(...).load_state_dict(load_file(path))`.

    Equal weights and descriptions give equal files: safetensors writes several metadata keys in any order, so the
    description is one of them.

    Returns:
        the SHA-256 of the file.

    Raises:
        UserError: if it cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    content = safetensors.torch.save(tensors, {"sam_repro": json.dumps(description, sort_keys=True)})
    try:
        write_atomic(path, content)
    except OSError as error:
        raise UserError(f"could not save {path}: {error}; the checkpoint is intact") from error
    return sha256(content)
