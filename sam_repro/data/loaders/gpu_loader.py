"""The loader that decodes on the GPU: JPEG bytes from our own reader, nvJPEG, and our crops (data/gpu_crop.py).

It leaves the processor's cores free: reading, and microseconds of geometry an image, are all that is left for them.
Decoding and cropping run on streams of their own, while the step runs on its own.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sam_repro.data.datasets import Buffer, Source
from sam_repro.data.images.crop import Geometry
from sam_repro.data.images.gpu_crop import crop_batch, taps_of
from sam_repro.data.images.gpu_decode import Decode, components
from sam_repro.data.loaders.batch_order import Plan
from sam_repro.data.loaders.batches import AHEAD, CHUNK

PART = 128  # images a decoder call: enough for every engine, and few enough that the first batch comes soon
LANES = 2  # batches in the decoder's queue, so that reading headers overlaps decoding


class GPULoader:
    """Batches of a source (see the Loader protocol), decoded by `decode`."""

    backend = "gpu"
    reason = ""

    def __init__(
        self, source: Source, plan: Plan, geometry: Geometry, *, workers: int, device: torch.device, decode: Decode
    ) -> None:
        self.source, self.plan, self.geometry, self.device, self.decode = source, plan, geometry, device, decode
        self.samples, self.manifest = len(plan.indices), source.manifest
        self.refused = np.zeros(len(source.labels), np.bool_)  # what the GPU's decoder cannot read
        self.readers = ThreadPoolExecutor(workers, thread_name_prefix="read")
        self.lanes = ThreadPoolExecutor(LANES, thread_name_prefix="decode")
        self.streams = [torch.cuda.Stream(device) for _ in range(LANES)] if device.type == "cuda" else []

    def __len__(self) -> int:
        return len(self.plan)

    def close(self) -> None:
        """End the threads and close the source."""
        self.lanes.shutdown(cancel_futures=True)
        self.readers.shutdown(cancel_futures=True)
        self.source.close()

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches start, start + 1, ... of one epoch. Fresh tensors: they may be kept."""
        pending: deque[Future] = deque()
        try:
            for number, indices in enumerate(self.plan.batches(epoch, start)):
                # A batch is begun once the GPU is done with the step before this moment: memory stays bounded
                # although the host runs ahead of the GPU.
                used = torch.cuda.current_stream(self.device).record_event() if self.streams else None
                chunks = [indices[i : i + CHUNK] for i in range(0, len(indices), CHUNK)]
                reads = [self.readers.submit(self._read, chunk) for chunk in chunks]
                pending.append(self.lanes.submit(self._batch, number % LANES, indices, epoch, reads, used))
                if len(pending) > AHEAD:
                    yield self._finish(pending.popleft())
            while pending:
                yield self._finish(pending.popleft())
        finally:  # the consumer left early, or a sample failed: nothing of this epoch keeps running
            wait([task for task in pending if not task.cancel()])

    def _finish(self, task: Future) -> tuple[Tensor, Tensor]:
        images, labels, ready = task.result()
        if ready is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(ready)
            for tensor in (images, labels):
                tensor.record_stream(current)
        return images.permute(0, 3, 1, 2), labels

    def _read(self, indices: np.ndarray) -> list[Buffer | np.ndarray]:
        """The JPEG of each sample, or its pixels [H, W, 3] where the GPU cannot decode it."""
        items: list[Buffer | np.ndarray] = []
        for index in indices:
            jpeg = None if self.refused[index] else self.source.encoded(index)
            if jpeg is None or components(jpeg) not in (1, 3):  # decoders differ in what they make of CMYK
                self.refused[index] = True
                items.append(self.source.read(index))
            else:
                items.append(jpeg)
        return items

    def _batch(
        self, lane: int, indices: np.ndarray, epoch: int, reads: list[Future], used: Any
    ) -> tuple[Tensor, Tensor, Any]:
        """(uint8 [B, S, S, 3], labels [B], the event after which both are complete)."""
        size, gpu = self.geometry.size, bool(self.streams)
        with torch.cuda.stream(self.streams[lane]) if gpu else nullcontext():
            if used is not None:
                used.synchronize()
            out = torch.empty((len(indices), size, size, 3), dtype=torch.uint8, device=self.device)
            stored = [item for read in reads for item in read.result()]
            for first in range(0, len(indices), PART):
                part = slice(first, first + PART)
                images = self._pixels(stored[part], indices[part])
                sides = [(t.shape[1], t.shape[2]) for t in images]
                taps = taps_of(sides, indices[part], self.geometry, seed=self.plan.seed, epoch=epoch, pin=gpu)
                crop_batch(images, taps.to(self.device), out[part])
                if gpu:
                    # The decoder writes from a stream of its own into memory of this stream's pool: it may have it
                    # again only when the crop is done.
                    self.streams[lane].synchronize()
            labels = torch.from_numpy(self.source.labels[indices])
            if not gpu:
                return out, labels, None
            labels = labels.pin_memory().to(self.device, non_blocking=True)
            return out, labels, self.streams[lane].record_event()

    def _pixels(self, stored: list[Any], indices: np.ndarray) -> list[Tensor]:
        """uint8 (3, H, W) on the device: by the GPU's decoder, else by the processor."""
        jpegs = [k for k, item in enumerate(stored) if not isinstance(item, np.ndarray)]
        images: dict[int, Tensor] = {}
        try:
            images |= zip(jpegs, self.decode([stored[k] for k in jpegs], self.device) if jpegs else [], strict=True)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # one image fails the whole call: find out which
            for k in jpegs:
                try:
                    images[k] = self.decode([stored[k]], self.device)[0]
                except RuntimeError as error:  # said, since its pixels differ a little: the processor's from now on
                    reason = (str(error).splitlines() or [type(error).__name__])[0]
                    warnings.warn(f"the processor decodes what the GPU's decoder refuses: {reason}", stacklevel=2)
                    self.refused[indices[k]] = True
                    stored[k] = self.source.read(indices[k])
        for k, item in enumerate(stored):
            if k not in images:
                images[k] = torch.from_numpy(np.ascontiguousarray(item)).to(self.device).permute(2, 0, 1)
        return [images[k] for k in range(len(stored))]
