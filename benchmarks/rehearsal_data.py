"""Data of ImageNet's shape from any folder of photographs: its counts and names, other pixels.

The 1,000 synsets are the real ones (timm lists them), and the totals are: 1,281,167 training and 50,000 validation
images. The official number of images per class is not at hand. Ours are made up to fit what is published of them: 895
classes have 1,300, the other 105 between 732 and 1,299.
"""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from sam_repro.data.beton import BetonWriter
from sam_repro.data.images.decode import decode
from sam_repro.data.manifest import write_manifest

TRAIN, VAL, LARGEST, FULL_CLASSES, SMALLEST = 1_281_167, 50_000, 1300, 895, 732
WHAT = (
    "ImageNet's shape, not its pixels: the real 1,000 synsets and totals; counts per class made up to fit what is "
    "published (895 of 1,300, the others 732 to 1,299); photographs repeated"
)


def class_counts(total: int = TRAIN) -> np.ndarray:
    """int64 [1000]: training images per class, in the order of the synsets; a smaller total is scaled down."""
    few = np.random.default_rng(0).permutation(1000)[FULL_CLASSES:]
    rest, span = TRAIN - FULL_CLASSES * LARGEST, LARGEST - 1 - SMALLEST
    bend = span / (rest / len(few) - SMALLEST) - 1  # of a power of a straight line, so that the sum is right
    counts = np.full(1000, LARGEST)
    counts[few] = SMALLEST + (np.linspace(0, 1, len(few)) ** bend * span).astype(int)
    missing = TRAIN - int(counts.sum())  # what rounding lost
    counts[few[1 : 1 + missing % (len(few) - 2)]] += 1
    counts[few[1:-1]] += missing // (len(few) - 2)
    assert counts.sum() == TRAIN and counts.min() == SMALLEST and counts[few].max() < LARGEST
    if total != TRAIN:
        counts = np.diff((np.cumsum(counts) * total / TRAIN).astype(int), prepend=0)
    assert counts.min() > 0, f"{total} images leave a class empty"
    return counts


def synsets() -> list[str]:
    """The 1,000 classes of ILSVRC2012, sorted."""
    from timm.data import ImageNetInfo  # half a gigabyte, which children would inherit in their peak

    return ImageNetInfo().label_names()


def photographs(folder: Path, smallest: int, side: int, most: int = 1000) -> list[tuple[bytes, int, int]]:
    """(JPEG, height, width) of at most `most` photographs in a folder, evenly chosen.

    Args:
        smallest: bytes that a JPEG has at least on average; the quality is chosen for it.
        side: pixels of the longer side, to which each is scaled.
    """
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    assert files, f"{folder} has no JPEGs"
    chosen = [files[i] for i in np.linspace(0, len(files) - 1, min(most, len(files))).astype(int)]
    images = [scaled(decode(path.read_bytes(), str(path)), side) for path in chosen]
    for quality in (50, 60, 70, 75, 80, 85, 90, 93, 95, 97, 99):
        if np.mean([len(jpeg(image, quality)) for image in images[:: max(1, len(images) // 32)]]) >= smallest:
            break
    return [(jpeg(image, quality), *image.shape[:2]) for image in images]


def scaled(image: np.ndarray, side: int) -> np.ndarray:
    """An image whose longer side has `side` pixels."""
    scale = side / max(image.shape[:2])
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return cv2.resize(image, (round(image.shape[1] * scale), round(image.shape[0] * scale)), interpolation=how)


def jpeg(image: np.ndarray, quality: int) -> bytes:
    """An RGB image as a JPEG."""
    done, stream = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert done
    return stream.tobytes()


def make_beton(
    path: Path, photos: list[tuple[bytes, int, int]], counts: np.ndarray, *, seconds: float, reserve: float
) -> dict[str, Any]:
    """Write a .beton file with its manifest, the quick way: samples stored for `seconds`, later ones point at those.

    Sample i of class c is one of every 1,000th photograph from the c-th on, so a class has photographs of its own as
    far as there are enough.

    Args:
        counts: int64 [classes], of its images.
        reserve: bytes of the disk that stay free.

    Returns:
        what was written: samples, how many are stored, bytes.
    """
    labels = np.repeat(np.arange(len(counts)), counts)
    places = np.concatenate([np.arange(n) for n in counts])
    which = photo_of(labels, places, len(photos))
    began, stored_bytes = time.perf_counter(), 0
    room = shutil.disk_usage(path.parent).free - reserve
    order = np.random.default_rng(1).permutation(len(labels))  # so that those stored are of every class
    with open(path, "wb") as file:
        writer = BetonWriter(file, len(labels))
        for i in order:
            data, height, width = photos[which[i]]
            if writer.count and (stored_bytes > room or time.perf_counter() - began > seconds):
                break
            stored_bytes += writer.add(data, height, width, int(labels[i]), False)[1]
        stored = writer.count
        share_stored(writer, which[order[:stored]], which, labels)
        writer.finish()
    names = synsets() if len(counts) == 1000 else [f"c{i}" for i in range(len(counts))]
    write_manifest(path, names, rehearsal=WHAT)
    wrote = {"samples": len(labels), "stored": stored, "bytes_stored": stored_bytes}
    return wrote | {"bytes_per_image": round(stored_bytes / stored), "seconds": time.perf_counter() - began}


def share_stored(writer: BetonWriter, stored: np.ndarray, wanted: np.ndarray, labels: np.ndarray) -> None:
    """Lay out the table of all samples over those that are stored, each stored one used about equally often.

    Args:
        stored: int [stored], the photograph of each stored sample; wanted: int [samples], of each sample.
    """
    by_photo = {int(photo): np.flatnonzero(stored == photo) for photo in np.unique(stored)}
    spare, used, place = np.arange(len(stored)), {}, np.zeros(len(wanted), np.int64)
    for i, photo in enumerate(wanted):
        own = by_photo.get(int(photo), spare)
        used[int(photo)] = turn = used.get(int(photo), -1) + 1
        place[i] = own[turn % len(own)]
    metadata, allocations = writer.metadata[place], writer.allocations[place]
    metadata["label"], allocations["sample"] = labels, np.arange(len(labels))
    writer.metadata[:], writer.allocations[:] = metadata, allocations
    writer.count = len(labels)


# ---- the layouts in which people have ImageNet ----------------------------------------------------------------------


def make_folders(root: Path, photos: list[tuple[bytes, int, int]], counts: np.ndarray, val: int) -> None:
    """root/train/<synset>/*.JPEG and root/val/<synset>/*.JPEG: hard links to one file per photograph."""
    pool = store_photos(root, photos)
    for split, per_class in (("train", counts), ("val", np.full(1000, val // 1000))):
        for label, (synset, count) in enumerate(zip(synsets(), per_class, strict=True)):
            folder = root / split / synset
            folder.mkdir(parents=True)
            for i in range(count):
                os.link(pool[photo_of(label, i, len(pool))], f"{folder}/{synset}_{i}.JPEG")


def make_tars(root: Path, photos: list[tuple[bytes, int, int]], counts: np.ndarray, val: int) -> None:
    """root/ILSVRC2012_img_train.tar, a tar of 1,000 tars; ILSVRC2012_img_val.tar with its list of synsets."""
    root.mkdir(parents=True)
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as outer:
        for label, (synset, count) in enumerate(zip(synsets(), counts, strict=True)):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as archive:
                for i in range(count):
                    add_member(archive, f"{synset}_{i}.JPEG", photos[photo_of(label, i, len(photos))][0])
            add_member(outer, f"{synset}.tar", inner.getvalue())
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as archive:
        for name, label, i in validation_names(val):
            add_member(archive, name, photos[photo_of(label, i, len(photos))][0])
    write_validation_labels(root, val)


def make_flat(root: Path, photos: list[tuple[bytes, int, int]], val: int) -> None:
    """root/val/ILSVRC2012_val_*.JPEG, flat, with the list of synsets."""
    pool = store_photos(root, photos)
    (root / "val").mkdir()
    for name, label, i in validation_names(val):
        os.link(pool[photo_of(label, i, len(pool))], f"{root}/val/{name}")
    write_validation_labels(root, val)


def store_photos(root: Path, photos: list[tuple[bytes, int, int]]) -> list[str]:
    """The photographs as files in root/photographs, to which the others are links; their paths."""
    folder = root / "photographs"
    folder.mkdir(parents=True)
    for i, (data, _, _) in enumerate(photos):
        (folder / f"{i}.JPEG").write_bytes(data)
    return [f"{folder}/{i}.JPEG" for i in range(len(photos))]


def photo_of(label: Any, place: Any, photos: int) -> Any:
    """Which photograph the `place`-th image of a class is: every 1,000th from the label on."""
    return (label + 1000 * place) % photos


def validation_names(val: int) -> Iterator[tuple[str, int, int]]:
    """(file name, label, place within the class) of each validation image: the classes in turn."""
    for i in range(val):
        yield f"ILSVRC2012_val_{i + 1:08d}.JPEG", i % 1000, i // 1000


def write_validation_labels(root: Path, val: int) -> None:
    """The list that names the synset of each validation image."""
    names = synsets()
    lines = "".join(f"{names[label]}\n" for _, label, _ in validation_names(val))
    (root / "imagenet_2012_validation_synset_labels.txt").write_text(lines)


def add_member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """A file with this content."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))
