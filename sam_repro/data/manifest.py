"""The JSON beside a .beton file that says what it holds and proves that it still does."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from sam_repro.data.beton import VERSION, BetonFile
from sam_repro.errors import UserError

TOOL = "sam_repro 2"  # changes when the same inputs would give another file


def manifest_path(beton: str | Path) -> Path:
    """train.beton -> train.manifest.json"""
    return Path(beton).with_suffix(".manifest.json")


def files_path(beton: str | Path) -> Path:
    """train.beton -> train.files.txt"""
    return Path(beton).with_suffix(".files.txt")


def write_manifest(
    beton: str | Path, classes: list[str], *, files: list[str] | None = None, **facts: Any
) -> dict[str, Any]:
    """Describe `beton` in its manifest and return it.

    Args:
        files: the name of each sample, kept in a list beside the manifest; ReaL's labels are found by them.
        facts: added as they are (size rule, skipped files).
    """
    file = BetonFile.open(beton)
    names = "".join(f"{name}\n" for name in files or [])
    content = {
        "file": file.path.name,
        "format": f"beton {VERSION} with checksums",
        "tool": TOOL,
        "bytes": file.path.stat().st_size,
        "sha256": sha256(beton),
        "table_sha256": file.table_sha256,
        "samples": len(file),
        "classes": classes,
        "counts": np.bincount(file.labels, minlength=len(classes)).tolist(),
        "files_sha256": hashlib.sha256(names.encode()).hexdigest(),
        **facts,
    }
    file.close()
    if files is not None:
        _replace(files_path(beton), names)
    _replace(manifest_path(beton), json.dumps(content, indent=1) + "\n")
    return content


def _replace(target: Path, text: str) -> None:
    """Write a file that is there completely or not at all."""
    temporary = target.with_suffix(f".{os.getpid()}.partial")
    temporary.write_text(text)
    os.replace(temporary, target)


def read_files(beton: str | Path) -> list[str]:
    """The names that `write_manifest` was given. Raises UserError when there are none or they are not this file's."""
    path = files_path(beton)
    try:
        names = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{beton} has no readable list of file names {path.name}: {error}") from None
    if hashlib.sha256(names.encode()).hexdigest() != read_manifest(beton)["files_sha256"]:
        raise UserError(f"{path} is not the list that belongs to {Path(beton).name}; write the data again")
    return names.splitlines()


def read_manifest(beton: str | Path) -> dict[str, Any]:
    """The manifest of `beton`. Raises UserError when there is none or it is not readable."""
    path = manifest_path(beton)
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{beton} has no manifest {path.name}; write the data again with `sam-repro write`") from None
    except ValueError:
        raise UserError(f"{path} is not valid JSON") from None
    needed = ("tool", "bytes", "sha256", "table_sha256", "samples", "classes", "counts", "files_sha256")
    if not isinstance(content, dict) or any(key not in content for key in needed):
        raise UserError(f"{path} is not a manifest: it needs {', '.join(needed)}")
    return content


def check_manifest(file: BetonFile, *, full: bool = False) -> dict[str, Any]:
    """The manifest of an open file, once it is shown to describe this file.

    Always compares the size and the hash of everything but the pixels; `full` also hashes the whole file.
    Raises UserError on any difference.
    """
    content = read_manifest(file.path)
    if content.get("tool") != TOOL:
        raise UserError(f"{file.path} was written by another version of this project; `sam-repro write` it again")
    size = os.fstat(file.descriptor).st_size
    same = content["bytes"] == size and content["table_sha256"] == file.table_sha256
    if not same or (full and content["sha256"] != sha256(file.path)):
        raise UserError(f"{file.path} is not the file that {manifest_path(file.path).name} describes; write it again")
    return content


def manifest_hash(beton: str | Path) -> str:
    """16 hexadecimal digits that name the data in a ledger row.

    Of the whole manifest but `source`, which holds file times of the machine that wrote the data.
    """
    content = {key: value for key, value in read_manifest(beton).items() if key != "source"}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def sha256(path: str | Path) -> str:
    """Of a whole file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
