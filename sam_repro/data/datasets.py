"""Where samples come from: .beton files, class folders, scikit-learn's digits, generated images.

A source has `labels` (int64, one per sample), `classes` (names in order), `manifest` (16 hexadecimal digits that name
the content) and two methods for any thread: `read(index)` returns one decoded image, uint8 [H, W, 3], and
`encoded(index)` the bytes of its JPEG.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np

from sam_repro.config.schema import DataConfig
from sam_repro.data.beton import BetonFile, write_beton
from sam_repro.data.folders import classes_in, images_by_class
from sam_repro.data.images.decode import Buffer, decode
from sam_repro.data.loaders.batch_order import holdout
from sam_repro.data.manifest import (
    TOOL,
    check_manifest,
    manifest_hash,
    manifest_path,
    read_files,
    read_manifest,
    write_manifest,
)
from sam_repro.errors import UserError, plural
from sam_repro.records.files import sha256

JPEG_START = b"\xff\xd8"
DIGITS_ROOT = "data/digits"
DIGITS_SIDE = 32  # pixels
SYNTHETIC_COUNTS = {"train": 256, "val": 64}


class Source(Protocol):
    """Labelled images that any thread may read."""

    labels: np.ndarray
    classes: list[str]
    manifest: str

    @property
    def files(self) -> Sequence[str]:
        """The name of each sample's file. Raises UserError where they are not known."""
        ...

    def read(self, index: int) -> np.ndarray:
        """One decoded image: uint8 [H, W, 3], C-contiguous. Raises UserError when it cannot be decoded."""
        ...

    def encoded(self, index: int) -> Buffer | None:
        """The bytes of the sample's JPEG; None where it is none, and only `read` gives it."""
        ...

    def close(self) -> None:
        """Release the files."""
        ...


class BetonSource:
    """A .beton file with its manifest."""

    def __init__(self, path: Path) -> None:
        self.file = BetonFile.open(path)
        self.labels = self.file.labels
        try:
            self.classes: list[str] = check_manifest(self.file)["classes"]
            self.manifest = manifest_hash(path)
            if self.labels.max() >= len(self.classes):
                known = f"but its manifest lists {plural(len(self.classes), 'class')}"
                raise UserError(f"{path} has label {self.labels.max()}, {known}")
        except BaseException:
            self.file.close()
            raise

    @property
    def files(self) -> list[str]:
        """The names of the files that the samples were written from."""
        return read_files(self.file.path)

    def read(self, index: int) -> np.ndarray:
        """Decode one sample, once its checksum is shown to be right."""
        data = self.file.sample(index)
        if self.file.raw[index]:
            return np.frombuffer(data, np.uint8).reshape(self.file.heights[index], self.file.widths[index], 3)
        image = decode(data, f"sample {index} of {self.file.path}")
        if image.shape[:2] != (self.file.heights[index], self.file.widths[index]):
            raise UserError(f"sample {index} of {self.file.path} has another width or height than the file says")
        return image

    def encoded(self, index: int) -> Buffer | None:
        """The JPEG of one sample, once its checksum is shown to be right."""
        return None if self.file.raw[index] else self.file.sample(index)

    def close(self) -> None:
        """Close the file."""
        self.file.close()


class FolderSource:
    """One folder per class, with image files at any depth; classes and files in sorted order, as torchvision does."""

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise UserError(f"there is no folder {root}")
        self.root = root
        self.classes, self.files, self.labels, self.manifest = images_by_class(root)

    def read(self, index: int) -> np.ndarray:
        """Decode one file."""
        return decode(self._content(index), f"{self.root}/{self.files[index]}")

    def encoded(self, index: int) -> Buffer | None:
        """The content of one file."""
        data = self._content(index)
        return data if data[:2] == JPEG_START else None

    def close(self) -> None:
        """Nothing to release."""

    def _content(self, index: int) -> bytearray:
        path = f"{self.root}/{self.files[index]}"
        try:
            with open(path, "rb") as file:
                return bytearray(file.read())
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None


class ArraySource:
    """Images in memory."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, classes: list[str], manifest: str) -> None:
        self.images, self.labels, self.classes, self.manifest = images, labels, classes, manifest
        self.files = [str(index) for index in range(len(labels))]

    def read(self, index: int) -> np.ndarray:
        """One image, as it is; beyond the last they begin again."""
        return self.images[index % len(self.images)]

    def encoded(self, index: int) -> Buffer | None:
        """There are no JPEGs."""
        return None

    def close(self) -> None:
        """Nothing to release."""


def _digest(content: object) -> str:
    return sha256(json.dumps(content).encode())[:16]


def root_of(data: DataConfig) -> Path:
    """The folder of a data set on disk. Raises UserError when none is configured or it does not exist."""
    if data.root is None and data.name == "digits":
        return Path(DIGITS_ROOT)
    if data.root is None:
        raise UserError(
            f"data.root is not set: add data.root=FOLDER, with {data.name}'s train.beton or train/<class>/*.jpg in it"
        )
    root = Path(data.root).expanduser()
    if not root.is_dir() and data.name != "digits":
        raise UserError(f"data.root={data.root} is not a folder")
    return root


def ensure(data: DataConfig) -> None:
    """Make what this project can make itself: the digits. Other data sets are the user's to write.

    Safe on several ranks at once: files appear atomically and are equal.
    """
    if data.name != "digits":
        return
    root = root_of(data)
    paths = [root / "train.beton", root / "val.beton"]
    if all(path.exists() and manifest_path(path).exists() and read_manifest(path)["tool"] == TOOL for path in paths):
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        _write_digits(paths)
    except OSError as error:
        raise UserError(f"cannot write data.root={root.absolute()}: {error.strerror or error}") from error


def _write_digits(paths: list[Path]) -> None:
    for path, (images, labels) in zip(paths, _digits(), strict=True):
        encoded = ((_jpeg(image), label) for image, label in zip(images, labels, strict=True))
        samples = ((jpeg, DIGITS_SIDE, DIGITS_SIDE, label, False) for jpeg, label in encoded)
        write_beton(path, samples, capacity=len(images))
        write_manifest(path, [str(digit) for digit in range(10)], quality=95, side=DIGITS_SIDE)


def _digits() -> list[tuple[np.ndarray, np.ndarray]]:
    """scikit-learn's 1,797 scanned digits (8x8): train, 80 % of each class, and val; always the same."""
    from sklearn.datasets import load_digits  # seconds to import, and only here

    images, labels = load_digits(return_X_y=True)
    images = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return [(images[chosen], labels[chosen]) for chosen in holdout(labels, 0.8)]


def _jpeg(image: np.ndarray) -> bytes:
    """A grey 8x8 digit as an RGB JPEG of DIGITS_SIDE pixels."""
    large = cv2.resize(image, (DIGITS_SIDE, DIGITS_SIDE), interpolation=cv2.INTER_CUBIC)
    done, encoded = cv2.imencode(".jpg", cv2.cvtColor(large, cv2.COLOR_GRAY2BGR), [cv2.IMWRITE_JPEG_QUALITY, 95])
    assert done
    return encoded.tobytes()


def synthetic(data: DataConfig, split: str, at_least: int = 0) -> ArraySource:
    """Smooth random images in memory: a pattern of the class (learnable) plus one of the sample; repeated as needed."""
    side, count = data.image_size, SYNTHETIC_COUNTS[split]
    patterns = np.random.default_rng(0).normal(size=(data.num_classes, 4, 4, 3))
    labels = np.arange(count, dtype=np.int64) % data.num_classes
    noise = np.random.default_rng(1 if split == "train" else 2).normal(size=(count, 4, 4, 3))
    small = (patterns[labels] + 0.5 * noise).astype(np.float32)
    large = np.stack([cv2.resize(image, (side, side), interpolation=cv2.INTER_LINEAR) for image in small])
    images = np.clip(128 + 48 * large, 0, 255).astype(np.uint8)
    total = max(count, at_least)
    labels = labels[np.arange(total) % count]
    spec = ["synthetic", 1, split, total, side, data.num_classes]
    return ArraySource(images, labels, [str(label) for label in range(data.num_classes)], _digest(spec))


def find_source(root: Path, split: str) -> Source:
    """`root/<split>.beton`, else the class folders in `root/<split>`."""
    beton = root / f"{split}.beton"
    if beton.exists():
        return BetonSource(beton)
    if (root / split).is_dir():
        return FolderSource(root / split)
    raise UserError(f"{root} has neither {split}.beton nor a folder {split}/ with one folder per class")


def open_source(data: DataConfig, split: str, batch: int = 0) -> Source:
    """The source of 'train' or 'val'. Raises UserError when it is missing, damaged or has other classes.

    batch: generated images are as many at least.
    """
    if data.name == "synthetic":
        return synthetic(data, split, batch)
    ensure(data)
    root = root_of(data)
    source = find_source(root, split)
    theirs, wrong = class_names(root, "train") if split == "val" else None, ""
    if len(source.classes) != data.num_classes:
        wrong = f"{plural(len(source.classes), 'class')} in {split}, but data.num_classes={data.num_classes}"
    elif theirs is not None and theirs != source.classes:  # a label is a place in their order
        odd = sorted(set(theirs) ^ set(source.classes))[:4]
        wrong = f"other classes in {split} than in train: {', '.join(odd) + ' in one only' if odd else 'another order'}"
    if wrong:
        source.close()
        raise UserError(f"{root} has {wrong}")
    return source


def class_names(root: Path, split: str) -> list[str] | None:
    """The classes of a split in the order of their labels; None where there is none."""
    beton = root / f"{split}.beton"
    if beton.exists():
        return read_manifest(beton)["classes"]
    return classes_in(root / split) if (root / split).is_dir() else None
