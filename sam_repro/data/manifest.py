"""The JSON next to a .beton file that says what it holds and proves that it still does."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from sam_repro.data.beton import VERSION, BetonFile
from sam_repro.errors import UserError
from sam_repro.records.files import sha256, write_atomic

TOOL = "sam_repro 2"  # changes when the same inputs would give another file
NEEDED = ("tool", "bytes", "sha256", "table_sha256", "samples", "classes", "counts", "files_sha256")


def manifest_path(beton: str | Path) -> Path:
    """train.beton -> train.manifest.json"""
    return Path(beton).with_suffix(".manifest.json")


def files_path(beton: str | Path) -> Path:
    """train.beton -> train.files.txt"""
    return Path(beton).with_suffix(".files.txt")


def write_manifest(
    beton: str | Path, classes: list[str], *, files: Iterable[str] | None = None, **facts: Any
) -> dict[str, Any]:
    """Describe `beton` in its manifest and return it.

    Args:
        classes: names in the order of the labels.
        files: the name of each sample, without line breaks, kept in a list next to the manifest; ReaL's labels are
            found by them.
        facts: added as they are (size rule, skipped files).
    """
    file = BetonFile.open(beton)
    names = b"".join(f"{name}\n".encode("utf-8", "surrogateescape") for name in files or [])
    content = {
        "file": file.path.name,
        "format": f"beton {VERSION} with checksums",
        "tool": TOOL,
        "bytes": file.path.stat().st_size,
        "sha256": sha256(file.path),
        "table_sha256": file.table_sha256,
        "samples": len(file),
        "classes": classes,
        "counts": np.bincount(file.labels, minlength=len(classes)).tolist(),
        "files_sha256": sha256(names),
        **facts,
    }
    content["seal"] = seal(content)
    file.close()
    if files is not None:
        write_atomic(files_path(beton), names)
    write_atomic(manifest_path(beton), json.dumps(content, indent=1) + "\n")
    return content


def seal(content: dict[str, Any], *without: str) -> str:
    """SHA-256 of a manifest's fields without its seal and those named: no field of it changes unseen."""
    sealed = {key: value for key, value in content.items() if key not in ("seal", *without)}
    return sha256(json.dumps(sealed, sort_keys=True, separators=(",", ":")).encode())


def read_files(beton: str | Path) -> list[str]:
    """The names that `write_manifest` was given. Raises UserError when there are none or they are not this file's."""
    path = files_path(beton)
    try:
        names = path.read_bytes()
    except OSError as error:
        raise UserError(f"{beton} has no readable list of file names {path.name}: {error.strerror}") from None
    if sha256(names) != read_manifest(beton)["files_sha256"]:
        raise UserError(f"{path} is not the list that belongs to {Path(beton).name}; write the data again")
    return names.decode("utf-8", "surrogateescape").split("\n")[:-1]


def read_manifest(beton: str | Path) -> dict[str, Any]:
    """The manifest of `beton`. Raises UserError when there is none, it is not readable, or its seal is broken.

    Manifests from before the seal are taken as they are.
    """
    path = manifest_path(beton)
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{beton} has no manifest {path.name}; write the data again with `sam-repro write`") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not valid JSON") from None
    whole = isinstance(content, dict) and all(key in content for key in NEEDED)
    if not whole or not isinstance(content["classes"], list):
        raise UserError(f"{path} is not a manifest: it needs {', '.join(NEEDED)}")
    if content.get("seal", seal(content)) != seal(content):
        raise UserError(f"{path} was changed after it was written: its seal is broken; write the data again")
    return content


def check_manifest(file: BetonFile, *, full: bool = False) -> dict[str, Any]:
    """The manifest of an open file, once it is shown to describe this file.

    Always compares the size and the hash of everything but the pixels; `full` also hashes the whole file.
    Raises UserError on any difference.
    """
    content = read_manifest(file.path)
    if content["tool"] != TOOL:
        raise UserError(f"{file.path} was written by another version of this project; `sam-repro write` it again")
    size = os.fstat(file.descriptor).st_size
    same = content["bytes"] == size and content["table_sha256"] == file.table_sha256
    if not same or (full and content["sha256"] != sha256(file.path)):
        raise UserError(f"{file.path} is not the file that {manifest_path(file.path).name} describes; write it again")
    return content


def manifest_hash(beton: str | Path) -> str:
    """16 hexadecimal digits that name the data in a ledger row.

    Of the whole manifest but its seal and `source`, which holds file times of the machine that wrote the data.
    """
    return seal(read_manifest(beton), "source")[:16]
