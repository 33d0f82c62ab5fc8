"""Class folders of images to train.beton and val.beton.

A JPEG that FFCV can decode and that is small enough keeps its original bytes: writing loses nothing. Larger images,
other formats and CMYK are re-encoded. EXIF orientation is not applied, as TensorFlow's pipelines do not.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from sam_repro.data.batches import worker_count
from sam_repro.data.beton import METADATA_AT, MIN_SIDE, PAGE, BetonFile, remove_leftovers, write_beton
from sam_repro.data.datasets import FolderSource
from sam_repro.data.manifest import TOOL, check_manifest, manifest_path, write_manifest
from sam_repro.errors import UserError

ESTIMATE_FILES = 64


class Encoded(NamedTuple):
    """One image as it will be stored."""

    jpeg: bytes
    height: int  # pixels
    width: int
    reencoded: bool


def encode(data: bytes, *, max_side: int, quality: int) -> Encoded:
    """The JPEG to store for an image file's bytes: these bytes if they will do, else a re-encoded image.

    The image is decoded completely either way. Raises ValueError or OSError when that fails or it is too small.
    """
    image = Image.open(io.BytesIO(data))
    width, height = image.size
    fits = max(width, height) <= max_side
    if image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB") and fits:
        image.load()
        encoded = Encoded(data, height, width, False)
    else:
        pixels = np.asarray(image.convert("RGB"))
        if not fits:
            scale = max_side / max(width, height)
            size = max(round(width * scale), 1), max(round(height * scale), 1)
            pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
        bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
        done, stream = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
        assert done
        encoded = Encoded(stream.tobytes(), *pixels.shape[:2], True)
    if min(encoded.height, encoded.width) < MIN_SIDE:
        raise ValueError(f"{encoded.width}x{encoded.height} pixels are too few, a side needs {MIN_SIDE}")
    if len(encoded.jpeg) > PAGE:
        raise ValueError(f"its {len(encoded.jpeg)} bytes exceed {PAGE}; a smaller max_side re-encodes it")
    return encoded


def write_dataset(
    src: str | Path,
    dst: str | Path,
    *,
    splits: Sequence[str] = ("train", "val"),
    max_side: int = 500,
    quality: int = 90,
    skip_bad: bool = False,
    num_classes: int | None = None,
    workers: int = 0,
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Write src/<split>/<class>/* to dst/<split>.beton with a manifest each, and return the manifests.

    A split whose inputs and settings did not change is left as it is.

    Args:
        max_side: pixels; larger images are shrunk to it by area averaging and re-encoded.
        quality: JPEG quality of re-encoded images.
        skip_bad: leave unreadable images out and list them in the manifest, instead of stopping.
        num_classes: how many class folders there must be; None: as many as there are.
        workers: decoding threads; 0: the cores of this machine, at most 16.

    Raises:
        UserError: bad folders, an unreadable image (named), other classes in one split than in another, a full disk.
    """
    src, dst = Path(src), Path(dst)
    if not src.is_dir():
        raise UserError(f"there is no folder {src}")
    sources = {split: FolderSource(src / split) for split in splits}
    classes = next(iter(sources.values())).classes
    for split, source in sources.items():
        if num_classes is not None and len(source.classes) != num_classes:
            raise UserError(f"{source.root} has {len(source.classes)} class folders, expected {num_classes}")
        if source.classes != classes:
            odd = sorted(set(source.classes) ^ set(classes))[0]
            raise UserError(f"{split} has other class folders than {splits[0]}, for example {odd}")
    dst.mkdir(parents=True, exist_ok=True)
    rule = {"max_side": max_side, "quality": quality, "skip_bad": skip_bad}
    with ThreadPoolExecutor(worker_count(workers, 1)) as pool:
        return {
            split: _write_split(source, dst / f"{split}.beton", rule, pool, progress)
            for split, source in sources.items()
        }


def _write_split(
    source: FolderSource, beton: Path, rule: dict[str, Any], pool: ThreadPoolExecutor, progress: bool
) -> dict[str, Any]:
    remove_leftovers(beton)
    fingerprint = _fingerprint(source, rule)
    done = _up_to_date(beton, fingerprint)
    if done is not None:
        print(f"{beton} is up to date")
        return done
    paths = [source.root / file for file in source.files]
    _estimate(paths, beton, rule, pool)
    skipped: list[str] = []
    reencoded = 0

    def samples() -> Iterator[tuple[bytes, int, int, int]]:
        nonlocal reencoded
        results = _ordered(paths, rule, pool)
        for index, result in enumerate(tqdm(results, beton.name, len(paths), unit="image", disable=not progress)):
            if isinstance(result, Encoded):
                reencoded += result.reencoded
                yield result.jpeg, result.height, result.width, int(source.labels[index])
            elif rule["skip_bad"]:
                skipped.append(source.files[index])
            else:
                raise UserError(f"cannot use {paths[index]}: {result}; skip_bad leaves such files out")

    write_beton(beton, samples(), capacity=len(paths))
    return write_manifest(beton, source.classes, rule=rule, source=fingerprint, reencoded=reencoded, skipped=skipped)


def _ordered(paths: list[Path], rule: dict[str, Any], pool: ThreadPoolExecutor) -> Iterator[Encoded | Exception]:
    """The encoded images in the order of `paths`, or what went wrong; a bounded number is in memory."""
    pending: deque = deque()
    try:
        for path in paths:
            pending.append(pool.submit(_load, path, rule))
            if len(pending) > 256:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for task in pending:
            task.cancel()


def _load(path: Path, rule: dict[str, Any]) -> Encoded | Exception:
    try:
        return encode(path.read_bytes(), max_side=rule["max_side"], quality=rule["quality"])
    except Exception as error:  # Pillow raises many types for damaged files; the caller names the file
        return error


def _estimate(paths: list[Path], beton: Path, rule: dict[str, Any], pool: ThreadPoolExecutor) -> None:
    """Print what the file will weigh and take, from a sample. Raises UserError when the disk is too small."""
    some = [paths[i] for i in np.linspace(0, len(paths) - 1, min(len(paths), ESTIMATE_FILES)).astype(int)]
    began = time.perf_counter()
    results: Iterable[Encoded | Exception] = _ordered(some, rule, pool)
    sizes = [len(result.jpeg) for result in results if isinstance(result, Encoded)]
    minutes = (time.perf_counter() - began) / len(some) * len(paths) / 60
    size = METADATA_AT + len(paths) * (float(np.mean(sizes)) + 48 if sizes else 0) + 2 * PAGE
    free = shutil.disk_usage(beton.parent).free
    print(f"{beton}: {len(paths):,} images, about {size / 1e9:.2f} GB and {minutes:.1f} minutes", flush=True)
    if size > free:
        raise UserError(f"{beton.parent} has {free / 1e9:.1f} GB free; {beton.name} needs about {size / 1e9:.1f} GB")


def _fingerprint(source: FolderSource, rule: dict[str, Any]) -> str:
    """Of everything that decides the result: file names, sizes and times, and the settings."""
    listing = []
    for file in source.files:
        stat = (source.root / file).stat()
        listing.append([file, stat.st_size, stat.st_mtime_ns])
    return hashlib.sha256(json.dumps([TOOL, rule, listing]).encode()).hexdigest()


def _up_to_date(beton: Path, fingerprint: str) -> dict[str, Any] | None:
    """The manifest of a file that was written from the same inputs and is still intact, else None."""
    if not (beton.exists() and manifest_path(beton).exists()):
        return None
    try:
        file = BetonFile.open(beton)
    except UserError:
        return None  # damaged: written again
    try:
        content = check_manifest(file)
    except UserError:
        return None
    finally:
        file.close()
    return content if content.get("source") == fingerprint else None
