"""The loader with FFCV: its Loader, iterator thread and page-cache reader, and our kernels.

This is the only file that imports ffcv. FFCV 1.0.2 compiles Python that it generates anew for every loader (7 to 15
seconds) and hangs when its thread fails. Here the generated code is one plain call: the decoding operation hands a
batch to threads that run one kernel, compiled once a machine, and returns the unfinished tasks. So nothing is
compiled for a loader, no numba threading layer is involved (two loaders at once abort on one of them), and what a
task raises reaches the consumer. FFCV's decoder (whole images, inexact transform) is not used: see data/images/jpeg.c.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from dataclasses import replace
from queue import Empty
from typing import Any
from unittest.mock import patch

import numba
import numpy as np
import torch
from torch import Tensor

from sam_repro.data.beton import fits_page_cache
from sam_repro.data.datasets import BetonSource
from sam_repro.data.images.crop import Geometry
from sam_repro.data.loaders.batch_order import BatchPlan
from sam_repro.data.loaders.batches import AHEAD, empty_batch, start_batch
from sam_repro.data.loaders.torch_loader import TorchLoader

# Importing ffcv compiles a typed dictionary of two constants (5 seconds; a plain one does as well), and sets the thread
# counts of torch and numba to 1 for the whole process.
_threads = torch.get_num_threads(), numba.get_num_threads()
with patch("numba.typed.Dict", dict):
    from ffcv.fields.decoders import SimpleRGBImageDecoder
    from ffcv.loader import Loader as FFCVNativeLoader
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.memory_managers.os_cache import OSCacheContext, OSCacheManager
    from ffcv.pipeline.compiler import Compiler
torch.set_num_threads(_threads[0])
numba.set_num_threads(_threads[1])


def _remember_threads(count: int) -> None:
    """FFCV sets torch's and numba's thread counts whenever a loader is made or iterated; a loader must not."""
    Compiler.num_threads = count


Compiler.set_num_threads = _remember_threads


class _Decode(SimpleRGBImageDecoder):
    """FFCV's operation: sample numbers to a batch that is being filled. `start(rows, memory)` does it."""

    def __init__(self, start: Callable[[np.ndarray, np.ndarray], tuple]) -> None:
        super().__init__()
        self.start = start

    def declare_state_and_memory(self, previous_state):
        """No memory from FFCV's ring of buffers, which is overwritten while a consumer may still hold it."""
        return replace(previous_state, jit_mode=True, shape=(3,), dtype=np.dtype("u1")), None

    def generate_code(self) -> Callable:
        """The function that FFCV calls for each batch."""
        start = self.start
        return lambda rows, memory, metadata, storage: start(rows, storage[0])


class _PageCache(OSCacheManager):
    """FFCV's mapped file without the dictionaries of all samples that it fills first and we never ask.

    For ImageNet they cost 7 seconds and 700 MB a loader.
    """

    def __init__(self, reader) -> None:
        self.reader, self.ptrs, self.sizes = reader, None, None
        self.context = OSCacheContext(self)

    def compile_reader(self) -> Callable:
        """Nothing reads through it. FFCV's own makes numba's type of byte arrays read-only for the whole process."""
        return lambda address, storage: None


class FFCVLoader(TorchLoader):
    """Batches of a .beton file (see the Loader protocol), which FFCV's thread starts to fill from the page cache."""

    backend = "ffcv"

    def __init__(self, source: BetonSource, plan: BatchPlan, geometry: Geometry, **options: Any) -> None:
        super().__init__(source, plan, geometry, **options)
        file = source.file
        self.direct = not fits_page_cache(file.path)
        if self.direct:
            os.posix_fadvise(file.descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        # Compiler: the pipeline is one plain call, there is nothing to compile.
        with patch.object(Compiler, "is_enabled", False), patch("ffcv.loader.loader.OSCacheManager", _PageCache):
            self.ffcv = FFCVNativeLoader(
                str(file.path),
                batch_size=plan.batch_size,
                num_workers=1,
                os_cache=True,
                pipelines={"image": [_Decode(self._start)], "label": None},
                drop_last=False,
                batches_ahead=AHEAD,
            )

    def _host_batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        batches = self.plan.batches(epoch, start)
        if not batches:
            return
        order = np.concatenate(batches)
        # FFCV cuts these rows into batches again. Each carries its epoch, so the operation needs no state.
        iterator = EpochIterator(self.ffcv, np.stack([order, np.full_like(order, epoch)], 1))
        tasks: list = []
        try:
            while (batch := _next(iterator)) is not None:
                tasks, images, labels = batch
                for task in tasks:
                    task.result()
                yield images, labels
        finally:
            _stop(iterator, tasks)

    def _start(self, rows: np.ndarray, memory: np.ndarray) -> tuple:
        """(tasks, images, labels): a batch whose images are complete once every task is."""
        indices, epoch = np.ascontiguousarray(rows[:, 0]), int(rows[0, 1])
        images = empty_batch(len(indices), self.geometry.size, self.device)

        def fill(part: np.ndarray, out: np.ndarray, epoch: int) -> None:
            self.fill(part, out, epoch, memory[:0] if self.direct else memory)

        tasks = start_batch(self.pool, fill, indices, images.numpy(), epoch)
        return tasks, images, torch.from_numpy(self.source.labels[indices])


def _next(iterator: EpochIterator) -> tuple | None:
    """FFCV's next result, None at the end. Raises RuntimeError when its thread died, where FFCV would wait for ever."""
    while True:
        try:
            item = iterator.output_queue.get(timeout=1.0)
        except Empty:
            if iterator.is_alive():
                continue
            raise RuntimeError("FFCV's loader thread died; its own message is above") from None
        return None if item is None else item[1][0]


def _stop(iterator: EpochIterator, tasks: list) -> None:
    """End FFCV's thread and every task of the epoch: FFCV leaks both when an epoch is left early."""
    iterator.iter_ixes = iter(())  # the thread finds no further batch
    iterator.close()
    while iterator.is_alive() or not iterator.output_queue.empty():
        try:
            item = iterator.output_queue.get(timeout=0.02)
        except Empty:
            continue
        if item is not None:
            tasks = tasks + item[1][0][0]
    iterator.join()
    wait([task for task in tasks if not task.cancel()])
