"""Files that are whole or absent: written to a neighbour, flushed, put in place by one rename. And their SHA-256."""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

Content = str | bytes | Callable[[BinaryIO], object]


def write_atomic(path: str | Path, content: Content, *, replace: bool = True) -> bool:
    """Write a file so that no reader and no crash ever sees a part of it; its mode follows the umask.

    Args:
        content: text (UTF-8), bytes, or a function that writes them into the binary file it is given.
        replace: False leaves a file that exists as it is. The link that decides this is atomic, on NFS too.

    Returns:
        whether the file is this one; False only with replace=False.

    Raises:
        OSError: if the disk does not take it (or whatever `content` raises). The old file, if any, is intact.
    """
    path = Path(path)
    # A name of its own, so that two writers cannot write into each other's file.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # or the rename may reach the disk before the content does
        if replace:
            os.replace(temporary, path)
            return True
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        return True
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_temporaries(folder: str | Path, name: str = "*") -> None:
    """Remove what writers of `name` in `folder` left behind when they were killed. For who writes there alone."""
    for path in Path(folder).glob(f"{name}.*.tmp"):
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def sha256(source: Path | bytes) -> str:
    """SHA-256 in hexadecimal, of a file's content or of the bytes themselves.

    Raises:
        OSError: if the file cannot be read.
    """
    if isinstance(source, bytes):
        return hashlib.sha256(source).hexdigest()
    with open(source, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
