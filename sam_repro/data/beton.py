"""FFCV's .beton format, version 2, read and written without FFCV.

Layout (little-endian): header (24 bytes), one descriptor per field (1,041 bytes), one metadata row per sample (24
bytes), zeros up to a page, pages of data, allocation table (24 bytes per sample). No sample crosses a page, which is
what FFCV's own page reader needs. Our files have the fields `image` (RGBImageField, JPEG or raw pixels) and `label`
(IntField), and FFCV's Loader reads them. Each sample is followed by the CRC-32 of its bytes, which decoders never look
at and `BetonFile.sample` checks. The table's size of a JPEG includes it, that of raw pixels does not. FFCV believes
whatever a file says and crashes, hangs or returns garbage when it is damaged, so everything is checked here before FFCV
sees it.
"""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import psutil

from sam_repro.errors import UserError
from sam_repro.records.files import sha256, write_atomic

VERSION = 2
PAGE = 1 << 23  # bytes: FFCV's default, and so the largest image
MIN_SIDE, MAX_SIDE = 8, 65535  # pixels: FFCV aborts on slivers; sizes are stored in 16 bits
CHECKED_STARTS = 4096  # images whose first bytes are looked at when a file is opened

HEADER = np.dtype([("version", "<u2"), ("fields", "<u2"), ("page", "<u4"), ("samples", "<u8"), ("table", "<u8")])
FIELD = np.dtype([("type", "u1"), ("name", "S16"), ("arguments", "V1024")])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("pointer", "<u8")])
SAMPLE = np.dtype({"names": ["image", "label"], "formats": [IMAGE, "<i8"], "offsets": [0, 16], "itemsize": 24})
ALLOCATION = np.dtype([("sample", "<u8"), ("pointer", "<u8"), ("size", "<u8")])
INT_TYPE, IMAGE_TYPE, JPEG_MODE, RAW_MODE = 1, 2, 0, 1
CRC = 4  # bytes after each sample: zlib.crc32, little-endian
FIELDS = ((IMAGE_TYPE, b"image"), (INT_TYPE, b"label"))
METADATA_AT = HEADER.itemsize + len(FIELDS) * FIELD.itemsize


@dataclass(frozen=True)
class BetonFile:
    """An opened and checked file. Arrays have one element per sample.

    Reading uses pread, so that any number of threads may call `sample`; a file of any size needs no memory.
    """

    path: Path
    descriptor: int  # of the open file
    labels: np.ndarray  # int64
    heights: np.ndarray  # int64, pixels
    widths: np.ndarray  # int64, pixels
    pointers: np.ndarray  # int64, byte at which the sample starts
    sizes: np.ndarray  # int64, bytes of the JPEG or of the pixels
    raw: np.ndarray  # bool: pixels, uint8 [height, width, 3], instead of a JPEG
    checked: np.ndarray  # bool: the checksum was tested since the file was opened
    table_sha256: str  # of header, metadata and allocation table: all but the pixels

    def __len__(self) -> int:
        return len(self.labels)

    def sample(self, index: int) -> memoryview:
        """The JPEG stream, or the raw pixels, of one sample, in memory of its own.

        Its checksum is tested when it is first read: that costs as much as a tenth of decoding. Raises UserError when
        it does not fit.
        """
        size = int(self.sizes[index])
        stored = memoryview(bytearray(size + CRC))
        read = os.preadv(self.descriptor, [stored], int(self.pointers[index]))
        data, crc = stored[:size], stored[size:]
        if read != len(stored) or (not self.checked[index] and zlib.crc32(data) != int.from_bytes(crc, "little")):
            raise UserError(f"sample {index} of {self.path} is damaged: its checksum differs; write the data again")
        self.checked[index] = True
        return data

    def close(self) -> None:
        """Close the file; `sample` no longer works."""
        os.close(self.descriptor)

    @classmethod
    def open(cls, path: str | Path) -> BetonFile:
        """Open `path` and check everything but the pixels. Raises UserError with the reason when it is unusable."""
        path = Path(path)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"cannot open {path}: {error.strerror}") from None
        try:
            return cls._parse(path, descriptor)
        except BaseException:
            os.close(descriptor)
            raise

    @classmethod
    def _parse(cls, path: Path, descriptor: int) -> BetonFile:
        head, samples, table, page = _read_header(path, descriptor)
        raw_metadata = _read(descriptor, METADATA_AT, samples * SAMPLE.itemsize)
        raw_table = _read(descriptor, table, samples * ALLOCATION.itemsize)
        metadata, allocations = np.frombuffer(raw_metadata, SAMPLE), np.frombuffer(raw_table, ALLOCATION)
        image = metadata["image"]
        pointer, stored = _check_allocations(path, image, allocations, page=page, table=table)
        raw = image["mode"] == RAW_MODE
        heights, widths = image["height"].astype(np.int64), image["width"].astype(np.int64)
        size = np.where(raw, 3 * heights * widths, stored - CRC)
        if ((stored[raw] != size[raw]) & (stored[raw] != size[raw] + CRC)).any():  # with the checksum: our older files
            raise UserError(
                f"{path} is damaged, or was not made by `sam-repro write`: raw pixels do not fit their size"
            )
        if min(heights.min(), widths.min()) < MIN_SIDE:
            raise UserError(f"{path} is damaged or unusable: an image is smaller than {MIN_SIDE} pixels")
        if metadata["label"].min() < 0:
            raise UserError(f"{path} is damaged: a label is negative")
        for index in np.linspace(0, samples - 1, min(samples, CHECKED_STARTS)).astype(int):
            if not raw[index] and os.pread(descriptor, 2, int(pointer[index])) != b"\xff\xd8":
                raise UserError(f"{path} is damaged: sample {index} is not a JPEG")
        return cls(
            path=path,
            descriptor=descriptor,
            labels=metadata["label"].astype(np.int64),
            heights=heights,
            widths=widths,
            pointers=pointer,
            sizes=size,
            raw=raw,
            checked=np.zeros(samples, np.bool_),
            table_sha256=sha256(head + raw_metadata + raw_table),
        )


def _read_header(path: Path, descriptor: int) -> tuple[bytes, int, int, int]:
    """(header and fields as stored, samples, byte of the allocation table, bytes per page), once they are sound."""
    length = os.fstat(descriptor).st_size
    head = os.pread(descriptor, METADATA_AT, 0)
    if len(head) < METADATA_AT:
        raise UserError(f"{path} is not a .beton file: it has only {length} bytes")
    header = np.frombuffer(head, HEADER, 1)[0]
    fields = np.frombuffer(head, FIELD, len(FIELDS), HEADER.itemsize)
    samples, table, page = int(header["samples"]), int(header["table"]), int(header["page"])
    if header["version"] != VERSION or page < 1 << 21 or page & (page - 1):
        raise UserError(f"{path} is not a .beton file of version {VERSION}")
    if header["fields"] != len(FIELDS) or [(f["type"], f["name"]) for f in fields] != list(FIELDS):
        raise UserError(f"{path} has other fields than image (RGB) and label (int)")
    if samples == 0:
        raise UserError(f"{path} has no samples")
    if table == 0:
        raise UserError(f"{path} is truncated: its writer did not finish")
    expected = table + samples * ALLOCATION.itemsize
    if length < expected:
        raise UserError(f"{path} is truncated: {length} bytes of {expected}")
    if length > expected or METADATA_AT + samples * SAMPLE.itemsize > table:
        raise UserError(f"{path} is damaged: its header does not fit its {length} bytes")
    return head, samples, table, page


def _check_allocations(
    path: Path, image: np.ndarray, allocations: np.ndarray, *, page: int, table: int
) -> tuple[np.ndarray, np.ndarray]:
    """(int64 [samples] first byte, int64 [samples] bytes with the checksum), in the order of the samples.

    Raises UserError unless the table (ALLOCATION [samples], any order) fits the samples (IMAGE [samples]): each lies
    between the metadata and the table, and no sample crosses a page.
    """
    samples = len(image)
    allocations = allocations[np.argsort(allocations["sample"], kind="stable")]
    pointer, size = allocations["pointer"].astype(np.int64), allocations["size"].astype(np.int64)
    first = -(-(METADATA_AT + samples * SAMPLE.itemsize) // page) * page
    sound = (
        np.array_equal(allocations["sample"], np.arange(samples, dtype=np.uint64))
        and np.array_equal(allocations["pointer"], image["pointer"])
        and pointer.min() >= first
        and size.min() > CRC
        and size.max() <= page
        and (pointer + size).max() <= table
        and image["mode"].max() <= RAW_MODE
        and np.array_equal(pointer // page, (pointer + size - 1) // page)
    )
    if not sound:
        raise UserError(f"{path} is damaged: its allocation table does not fit its samples")
    return pointer, size


def _read(descriptor: int, start: int, count: int) -> bytes:
    """`count` bytes from `start`; one pread returns at most 2 GiB."""
    parts = []
    while count:
        part = os.pread(descriptor, min(count, 1 << 30), start)
        assert part, "file shrank while it was read"
        parts.append(part)
        start, count = start + len(part), count - len(part)
    return b"".join(parts)


Sample = tuple[bytes, int, int, int, bool]  # (JPEG or pixels, height, width, label, whether it is pixels)


class BetonWriter:
    """Writes samples one after another into a binary file that can seek; it is whole only after `finish`.

    Args:
        file: open for writing; the caller flushes and closes it.
        capacity: an upper bound of the number of samples; room for their metadata comes before the data.
    """

    def __init__(self, file: BinaryIO, capacity: int) -> None:
        self.file, self.count = file, 0
        self.metadata, self.allocations = np.zeros(capacity, SAMPLE), np.zeros(capacity, ALLOCATION)
        self.position = -(-(METADATA_AT + self.metadata.nbytes) // PAGE) * PAGE
        file.seek(self.position)

    def go_on(self, metadata: np.ndarray, sizes: np.ndarray) -> None:
        """After samples that are in the file: SAMPLE [n], and bytes [n] with their checksums."""
        self.count = n = len(metadata)
        self.metadata[:n] = metadata
        pointers = metadata["image"]["pointer"]
        self.allocations["sample"][:n], self.allocations["size"][:n] = np.arange(n), sizes
        self.allocations["pointer"][:n] = pointers
        if n:
            self.position = int(pointers[-1]) + int(sizes[-1])
        self.file.truncate(self.position)
        self.file.seek(self.position)

    def add(self, data: bytes, height: int, width: int, label: int, raw: bool) -> tuple[np.void, int]:
        """Append a sample; its SAMPLE row and its bytes with the checksum. Raises UserError where it does not fit."""
        if not (MIN_SIDE <= height <= MAX_SIDE and MIN_SIDE <= width <= MAX_SIDE):
            raise UserError(f"sample {self.count} is {width}x{height} pixels; sides must be {MIN_SIDE} to {MAX_SIDE}")
        stored = data + zlib.crc32(data).to_bytes(CRC, "little")
        if len(stored) > PAGE:
            raise UserError(f"sample {self.count} has {len(data)} bytes; a .beton page holds {PAGE - CRC}")
        left = PAGE - self.position % PAGE
        if len(stored) > left:
            self.file.write(bytes(left))
            self.position += left
        self.file.write(stored)
        self.metadata[self.count] = ((RAW_MODE if raw else JPEG_MODE, width, height, self.position), label)
        self.allocations[self.count] = (self.count, self.position, len(stored))
        self.position += len(stored)
        self.count += 1
        return self.metadata[self.count - 1], len(stored)

    def finish(self) -> int:
        """Write the table and the header; the number of samples. Raises UserError when there is none."""
        if self.count == 0:
            raise UserError("there is no sample to write")
        table = -(-self.position // PAGE) * PAGE
        self.file.write(bytes(table - self.position))
        raw = self.metadata["image"]["mode"][: self.count] == RAW_MODE
        self.allocations["size"][: self.count][raw] -= CRC  # FFCV takes all of a sample's bytes to be its pixels
        self.file.write(self.allocations[: self.count].tobytes())
        self.file.seek(0)
        self.file.write(np.array([(VERSION, len(FIELDS), PAGE, self.count, table)], HEADER).tobytes())
        self.file.write(np.array([(kind, name, b"") for kind, name in FIELDS], FIELD).tobytes())
        self.file.write(self.metadata[: self.count].tobytes())
        return self.count


def write_beton(path: str | Path, samples: Iterable[Sample], *, capacity: int) -> int:
    """Write samples to `path` and return their number.

    The file appears under its name only when it is complete and on the disk; the iterator is consumed as it is
    written, so memory does not grow with it.

    Args:
        samples: (JPEG or pixels, height, width, label, whether it is pixels).
        capacity: an upper bound of the number of samples; room for their metadata comes before the data.

    Raises:
        UserError: when the disk is full or a sample does not fit the format.
    """
    count = 0

    def fill(file: BinaryIO) -> None:
        nonlocal count
        writer = BetonWriter(file, capacity)
        for sample in samples:
            writer.add(*sample)
        count = writer.finish()

    try:
        write_atomic(path, fill)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"the disk is full: {path} was not written") from None
        raise
    return count


def fits_page_cache(path: str | Path) -> bool:
    """Whether the file is small enough, below 70 % of the free memory, to be mapped and stay cached."""
    return Path(path).stat().st_size < 0.7 * psutil.virtual_memory().available
