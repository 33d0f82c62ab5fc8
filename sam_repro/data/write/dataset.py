"""Write a data set as train.beton and val.beton, each with a manifest."""

from __future__ import annotations

import hashlib
import io
import json
import math
import shutil
import time
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from sam_repro.data.beton import CRC, MAX_SIDE, METADATA_AT, MIN_SIDE, PAGE, BetonFile
from sam_repro.data.images import jpeg
from sam_repro.data.images.decode import decode, reason, rgb
from sam_repro.data.loaders.threads import worker_count
from sam_repro.data.manifest import TOOL, check_manifest, manifest_path, read_manifest, write_manifest
from sam_repro.data.write import layouts, torchvision
from sam_repro.data.write.layouts import RawSplit, Splits
from sam_repro.data.write.partial import RECODED, REENCODED, PartialBeton
from sam_repro.errors import UserError, plural

ESTIMATE_FILES = 64
WHOLE = {  # layout: {split: (classes, images)}
    "imagenet": {"train": (1000, 1_281_167), "val": (1000, 50_000)},
    "imagenette": {"train": (10, 9_469), "val": (10, 3_925)},
    "imagewoof": {"train": (10, 9_025), "val": (10, 3_929)},
}
DOWNLOADS = ("cifar10", "cifar100", "flowers", "imagenette", "pets")
LAYOUTS = {
    "imagefolder": layouts.folders,
    "imagenet": layouts.imagenet,
    "imagewoof": layouts.folders,
    "imagenette": torchvision.imagenette,
    "cifar10": torchvision.cifar10,
    "cifar100": torchvision.cifar100,
    "flowers": torchvision.flowers,
    "pets": torchvision.pets,
    "arrays": layouts.arrays,
    "hf": layouts.huggingface,
}


class Encoded(NamedTuple):
    """One image as it will be stored."""

    data: bytes  # a JPEG, or raw pixels
    height: int  # pixels
    width: int
    reencoded: bool
    raw: bool = False
    recoded: bool = False  # a JPEG whose coefficients are kept, in restart segments


def encode(data: bytes | np.ndarray, *, max_side: int, quality: int, segment: int = 0) -> Encoded:
    """What to store for an image: its coefficients or bytes if they will do, else a re-encoded image.

    A JPEG that is small enough, grey or of three colours keeps its bytes; with `segment`, its coefficients. Pixels
    (uint8 [H, W] or [H, W, 3]) are stored as they are, unless they are too large. The image is decoded completely
    either way, as every reader does it.

    Args:
        data: an image file, or pixels.
        max_side: pixels; a larger image is shrunk to it by area averaging.
        quality: of a re-encoded JPEG.
        segment: pixels between two restart markers, about; 0 leaves JPEGs as they are (see jpeg.recode).

    Raises:
        ValueError, OSError: the image is damaged, too small, or too large for the format.
    """
    kept, raw = None, isinstance(data, np.ndarray)
    if isinstance(data, np.ndarray):
        pixels = np.ascontiguousarray(data if data.ndim == 3 else np.repeat(data[..., None], 3, 2))
        kept = pixels.tobytes()
    else:
        with Image.open(io.BytesIO(data)) as image:
            if image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB"):
                kept = data
            pixels = rgb(image)
    height, width = pixels.shape[:2]
    if kept is None or max(height, width) > max_side:
        raw = False
        if max(height, width) > max_side:
            scale = max_side / max(height, width)
            size = max(round(width * scale), 1), max(round(height * scale), 1)
            pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
        bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
        done, stream = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])
        assert done
        encoded = Encoded(stream.tobytes(), *pixels.shape[:2], True)
    else:
        encoded = Encoded(kept, height, width, False, raw)
    if segment and not raw and encoded.width > segment:  # else a row would be one segment
        encoded = _in_segments(encoded, decode(encoded.data, "it") if encoded.reencoded else pixels, segment)
    if min(encoded.height, encoded.width) < MIN_SIDE:
        raise ValueError(f"{encoded.width}x{encoded.height} pixels are too few, a side needs {MIN_SIDE}")
    if len(encoded.data) > PAGE - CRC:
        raise ValueError(f"its {len(encoded.data)} bytes exceed {PAGE - CRC}; a smaller max_side re-encodes it")
    return encoded


def _in_segments(encoded: Encoded, pixels: np.ndarray, segment: int) -> Encoded:
    """The image recoded, if that leaves each of its pixels (uint8 [H, W, 3]) as it is; else the image as it is."""
    recoded = jpeg.recode(encoded.data, segment)
    if recoded is None or not np.array_equal(decode(recoded, "it"), pixels):
        return encoded
    return encoded._replace(data=recoded, recoded=True)


def write_dataset(
    src: str | Path,
    dst: str | Path,
    *,
    layout: str = "imagefolder",
    download: bool = False,
    max_side: int = 500,
    quality: int = 90,
    segment: int = 64,
    skip_bad: bool = False,
    num_classes: int | None = None,
    workers: int = 0,
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Write the splits found in `src` to `dst/<split>.beton` with a manifest each, and return the manifests.

    A split whose images and settings did not change is left as it is; one that was not finished is gone on with.

    Args:
        layout: a name in LAYOUTS.
        download: let torchvision fetch the data first.
        max_side: pixels; larger images are shrunk to it by area averaging and re-encoded.
        quality: JPEG quality of re-encoded images.
        segment: pixels between the restart markers, about, with which JPEGs are recoded; 0: their bytes are kept.
        skip_bad: leave unreadable images out and list them in the manifest, instead of stopping.
        num_classes: how many classes there must be; None: as many as there are.
        workers: decoding threads; 0: the cores of this machine, at most 16.

    Raises:
        UserError: bad folders, an unreadable image (named), other classes in one split than in another, a full disk.
    """
    src, dst = Path(src).expanduser(), Path(dst).expanduser()
    if max_side < MIN_SIDE or not 1 <= quality <= 100:
        raise UserError(f"max_side={max_side} must be at least {MIN_SIDE}, and quality={quality} lie in 1 to 100")
    if not 0 <= segment <= MAX_SIDE:
        raise UserError(f"segment={segment} must lie in 0 to {MAX_SIDE}")
    if download and layout not in DOWNLOADS:
        raise UserError(f"--download is for {', '.join(DOWNLOADS)}; {layout} is read from --src")
    if download:
        src.mkdir(parents=True, exist_ok=True)
    if not src.exists():
        raise UserError(f"there is no folder {src}" if layout != "arrays" else f"there is no file {src}")
    splits = LAYOUTS[layout](src, download)
    _check_classes(splits, src, dst, num_classes)
    for split, raw in splits.items():
        _check_names(split, raw)
        for remark in _remarks(split, raw, layout):
            print(remark, flush=True)
    dst.mkdir(parents=True, exist_ok=True)
    rule = {"max_side": max_side, "quality": quality, "skip_bad": skip_bad}
    if segment and (obstacle := jpeg.load()):
        print(f"JPEGs keep their bytes, and crops decode slower: {obstacle}", flush=True)
    elif segment:  # without it the rule is that of files from before there were segments
        rule["segment"] = segment
    with ThreadPoolExecutor(worker_count(workers, 1)) as pool:
        return {s: _write_split(raw, dst / f"{s}.beton", rule, pool, progress) for s, raw in splits.items()}


def _check_classes(splits: Splits, src: Path, dst: Path, num_classes: int | None) -> None:
    """Refuse splits whose labels would mean different things, here or in a file that is already there."""
    first, classes = next((split, raw.classes) for split, raw in splits.items())
    if num_classes is not None and len(classes) != num_classes:
        raise UserError(f"{src} has {plural(len(classes), 'class folder')}, expected {num_classes}")
    for split, raw in splits.items():
        if raw.classes != classes:
            raise UserError(f"{split} has other class folders than {first}, {difference(raw.classes, classes)}")
    for there in (dst / f"{s}.beton" for s in ("train", "val") if s not in splits):
        if manifest_path(there).exists() and (old := read_manifest(there)["classes"]) != classes:
            differs = f"{there} has other classes than {src}, {difference(old, classes)}"
            raise UserError(f"{differs}; write to another folder, or remove that file and its manifest first")


def _check_names(split: str, raw: RawSplit) -> None:
    """Refuse names that a list with one name per line cannot hold."""
    for name in (*raw.classes, *raw.names):
        if "\n" in name:
            raise UserError(f"{split}: the name {name!r} has a line break in it; rename the file")


def _remarks(split: str, raw: RawSplit, layout: str) -> Iterator[str]:
    """What a user should know before the images are read: one sentence each."""
    whole = WHOLE.get(layout, {}).get(split)
    if whole and (len(raw.classes), len(raw.labels)) != whole:  # allowed, but an unpacking that was cut looks like this
        there = f"{split} has {plural(len(raw.labels), 'image', ',')} in {plural(len(raw.classes), 'class', ',')}"
        yield f"{there}; all of {layout} would be {plural(whole[1], 'image', ',')} in {plural(whole[0], 'class', ',')}"
    if raw.remark:
        yield f"{split}: {raw.remark}"
    spelt: dict[str, str] = {}
    for name in raw.classes:
        if (twin := spelt.setdefault(spelling(name), name)) != name:
            yield f"{split}: the classes {twin} and {name} differ only in spelling (case or accents): are they one?"


def spelling(name: str) -> str:
    """What names have in common that only case or the form of Unicode tells apart."""
    return unicodedata.normalize("NFC", name).casefold()


def difference(some: list[str], others: list[str]) -> str:
    """An example of how two lists of classes differ, as a clause."""
    alone = sorted(set(some) ^ set(others))
    if not alone:
        return f"for example {next(a for a, b in zip(some, others, strict=False) if a != b)}, in another order"
    twins = [name for name in alone if spelling(name) == spelling(alone[0])]
    if len(twins) > 1:
        return f"for example {ascii(twins[0])} and {ascii(twins[1])}, which differ only in case or accents"
    return f"for example {alone[0]}"


def _write_split(
    raw: RawSplit, beton: Path, rule: dict[str, Any], pool: ThreadPoolExecutor, progress: bool
) -> dict[str, Any]:
    fingerprint, key = _fingerprints(rule, raw.stamp())
    done = _up_to_date(beton, fingerprint)
    if done is not None:
        print(f"{beton} is up to date")
        return done
    count = len(raw.labels)
    with PartialBeton(beton, key, count, gaps=rule["skip_bad"]) as partial:
        start = partial.next_image
        if start:
            print(f"{beton}: going on after {start:,} of {plural(count, 'image', ',')}", flush=True)
        else:
            _estimate(raw, beton, rule, pool)
        results = _ordered(raw, range(start, count), rule, pool)
        bar = tqdm(results, beton.name, count, initial=start, unit="image", disable=not progress)
        for image, result in enumerate(bar, start):
            if isinstance(result, Encoded):
                sample = result.data, result.height, result.width, int(raw.labels[image]), result.raw
                partial.add(image, sample, REENCODED * result.reencoded | RECODED * result.recoded)
            elif not rule["skip_bad"]:
                name = f"{raw.names[image]} ({beton.stem})"
                raise UserError(f"cannot use {name}: {reason(result)}; --skip-bad leaves such images out")
        partial.finish()
    kept = np.zeros(count, np.bool_)
    kept[partial.images] = True
    skipped = [raw.names[image] for image in np.flatnonzero(~kept)]
    files = (raw.names[image] for image in np.flatnonzero(kept))
    facts = {"rule": rule, "source": fingerprint, "reencoded": partial.total(REENCODED), "skipped": skipped}
    if "segment" in rule:
        facts["recoded"] = {"images": partial.total(RECODED), "coefficients": "kept"}
    manifest = write_manifest(beton, raw.classes, files=files, **facts)
    partial.forget()
    return manifest


def _ordered(
    raw: RawSplit, indices: Iterable[int], rule: dict[str, Any], pool: ThreadPoolExecutor
) -> Iterator[Encoded | Exception]:
    """The encoded images in order, or what went wrong; a bounded number is in memory."""
    pending: deque = deque()
    try:
        for index in indices:
            pending.append(pool.submit(_load, raw, index, rule))
            if len(pending) > 256:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for task in pending:
            task.cancel()


def _load(raw: RawSplit, index: int, rule: dict[str, Any]) -> Encoded | Exception:
    try:
        rule = {key: value for key, value in rule.items() if key != "skip_bad"}
        return encode(raw.read(index), **rule)
    except Exception as error:  # Pillow raises many types for damaged files; the caller names the file
        return error


def _estimate(raw: RawSplit, beton: Path, rule: dict[str, Any], pool: ThreadPoolExecutor) -> None:
    """Print what the file will weigh and take, from a sample. Raises UserError when the disk is too small."""
    count = len(raw.labels)
    some = np.linspace(0, count - 1, min(count, ESTIMATE_FILES)).astype(int)
    began = time.perf_counter()
    sizes = [len(r.data) for r in _ordered(raw, some, rule, pool) if isinstance(r, Encoded)]
    seconds = (time.perf_counter() - began) / len(some) * count
    size = METADATA_AT + count * (float(np.mean(sizes)) + 48 if sizes else 0) + 2 * PAGE
    free = shutil.disk_usage(beton.parent).free
    wait = f"{seconds / 60:.1f} minutes" if seconds >= 60 else f"{math.ceil(seconds)} s"
    print(f"{beton}: {plural(count, 'image', ',')}, about {size / 1e9:.2f} GB and {wait}", flush=True)
    if size > free:
        raise UserError(f"{beton.parent} has {free / 1e9:.2f} GB free; {beton.name} needs about {size / 1e9:.2f} GB")


def _fingerprints(rule: dict[str, Any], stamp: Iterable[Any]) -> tuple[str, str]:
    """SHA-256 of the JSON [tool, rule, [what stamps the images]], without a list of a million of them.

    The second is the same whether bad images are left out or not: as far as the work is done, there were none.
    """
    rules = rule, {key: value for key, value in rule.items() if key != "skip_bad"}
    digests = [hashlib.sha256(json.dumps([TOOL, r])[:-1].encode() + b", [") for r in rules]
    for number, item in enumerate(stamp):
        text = (", " * bool(number) + json.dumps(item)).encode()
        for digest in digests:
            digest.update(text)
    for digest in digests:
        digest.update(b"]]")
    return digests[0].hexdigest(), digests[1].hexdigest()


def _up_to_date(beton: Path, fingerprint: str) -> dict[str, Any] | None:
    """The manifest of a file that was written from the same images and is still intact, else None."""
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
