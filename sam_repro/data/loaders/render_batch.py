"""From sample numbers to finished training or evaluation images, for every backend that streams, from any thread."""

from __future__ import annotations

import threading

import numpy as np
from numba import njit, types

from sam_repro.data.datasets import BetonSource, Source
from sam_repro.data.images import jpeg
from sam_repro.data.images.augment import rand_augment
from sam_repro.data.images.crop import PILLOW, Geometry, render, render_any

NOTHING = np.empty(0, np.uint8)
_pread = types.ExternalFunction("pread", types.int64(types.int32, types.uintp, types.uint64, types.int64))


class BatchRenderer:
    """Decodes and renders samples of a source into a part of a batch."""

    def __init__(self, source: Source, geometry: Geometry, seed: int, magnitude: int = 0) -> None:
        self.source, self.geometry, self.seed, self.magnitude = source, geometry, seed, magnitude
        # Why whole images are decoded, by Pillow.
        self.obstacle = "Pillow resizes them" if geometry.filter in PILLOW else jpeg.load()
        self.scratch = threading.local()

    def __call__(self, indices: np.ndarray, out: np.ndarray, epoch: int, memory: np.ndarray = NOTHING) -> None:
        """Render samples into a part of a batch.

        Args:
            indices: int64 [n], sample numbers within the source.
            out: uint8 [n, size, size, 3], overwritten.
            epoch: of the random stream of crops.
            memory: uint8 [bytes], the mapped .beton file; without it the file is read.

        Raises:
            UserError: a sample cannot be decoded; the sentence names it.
        """
        failed = np.ones(len(indices), np.bool_)
        if not self.obstacle and isinstance(self.source, BetonSource):
            self._fill_beton(indices, out, epoch, memory, failed)
        elif not self.obstacle:
            for k, index in enumerate(indices):
                failed[k] = not self._fill_one(index, out[k], epoch)
        for k in np.flatnonzero(failed):  # no JPEG, an odd one, or a damaged one: Pillow decides, and names the sample
            render_any(self.source.read(indices[k]), out[k], self.geometry, self.seed, epoch, indices[k])
        if self.magnitude:
            for index, target in zip(indices, out, strict=True):
                rand_augment(target, self.magnitude, seed=self.seed, epoch=epoch, index=index)

    def _fill_beton(
        self, indices: np.ndarray, out: np.ndarray, epoch: int, memory: np.ndarray, failed: np.ndarray
    ) -> None:
        assert isinstance(self.source, BetonSource)
        file = self.source.file
        for index in indices[~file.checked[indices]]:
            file.sample(index)
        if not hasattr(self.scratch, "image"):
            self.scratch.image = np.empty(4 * int((file.heights * file.widths).max()), np.uint8)
            self.scratch.stored = np.empty(int(file.sizes.max()), np.uint8)
        tables = file.pointers, file.sizes, file.heights, file.widths, file.raw
        descriptor = -1 if len(memory) else file.descriptor
        buffers = self.scratch.stored, self.scratch.image
        _fill(memory, descriptor, *buffers, *tables, indices, out, self.geometry, self.seed, epoch, failed)

    def _fill_one(self, index: int, out: np.ndarray, epoch: int) -> bool:
        encoded = self.source.encoded(index)
        if encoded is None:
            return False
        if not hasattr(self.scratch, "image"):
            self.scratch.image = np.empty(4 << 18, np.uint8)
        stored = np.frombuffer(encoded, np.uint8)
        where = stored.ctypes.data, len(stored), 0, 0, self.scratch.image
        return jpeg.render_jpeg(*where, out, self.geometry, self.seed, epoch, index)


@njit(cache=True, nogil=True)
def _fill(
    memory,
    descriptor,
    buffer,
    scratch,
    pointers,
    sizes,
    heights,
    widths,
    raw,
    indices,
    out,
    geometry,
    seed,
    epoch,
    failed,
):
    """Decode and render the samples `indices` into `out`; failed[k] stays true where that did not work.

    memory: uint8 [bytes], the mapped file; with descriptor >= 0 the sample is read from that file into `buffer`.
    buffer: uint8, room for the largest stored sample. scratch: uint8, room for the largest image. Both belong to the
    calling thread.
    pointers, sizes, heights, widths: int64, and raw: bool, one element per sample of the file (see BetonFile).
    indices: int64 [n]; out: uint8 [n, size, size, 3]; failed: bool [n].
    geometry: a tuple of scalars, see crop.Geometry. seed, epoch: of the random stream.
    """
    for k in range(len(indices)):
        i = indices[k]
        h, w, size = heights[i], widths[i], sizes[i]
        # int64: the sum of an unsigned and a signed number would be a float.
        address = np.int64(memory.ctypes.data) + pointers[i]
        if descriptor >= 0:
            address = np.int64(buffer.ctypes.data)
            if _pread(descriptor, address, size, pointers[i]) != size:
                continue
        if raw[i]:
            pixels = memory[pointers[i] : pointers[i] + size] if descriptor < 0 else buffer[:size]
            render(pixels.reshape(h, w, 3), out[k], geometry, seed, epoch, i)
            failed[k] = False
        else:
            failed[k] = not jpeg.render_jpeg(address, size, h, w, scratch, out[k], geometry, seed, epoch, i)
