"""Class folders as people have them: which names are classes, which are images, and what only lies among them.

Names may have any bytes, as Python's file system encoding has them. Hidden names, and those that operating systems and
disk stations leave behind, are neither classes nor images. Folders that are links are followed, but none is read twice
for a class, so that a link to a folder above or next to it ends there.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import numpy as np

from sam_repro.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
SYSTEM = {"__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found", "system volume information"}
SPLITS = {"train", "training", "val", "valid", "validation", "test"}


class Names(Sequence[str]):
    """File names in one block of bytes: a list of 1.28 million strings would take three times the memory."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.text, self.ends = bytearray(), array("q", [0])
        self.extend(names)

    def extend(self, names: Iterable[str]) -> None:
        """Append names."""
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]
        self.text += b"".join(encoded)
        self.ends.extend(list(accumulate(map(len, encoded), initial=self.ends.pop())))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index):
        """One name; a slice gives a list."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return self.text[self.ends[index] : self.ends[index + 1]].decode("utf-8", "surrogateescape")


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is a system's or a program's: .DS_Store, ._x.jpg, @eaDir, lost+found."""
    return name.startswith(".") or name.casefold() in SYSTEM


def is_image(name: str) -> bool:
    """Whether a file of this name counts as an image."""
    return name.lower().endswith(SUFFIXES) and not is_hidden(name)


def classes_in(folder: Path) -> list[str]:
    """The names of class folders, sorted. Raises UserError when the folder cannot be read."""
    with _readable(folder), os.scandir(folder) as entries:
        shown = [entry for entry in entries if not is_hidden(entry.name)]
        for entry in shown:
            if entry.is_symlink() and not os.path.exists(entry.path):
                raise UserError(f"{entry.path} is a link to a folder that is not there")
        return sorted(entry.name for entry in shown if entry.is_dir())


def images_beside(folder: Path) -> list[str]:
    """The image files directly in a folder, sorted: next to class folders they belong to no class."""
    with _readable(folder), os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if is_image(entry.name) and entry.is_file())


def has_image(folder: Path) -> bool:
    """Whether there is an image in a class folder, at any depth."""
    return next(_walk(str(folder), "", {_identity(folder)}), None) is not None


def images_by_class(root: Path) -> tuple[list[str], Names, np.ndarray, str]:
    """Every image below the class folders of `root`.

    Returns:
        (class names, sorted; paths relative to root, class by class and sorted within each; labels int64 [images];
        16 hexadecimal digits that name the list of paths).

    Raises:
        UserError: no class folders, one without images, one that is another's twin or a split, or what cannot be read.
    """
    classes = classes_in(root)
    if not classes:
        raise UserError(f"{root} has no class folders")
    own = {}
    for name in classes:
        identity = _identity(root / name)
        if identity in own:
            raise UserError(f"the class folders {own[identity]} and {name} of {root} are the same folder, by a link")
        own[identity] = name
    above = {_identity(folder) for folder in (root, *root.resolve().parents)}
    files, counts, digest = Names(), [], hashlib.sha256(b"[")
    for name in classes:
        found = sorted(_walk(str(root), name, above | set(own)))
        if not found:
            raise UserError(f"the class folder {root / name} has no images")
        if name.lower() in SPLITS and not any(path.count("/") == 1 for path in found):
            raise UserError(f"{root} holds a folder {name}/ of class folders: move them up, or name the right folder")
        digest.update((", " if len(files) else "").encode() + json.dumps(found)[1:-1].encode())
        files.extend(found)
        counts.append(len(found))
    digest.update(b"]")
    return classes, files, np.repeat(np.arange(len(classes)), counts).astype(np.int64), digest.hexdigest()[:16]


def _walk(root: str, folder: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    """The images at any depth below root/folder, as paths relative to root; folders in `seen` are not entered."""
    here = f"{root}/{folder}" if folder else root
    inner = []
    with _readable(here), os.scandir(here) as entries:
        for entry in entries:
            if is_hidden(entry.name):
                continue
            path = f"{folder}/{entry.name}" if folder else entry.name
            link = entry.is_symlink()
            if os.path.isdir(entry.path) if link else entry.is_dir(follow_symlinks=False):
                inner.append((link, path))
            elif entry.name.lower().endswith(SUFFIXES):
                if link and not os.path.exists(entry.path):
                    raise UserError(f"{entry.path} is a link to a file that is not there")
                if entry.is_file():
                    yield path
    for _, path in sorted(inner):  # folders before links to them, so that the same tree gives the same names
        identity = _identity(f"{root}/{path}")
        if identity not in seen:
            seen.add(identity)
            yield from _walk(root, path, seen)


def _identity(folder: Path | str) -> tuple[int, int]:
    with _readable(folder):
        status = os.stat(folder)
    return status.st_dev, status.st_ino


@contextmanager
def _readable(folder: Path | str) -> Iterator[None]:
    """What the operating system refuses becomes one sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {error.filename or folder}: {error.strerror or error}") from None
