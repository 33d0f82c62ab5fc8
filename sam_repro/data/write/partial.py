"""A .beton file in the making: what is done so far is on disk, and a command that was killed goes on from there.

Beside <name>.beton lie, until it is complete, .<name>.beton.partial with the samples and .<name>.beton.journal with one
entry for each of them. Every SAVE_SECONDS the samples are flushed to the disk and then their entries: what the journal
has, the disk has.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from sam_repro.data.beton import CRC, SAMPLE, BetonWriter, Sample
from sam_repro.errors import UserError

SAVE_SECONDS = 20.0
CHECKED = 256  # samples at the end whose checksums are tested before going on after them
ENTRY = np.dtype([("image", "<i8"), ("sample", SAMPLE), ("stored", "<u4"), ("how", "u1")])
REENCODED, RECODED = 1, 2  # bits of `how`: other coefficients, or the same in another code


class PartialBeton:
    """Grows `beton`; a context manager that keeps what is done if it may be gone on with, and else leaves nothing.

    Args:
        beton: the file that appears when it is complete.
        key: 64 characters that change when the images or the settings do; another's work is thrown away.
        capacity: an upper bound of the number of samples.
        gaps: whether images may be left out; work that left some out is thrown away otherwise.

    Raises:
        UserError: another process is writing this file, or the disk is full.
    """

    def __init__(self, beton: Path, key: str, capacity: int, *, gaps: bool) -> None:
        self.beton, self.key, self.gaps = beton, key.encode(), gaps
        self.data, self.journal = (beton.with_name(f".{beton.name}.{end}") for end in ("partial", "journal"))
        if not self.data.exists() and len(self._read_journal(beton)):
            os.rename(beton, self.data)  # killed when all but the manifest was done
        self.file: BinaryIO = open(os.open(self.data, os.O_RDWR | os.O_CREAT, 0o666), "r+b")  # noqa: SIM115
        self._lock()
        done = self._read_journal(self.data)
        self.count = self.saved = len(done)
        self.entries = np.zeros(capacity, ENTRY)
        self.entries[: self.count] = done
        if self.saved:
            os.truncate(self.journal, len(self.key) + done.nbytes)  # an entry may have been cut
        else:
            self.forget()
        self.writer = BetonWriter(self.file, capacity)
        self.writer.go_on(done["sample"], done["stored"])
        self.next_save = time.monotonic() + SAVE_SECONDS

    @property
    def images(self) -> np.ndarray:
        """int64: the numbers of the images that are in the file; those between are left out."""
        return self.entries["image"][: self.count]

    @property
    def next_image(self) -> int:
        """The number of the first image that nothing is known of."""
        return int(self.images[-1]) + 1 if self.count else 0

    def total(self, how: int) -> int:
        """How many of them are REENCODED, or RECODED."""
        return int(np.count_nonzero(self.entries["how"][: self.count] & how))

    def add(self, image: int, sample: Sample, how: int) -> None:
        """Append the image of this number, greater than those before."""
        row, stored = self.writer.add(*sample)
        self.entries[self.count] = (image, row, stored, how)
        self.count += 1
        if time.monotonic() >= self.next_save:
            self.save()

    def save(self) -> None:
        """Bring what is done to the disk, first the samples, then what tells of them."""
        self._flush()
        with open(self.journal, "ab") as journal:
            journal.write((b"" if self.saved else self.key) + self.entries[self.saved : self.count].tobytes())
            journal.flush()
            os.fsync(journal.fileno())
        self.saved, self.next_save = self.count, time.monotonic() + SAVE_SECONDS

    def finish(self) -> None:
        """Complete the file and give it its name. The journal stays until `forget`."""
        self.writer.finish()
        self._flush()
        if self.saved:
            self.save()
        os.replace(self.data, self.beton)

    def forget(self) -> None:
        """Remove the journal: there is nothing left to go on with."""
        self.journal.unlink(missing_ok=True)

    def __enter__(self) -> PartialBeton:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        try:
            self.file.close()
        except OSError:  # the disk is full: what is buffered cannot be written
            full = True
        if kind is not None and not self.saved:
            self.data.unlink(missing_ok=True)
        if full:
            kept = "; once there is room, the same command goes on" if self.saved else ""
            raise UserError(f"the disk is full: {self.beton} was not written{kept}") from None

    def _flush(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())

    def _lock(self) -> None:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.close()
            raise UserError(f"another process is writing {self.beton}") from None
        except OSError:
            pass  # a file system without locks

    def _read_journal(self, data: Path) -> np.ndarray:
        """ENTRY [samples that are done]: none unless it is of these images and the samples are really in `data`."""
        nothing = np.empty(0, ENTRY)
        try:
            content = self.journal.read_bytes()
            key, content = content[: len(self.key)], content[len(self.key) :]
            entries = np.frombuffer(content, ENTRY, len(content) // ENTRY.itemsize)
            if key != self.key or (not self.gaps and not np.array_equal(entries["image"], np.arange(len(entries)))):
                return nothing
            with open(data, "rb") as file:
                for entry in entries[-CHECKED:]:
                    file.seek(int(entry["sample"]["image"]["pointer"]))
                    stored, crc = file.read(int(entry["stored"]) - CRC), file.read(CRC)
                    if len(crc) < CRC or zlib.crc32(stored) != int.from_bytes(crc, "little"):
                        return nothing
        except OSError:
            return nothing
        return entries
