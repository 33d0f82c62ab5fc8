"""What `sam-repro write` reads: one `RawSplit` per split, from each layout in which a data set comes.

Nothing is unpacked or copied: files of a tar archive are read at their offsets. `LAYOUTS` in dataset.py names the
functions; each takes (src, download) and returns {"train": RawSplit, "val": RawSplit}, where val is what results are
reported on. Only torchvision's data sets can be downloaded (torchvision.py).
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sam_repro.data.datasets import FolderSource
from sam_repro.data.folders import Names, classes_in, images_beside, is_hidden, is_image
from sam_repro.errors import UserError, plural

Splits = dict[str, "RawSplit"]


@dataclass(frozen=True)
class RawSplit:
    """The labelled images of one split, as they come."""

    classes: list[str]  # in the order of the labels
    labels: np.ndarray  # int64 [images]
    names: Sequence[str]  # one per image: for messages, and for labels that go by file name
    read: Callable[[int], bytes | np.ndarray]  # an encoded file, or pixels (stored without loss), from any thread
    stamp: Callable[[], Iterable[Any]]  # JSON values that change when the images do
    remark: str = ""  # what a user should know about what was found


def of_files(
    classes: list[str], labels: list[int] | np.ndarray, root: Path, names: Sequence[str], remark: str = ""
) -> RawSplit:
    """Image files below `root`, by their paths relative to it."""

    def stamp() -> Iterable[list]:
        for name in names:
            try:
                status = os.stat(f"{root}/{name}")  # once: a disk of a network takes minutes for a million
            except OSError:  # a file that torchvision lists and nobody has: reading it will say so
                continue
            yield [name, status.st_size, status.st_mtime_ns]

    def read(index: int) -> bytes:
        with open(f"{root}/{names[index]}", "rb") as file:
            return file.read()

    return RawSplit(classes, np.array(labels, np.int64), names, read, stamp, remark)


def of_arrays(classes: list[str], labels: np.ndarray, images: Any, name: str) -> RawSplit:
    """Images in memory: uint8 [N, H, W] or [N, H, W, 3], or a list of N encoded files' bytes."""
    labels = np.asarray(labels, np.int64)
    return RawSplit(
        classes,
        labels,
        [f"{name}[{i}]" for i in range(len(labels))],
        lambda i: images[i],
        lambda: [name, digest_of_images(images), labels.tolist()],
    )


def digest_of_images(images: Any) -> str:
    """SHA-256 of arrays or bytes, one after the other."""
    digest = hashlib.sha256()
    for image in images:
        digest.update(image if isinstance(image, bytes) else np.ascontiguousarray(image).tobytes())
    return digest.hexdigest()


# ---- layouts -------------------------------------------------------------------------------------------------------


def folders(src: Path, download: bool = False) -> Splits:
    """src/train/<class>/* and src/val/<class>/*, as torchvision's ImageFolder; one of the two may be missing."""
    found = {split: folders_of(src / split) for split in ("train", "val") if (src / split).is_dir()}
    if not found:
        raise UserError(f"{src} has neither a folder train/ nor a folder val/ with one folder per class")
    return found


def imagenet(src: Path, download: bool = False) -> Splits:
    """ILSVRC2012 as people have it, each split in whichever form is there.

    train: train/<synset>/*, or ILSVRC2012_img_train.tar. val: val/<synset>/*, or val/*.JPEG, or
    ILSVRC2012_img_val.tar; the last two with a ground truth file (see `validation_synsets`).
    """
    result: Splits = {}
    if (src / "train").is_dir():
        result["train"] = folders_of(src / "train")
    elif (src / "ILSVRC2012_img_train.tar").exists():
        result["train"] = train_tar(src / "ILSVRC2012_img_train.tar")
    val, tar = src / "val", src / "ILSVRC2012_img_val.tar"
    if val.is_dir() and classes_in(val):
        if flat := images_beside(val):  # moving them into folders was cut short
            raise UserError(
                f"{val} has class folders and {plural(len(flat), 'image', ',')} next to them ({flat[0]} ...): move them"
            )
        result["val"] = folders_of(val)
    elif val.is_dir():
        names = images_beside(val)
        classes, labels = _validation_labels(src, names)
        result["val"] = of_files(classes, labels, val, names)
    elif tar.exists():
        members = Members()
        members.extend(sorted((m.name, m.offset_data, m.size) for m in _members(tar)))
        classes, labels = _validation_labels(src, members.names)
        result["val"] = _of_tar(tar, classes, labels, members)
    if not result:
        raise UserError(f"{src} has neither train/, val/ nor the tar files of ILSVRC2012")
    return result


def folders_of(root: Path) -> RawSplit:
    """One split's class folders."""
    source = FolderSource(root)
    remark = ""
    if beside := images_beside(root):
        remark = f"{plural(len(beside), 'image', ',')} next to the class folders left out, such as {beside[0]}"
    return of_files(source.classes, source.labels, source.root, source.files, remark)


def train_tar(path: Path) -> RawSplit:
    """The tar of 1,000 tars of ILSVRC2012's training images, in the order of the unpacked class folders."""
    members, labels, classes = Members(), array("q"), []
    for outer in sorted(_members(path, (".tar",)), key=lambda m: m.name):
        classes.append(Path(outer.name).stem)
        with open(path, "rb") as file:
            file.seek(outer.offset_data)
            try:
                with tarfile.open(fileobj=file, mode="r:") as inner:
                    own = sorted((m.name, m.offset_data, m.size) for m in inner if m.isfile() and is_image(m.name))
            except tarfile.TarError as error:
                raise UserError(f"{path} is damaged: {outer.name}: {error}") from None
        if not own:
            raise UserError(f"{path} is damaged: {outer.name} has no images")
        members.extend((f"{classes[-1]}/{name}", at, size) for name, at, size in own)
        labels.extend([len(classes) - 1] * len(own))
    if len(set(classes)) < len(classes):
        raise UserError(f"{path} is damaged: it has a class twice")
    return _of_tar(path, classes, labels, members)


def _members(path: Path, suffixes: tuple[str, ...] = (".jpeg", ".jpg")) -> list[tarfile.TarInfo]:
    """The files of an archive with these endings, without hidden ones."""
    try:
        with tarfile.open(path, "r:") as archive:
            names = ((m, Path(m.name).name) for m in archive if m.isfile())
            return [m for m, name in names if name.lower().endswith(suffixes) and not is_hidden(name)]
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


class Members:
    """Where files lie in an archive: as tuples in a list, those of ImageNet would take four times the memory."""

    def __init__(self) -> None:
        self.names, self.starts, self.sizes = Names(), array("q"), array("q")

    def extend(self, members: Iterable[tuple[str, int, int]]) -> None:
        """Append (name, offset, bytes) of files."""
        columns = self.names, self.starts, self.sizes
        for column, values in zip(columns, zip(*members, strict=True), strict=False):  # none where there are no files
            column.extend(values)


def _of_tar(path: Path, classes: list[str], labels: Sequence[int], members: Members) -> RawSplit:
    """Files within an uncompressed archive, read in place."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # until the process ends: there is one of it per command
    stat = os.fstat(descriptor)
    return RawSplit(
        classes,
        np.array(labels, np.int64),
        members.names,
        lambda i: os.pread(descriptor, members.sizes[i], members.starts[i]),
        lambda: [str(path.name), stat.st_size, stat.st_mtime_ns],
    )


def validation_synsets(src: Path) -> dict[int, str]:
    """{image number: synset} of ILSVRC2012's validation images.

    From LOC_val_solution.csv (Kaggle), imagenet_2012_validation_synset_labels.txt (a synset per line, in order), or
    ILSVRC2012_devkit_t12.tar.gz, whose ground truth counts classes in an order of its own.
    """
    kaggle = src / "LOC_val_solution.csv"
    if kaggle.exists():
        rows = re.findall(r"ILSVRC2012_val_(\d{8}),(n\d{8})", kaggle.read_text(errors="replace"))
        return {int(number): synset for number, synset in rows}
    lines = src / "imagenet_2012_validation_synset_labels.txt"
    if lines.exists():
        return dict(enumerate(lines.read_text(errors="replace").split(), 1))
    kit = src / "ILSVRC2012_devkit_t12.tar.gz"
    if kit.exists():
        return dict(enumerate(_devkit(kit), 1))
    names = f"{kaggle.name}, {lines.name} or {kit.name}"
    raise UserError(f"{src} has validation images without class folders, and none of {names} to label them")


def _devkit(path: Path) -> list[str]:
    from scipy.io import loadmat

    try:
        with tarfile.open(path) as archive:
            parts = {Path(m.name).name: archive.extractfile(m) for m in archive if m.isfile()}
            meta = loadmat(parts["meta.mat"], squeeze_me=True)["synsets"]  # pyright: ignore[reportArgumentType]
            truth = parts["ILSVRC2012_validation_ground_truth.txt"]
            assert truth is not None
            numbers = [int(line) for line in truth.read().split()]
        synset = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in meta}
        return [synset[number] for number in numbers]
    except Exception as error:  # gzip, tar and scipy each have their own for a damaged file
        raise UserError(f"cannot read {path}: {error}") from None


def _validation_labels(src: Path, names: Sequence[str]) -> tuple[list[str], list[int]]:
    known = validation_synsets(src)
    classes = sorted(set(known.values()))
    place = {synset: i for i, synset in enumerate(classes)}
    numbers: dict[int, str] = {}
    for name in names:
        found = re.match(r"ILSVRC2012_val_(\d{8})(?!\d)", Path(name).name)
        if found is None or int(found[1]) not in known:
            raise UserError(f"{name} has no line in the ground truth")
        if (other := numbers.setdefault(int(found[1]), name)) != name:
            raise UserError(f"{other} and {name} have the same number: one of them is a copy")
    return classes, [place[known[number]] for number in numbers]


def arrays(src: Path, download: bool = False) -> Splits:
    """A .npz with train_images, train_labels, test_images, test_labels, and class_names if they have names.

    Images are uint8 [N, H, W] or [N, H, W, 3], stored without loss. Or they are encoded files: <split>_data, uint8 (all
    bytes after another), with <split>_offsets, int [N + 1], and `header`, uint8, where each lacks a common start.
    Arrays of Python objects are refused, since reading them can run any program.
    """
    try:
        with np.load(src) as file:
            content = {key: file[key] for key in file.files}
    except Exception as error:  # zip, pickle and numpy each have their own for a damaged file
        reason = "it holds Python objects; store arrays of numbers or text" if "pickle" in str(error) else error
        raise UserError(f"cannot read {src}: {reason}") from None
    result: Splits = {}
    for split, prefix in (("train", "train"), ("val", "test")):
        if f"{prefix}_labels" not in content:
            continue
        labels, images = content[f"{prefix}_labels"], _images_of(content, prefix, src)
        if labels.shape != (len(images),) or not len(labels) or labels.dtype.kind not in "iu" or labels.min() < 0:
            wanted = f"integers from 0, one for each of its {plural(len(images), 'image')}"
            raise UserError(f"{src}: {prefix}_labels must be {wanted}, not {labels.dtype} {list(labels.shape)}")
        classes = content.get("class_names", np.arange(int(labels.max()) + 1)).astype(str).tolist()
        if len(classes) <= labels.max():
            raise UserError(f"{src} has {len(classes)} class_names, but label {labels.max()} in {prefix}")
        result[split] = of_arrays(classes, labels, images, prefix)
    if not result:
        raise UserError(f"{src} has no train_labels and no test_labels")
    return result


def _images_of(content: dict[str, np.ndarray], prefix: str, src: Path) -> Any:
    if f"{prefix}_images" in content:
        images = content[f"{prefix}_images"]
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in ((), (3,)):
            raise UserError(f"{src}: {prefix}_images must be uint8 [N, H, W] or [N, H, W, 3]")
        return images
    if f"{prefix}_data" not in content or f"{prefix}_offsets" not in content:
        raise UserError(f"{src} has neither {prefix}_images nor {prefix}_data with {prefix}_offsets")
    start, data = content.get("header", np.empty(0, np.uint8)).tobytes(), content[f"{prefix}_data"].tobytes()
    ends = content[f"{prefix}_offsets"].astype(np.int64).tolist()
    return [start + data[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]


def huggingface(src: Path, download: bool = False) -> Splits:
    """What `datasets.DatasetDict.save_to_disk` left: a column of images, one of class labels."""
    try:
        import datasets
    except ImportError:
        raise UserError("`sam-repro write hf` needs the package datasets: pip install datasets") from None
    try:
        loaded = datasets.load_from_disk(str(src))
    except (OSError, ValueError) as error:
        raise UserError(f"{src} is not a data set on disk: {error}") from None
    result: Splits = {}
    for split, names in (("train", ("train",)), ("val", ("val", "validation", "test"))):
        name = next((n for n in names if n in loaded), None)
        if name is None:
            continue
        table = loaded[name]
        image = next((k for k, f in table.features.items() if isinstance(f, datasets.Image)), None)
        label = next((k for k, f in table.features.items() if isinstance(f, datasets.ClassLabel)), None)
        if image is None or label is None:
            raise UserError(f"{src}: {name} needs a column of images and one of class labels")
        encoded = table.cast_column(image, datasets.Image(decode=False))

        def read(i: int, encoded=encoded, image=image) -> bytes:
            entry = encoded[int(i)][image]
            return entry["bytes"] if entry["bytes"] is not None else Path(entry["path"]).read_bytes()

        labels = np.array(table[label], np.int64)
        names = [f"{name}[{i}]" for i in range(len(labels))]
        stamp = [table._fingerprint, len(labels)]
        result[split] = RawSplit(table.features[label].names, labels, names, read, lambda stamp=stamp: stamp)
    if not result:
        raise UserError(f"{src} has no split train and no split validation")
    return result
